"""Users and groups, from configurations and hostile images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.identity import Identity, identify
from runtime.specgen.mounts.openat2 import FILE_LIMIT, read_file
from tests.unit.spec.requests import write_accounts


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    write_accounts(tmp_path / "root")
    return tmp_path / "root"


def _identify(rootfs: Path, image_user: str = "", **fields: Any) -> Identity:
    return identify(cri_pb2.LinuxContainerSecurityContext(**fields), image_user, rootfs)


@pytest.mark.parametrize(
    ("image_user", "fields", "expected"),
    [
        ("", {}, Identity(0, 0, (0, 10, 50), "/root")),
        ("app", {}, Identity(1000, 1000, (1000, 29, 50), "/home/app")),
        ("1000", {}, Identity(1000, 1000, (1000, 29, 50), "/home/app")),
        ("1000:50", {}, Identity(1000, 50, (50, 29), "/home/app")),
        ("app:audio", {}, Identity(1000, 29, (29, 50), "/home/app")),
        ("4711", {}, Identity(4711, 0, (0,), "/")),
        ("4711:4712", {}, Identity(4711, 4712, (4712,), "/")),
        ("nohome", {}, Identity(1001, 1001, (1001,), "/")),
        # a number is an id, regardless of the name of the image's root account
        ("1002", {}, Identity(1002, 0, (0,), "/")),
        ("root", {"run_as_user": {"value": 1002}}, Identity(1002, 0, (0,), "/")),
        ("app", {"run_as_user": {"value": 0}}, Identity(0, 0, (0, 10, 50), "/root")),
        ("app:staff", {"run_as_user": {"value": 1000}}, Identity(1000, 1000, (1000, 29, 50), "/home/app")),
        ("", {"run_as_username": "app", "run_as_group": {"value": 3}}, Identity(1000, 3, (3, 29, 50), "/home/app")),
        ("app", {"supplemental_groups": [9, 50, 9]}, Identity(1000, 1000, (1000, 9, 29, 50), "/home/app")),
        (
            "app",
            {"supplemental_groups": [9], "supplemental_groups_policy": "Strict"},
            Identity(1000, 1000, (1000, 9), "/home/app"),
        ),
    ],
)
def test_identify(rootfs: Path, image_user: str, fields: dict[str, Any], expected: Identity) -> None:
    assert _identify(rootfs, image_user, **fields) == expected


@pytest.mark.parametrize(
    ("image_user", "fields", "reason"),
    [
        ("nobody", {}, "'nobody' is not in the image's /etc/passwd"),
        ("app:none", {}, "group 'none' is not in"),
        ("", {"run_as_username": "ghost"}, "'ghost' is not in"),
        ("app", {"run_as_group": {"value": 5}}, "without a user"),
        ("", {"run_as_user": {"value": -1}}, "run_as_user -1 is not an id"),
        ("", {"run_as_user": {"value": 2**32}}, "run_as_user 4294967296 is not an id"),
        ("", {"run_as_user": {"value": 1}, "run_as_group": {"value": -5}}, "run_as_group -5"),
        ("", {"supplemental_groups": [-7]}, "supplemental group -7"),
        ("4294967296", {}, "user 4294967296 is not an id"),
        ("4294967295:1", {}, "user 4294967295 is not an id"),
        ("-1", {}, "user -1 is not an id"),
        ("--1", {}, "'--1' is not in"),
        ("-0", {}, "user -0 is not an id"),
        ("app:-0", {}, "group -0 is not an id"),
        (" 0", {}, "USER ' 0' of the image has spaces"),
        ("0 ", {}, "has spaces"),
        (" ", {}, "has spaces"),
        ("0\t:0", {}, "has spaces"),
        ("1000: 0", {}, "has spaces"),
        ("app:--1", {}, "'--1' is not in"),
        ("99999999999999999999", {}, "'99999999999999999999' is not in the image's /etc/passwd"),
        ("broken", {}, "'broken' is not in"),
        ("huge", {}, "out of range"),
    ],
)
def test_identify_refuses(rootfs: Path, image_user: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        _identify(rootfs, image_user, **fields)


def test_an_image_without_accounts(tmp_path: Path) -> None:
    assert _identify(tmp_path) == Identity(0, 0, (0,), "/")
    assert _identify(tmp_path, "7:8") == Identity(7, 8, (8,), "/")


@pytest.mark.parametrize(
    "link", ["/outside", "../../../../../../../../{outside}", "{outside}", "/proc/self/root{outside}"]
)
def test_links_do_not_leave_the_root(tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("evil:x:0:0::/:/bin/sh\n")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").symlink_to(link.format(outside=outside))
    assert read_file(root, "etc/passwd") == b""


def test_links_inside_the_root_are_followed(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/passwd").write_text("app:x:5:6::/app:\n")
    (tmp_path / "etc").symlink_to("/usr/lib")
    assert _identify(tmp_path, "app") == Identity(5, 6, (6,), "/app")


def test_what_is_no_file_is_no_account(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/passwd")
    (tmp_path / "etc/group").mkdir()
    assert _identify(tmp_path, "5") == Identity(5, 0, (0,), "/")


def test_an_endless_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    with open(tmp_path / "etc/passwd", "wb") as passwd:
        passwd.truncate(FILE_LIMIT + 1)
    with pytest.raises(InvalidArgumentError, match="larger than"):
        _identify(tmp_path, "app")
