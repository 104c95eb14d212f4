"""SELinux: labels of containers, levels of pods, and what is relabelled."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.builder import build
from runtime.specgen.facts import SandboxFiles
from runtime.specgen.security import relabel, selinux
from runtime.specgen.security.node_selinux import CATEGORIES, free_level
from runtime.specgen.security.relabel import relabel_all
from runtime.specgen.security.selinux import Relabel, SelinuxLabels, container_labels, selinux_labels
from tests.unit.spec.requests import NODE, Image, container, request, sandbox, secured

Options = cri_pb2.SELinuxOption
LABELLED = replace(NODE, selinux_enabled=True)
POD_LEVEL = "s0:c3,c4"
MOUNT = f"system_u:object_r:container_file_t:{POD_LEVEL}"

# An attribute that every process may set without a policy replaces one that needs a policy and root.
ATTRIBUTE = "user.label"


@pytest.mark.parametrize(
    ("given", "process", "mount"),
    [
        ({}, f"system_u:system_r:container_t:{POD_LEVEL}", MOUNT),
        (
            {"level": "s0:c1,c2"},
            "system_u:system_r:container_t:s0:c1,c2",
            "system_u:object_r:container_file_t:s0:c1,c2",
        ),
        ({"type": "spc_t"}, f"system_u:system_r:spc_t:{POD_LEVEL}", MOUNT),
        ({"role": "own_r", "type": "own_t", "level": "s0"}, "system_u:own_r:own_t:s0", f"{MOUNT[:-6]}"),
        (
            {"user": "own_u", "level": "s0-s1:c0.c1023"},
            "own_u:system_r:container_t:s0-s1:c0.c1023",
            "own_u:object_r:container_file_t:s0-s1:c0.c1023",
        ),
    ],
)
def test_what_is_not_given_is_completed(given: dict[str, str], process: str, mount: str) -> None:
    assert selinux_labels(Options(**given), LABELLED, level=POD_LEVEL) == SelinuxLabels(process, mount)


@pytest.mark.parametrize(("field", "value"), [("type", "a b"), ("user", "a:b"), ("role", "/"), ("level", "c1")])
def test_wrong_options_are_refused_with_and_without_selinux(field: str, value: str) -> None:
    for node in (NODE, LABELLED):
        with pytest.raises(InvalidArgumentError, match=field):
            selinux_labels(Options(**{field: value}), node)


def test_a_label_the_policy_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # /dev/full takes no byte, as selinuxfs takes no label that is in no policy.
    monkeypatch.setattr(selinux, "CHECK", "/dev/full")
    with pytest.raises(
        InvalidArgumentError, match=r"does not know the label system_u:system_r:own_t:s0: .*selinux = f"
    ):
        selinux_labels(Options(type="own_t"), LABELLED)


def test_no_labels_without_selinux_or_for_privileged_containers() -> None:
    assert selinux_labels(Options(level="s0:c1,c2"), NODE) == SelinuxLabels()
    assert selinux_labels(Options(level="s0:c1,c2"), LABELLED, privileged=True) == SelinuxLabels()


def test_a_container_without_options_has_those_of_its_pod() -> None:
    pod = sandbox()
    pod.linux.security_context.selinux_options.type = "pod_t"

    def process(config: cri_pb2.ContainerConfig) -> str:
        return container_labels(config, pod, LABELLED, level=POD_LEVEL).process

    assert process(container()) == f"system_u:system_r:pod_t:{POD_LEVEL}"
    assert process(secured(selinux_options=Options())) == f"system_u:system_r:pod_t:{POD_LEVEL}"
    assert process(secured(selinux_options=Options(level="s0:c9,c10"))) == "system_u:system_r:container_t:s0:c9,c10"


def test_levels_are_of_two_categories_and_never_one_in_use() -> None:
    used: set[str] = set()
    for _ in range(2000):
        level = free_level(used)
        found = re.fullmatch(r"s0:c(\d+),c(\d+)", level)
        assert found is not None
        assert 0 <= int(found[1]) < int(found[2]) < CATEGORIES
        assert level not in used
        used.add(level)


def test_labels_are_in_the_spec_and_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Relabel] = []
    monkeypatch.setattr("runtime.specgen.builder.relabel_all", lambda relabels, check: done.extend(relabels))
    volume = tmp_path / "volume"
    config = container()
    config.mounts.add(container_path="/volume", host_path=str(volume), selinux_relabel=True)
    config.mounts.add(container_path="/plain", host_path=str(tmp_path))
    files = SandboxFiles(resolv_conf=tmp_path / "resolv.conf", hosts=tmp_path / "hosts")
    built = build(
        request(
            tmp_path,
            config=config,
            node=LABELLED,
            selinux_level=POD_LEVEL,
            files=files,
            image=Image(volumes=["/data"]),
        )
    )
    assert built.spec.process.selinux_label == f"system_u:system_r:container_t:{POD_LEVEL}"
    assert built.spec.linux.mount_label == MOUNT
    assert done == [Relabel(str(path), MOUNT) for path in (volume, tmp_path / "resolv.conf", tmp_path / "hosts")]
    assert volume.is_dir()
    assert [made.label for made in built.volumes] == [MOUNT]


def test_nothing_is_labelled_without_selinux(tmp_path: Path) -> None:
    config = container()
    config.mounts.add(container_path="/volume", host_path=str(tmp_path), selinux_relabel=True)
    built = build(request(tmp_path, config=config, files=SandboxFiles(hosts=tmp_path / "hosts")))
    assert not built.relabels
    assert not built.spec.linux.mount_label
    assert not built.spec.process.selinux_label


@pytest.mark.parametrize("folder", ["/", "/etc", "/usr/share", "/home", "/var/lib", "/root", "/proc/1"])
def test_system_folders_are_not_relabelled(tmp_path: Path, folder: str) -> None:
    config = container()
    config.mounts.add(container_path="/volume", host_path=folder, selinux_relabel=True)
    with pytest.raises(InvalidArgumentError, match="belongs to the system"):
        build(request(tmp_path, config=config))


def test_a_link_to_a_system_folder_is_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    config = container()
    config.mounts.add(container_path="/volume", host_path=str(tmp_path / "link"), selinux_relabel=True)
    with pytest.raises(InvalidArgumentError, match="/etc belongs to the system"):
        build(request(tmp_path, config=config))


def _label(path: Path) -> str | None:
    try:
        return os.getxattr(path, ATTRIBUTE, follow_symlinks=False).decode()
    except OSError:
        return None


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/deep").write_text("")
    (tree / "file").write_text("")
    try:
        os.setxattr(tree / "file", ATTRIBUTE, b"x")
    except OSError:
        pytest.skip("the file system of the temporary folder keeps no extended attributes")
    return tree


def test_all_below_a_folder_is_relabelled_once(tree: Path) -> None:
    assert relabel_all([Relabel(str(tree), "one")], ATTRIBUTE) == 5
    everything = [tree, *tree.rglob("*")]
    assert {_label(path) for path in everything} == {"one"}
    assert relabel_all([Relabel(str(tree), "one")], ATTRIBUTE) == 0
    (tree / "later").write_text("")
    assert relabel_all([Relabel(str(tree), "one")], ATTRIBUTE) == 1
    assert relabel_all([Relabel(str(tree / "file"), "two")], ATTRIBUTE) == 1
    assert (_label(tree / "file"), _label(tree)) == ("two", "one")


def test_links_lead_nowhere(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("")
    (tree / "link").symlink_to(outside)
    (tree / "a/file").symlink_to(outside / "file")
    with contextlib.suppress(InvalidArgumentError):  # links have attributes of the kernel's only, none that users set
        relabel_all([Relabel(str(tree), "one")], ATTRIBUTE)
    assert _label(outside) is None
    assert _label(outside / "file") is None
    link = tmp_path / "swapped"
    link.symlink_to(outside)
    with pytest.raises((InvalidArgumentError, OSError)):
        relabel_all([Relabel(str(link), "one")], ATTRIBUTE)
    assert _label(outside) is None


def test_a_link_that_came_into_the_path_is_refused(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "b").mkdir(parents=True)
    (tree / "a").rename(tree / "was")
    (tree / "a").symlink_to(outside)
    with pytest.raises(InvalidArgumentError, match="a/b cannot be given the SELinux label one: Too many levels"):
        relabel_all([Relabel(str(tree / "a/b"), "one")], ATTRIBUTE)
    assert _label(outside / "b") is None


def test_a_file_system_without_labels_is_passed_over() -> None:
    assert relabel_all([Relabel(f"/proc/{os.getpid()}/status", "one")], ATTRIBUTE) == 0


def test_what_cannot_be_labelled_is_reported(tree: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="gone cannot be given the SELinux label one: No such file"):
        relabel_all([Relabel(str(tree / "gone"), "one")], ATTRIBUTE)


def test_the_attribute_is_selinux_s() -> None:
    assert relabel.ATTRIBUTE == "security.selinux"
