"""Which hooks of oci-hooks(5) a container gets, and which files are left out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.specgen.draft import draft
from runtime.specgen.hooks_dir import HookedContainer, HooksDir, read_rule
from tests.unit.spec.requests import container, request, sandbox

PLAIN = HookedContainer({}, "/bin/serve", False)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write("10-name.json", folder="usr", …)`` writes a file with a good hook, changed by the fields given."""

    def write(name: str, *, folder: str = "usr", **fields: Any) -> Path:
        content: dict[str, Any] = {
            "version": "1.0.0",
            "hook": {"path": "/bin/true", "args": ["true", name]},
            "when": {"always": True},
            "stages": ["prestart"],
        }
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**content, **fields}))
        return path

    return write


@pytest.fixture
def hooks(tmp_path: Path) -> HooksDir:
    return HooksDir([str(tmp_path / "usr"), str(tmp_path / "etc")])


def given(hooks: HooksDir, to: HookedContainer = PLAIN) -> list[str]:
    return [rule.hook.args[1] for rule in hooks.read() if rule.matches(to)]


@pytest.mark.parametrize(
    ("when", "to", "matches"),
    [
        ({"always": True}, PLAIN, True),
        ({"always": False}, PLAIN, False),
        ({"hasBindMounts": True}, PLAIN, False),
        ({"hasBindMounts": True}, HookedContainer({}, "x", True), True),
        ({"hasBindMounts": False}, HookedContainer({}, "x", False), False),
        ({"commands": ["^/usr/bin/", "serve$"]}, PLAIN, True),
        ({"commands": ["^serve"]}, PLAIN, False),
        ({"annotations": {"^vendor/": "^on$"}}, HookedContainer({"vendor/x": "on"}, "x", False), True),
        ({"annotations": {"^vendor/": "^on$"}}, HookedContainer({"vendor/x": "off", "a": "on"}, "x", False), False),
        ({"annotations": {"^a$": ".*", "^b$": ".*"}}, HookedContainer({"a": "1"}, "x", False), False),
        ({"annotations": {"^a$": ".*", "^b$": ".*"}}, HookedContainer({"a": "1", "b": ""}, "x", False), True),
        ({"always": True, "commands": ["^none$"]}, PLAIN, False),
        ({"commands": ["^/bin/[[:alpha:]]+$"]}, PLAIN, True),
        ({"commands": ["^/bin/[[:digit:]]+$"]}, PLAIN, False),
        ({"commands": [r"(?i)\bSERVE\b"]}, PLAIN, True),
        ({"annotations": {"^a$": "^on$"}}, HookedContainer({"a": "on\n"}, "x", False), False),
        ({"annotations": {"a": "é+$"}}, HookedContainer({"a": "éé"}, "x", False), True),
    ],
)
def test_every_condition_that_is_named_must_be_met(
    hooks: HooksDir, write: Write, when: dict[str, Any], to: HookedContainer, matches: bool
) -> None:
    write("a.json", when=when)
    assert (given(hooks, to) == ["a.json"]) is matches
    assert hooks.problems == {}


def test_later_folders_replace_files_by_name_and_names_give_the_order(hooks: HooksDir, write: Write) -> None:
    write("20-b.json")
    write("10-a.json", folder="etc")
    write("20-b.json", folder="etc", hook={"path": "/bin/true", "args": ["true", "replaced"]})
    write("30-c.txt")
    assert given(hooks) == ["10-a.json", "replaced"]


def test_the_order_is_that_of_names_in_lower_case(hooks: HooksDir, write: Write) -> None:
    for name in ("01-my-hook.json", "01-UPPERCASE.json", "02-another-hook.json", "Z.json", "y.json"):
        write(name)
    assert given(hooks) == ["01-my-hook.json", "01-UPPERCASE.json", "02-another-hook.json", "y.json", "Z.json"]


def test_no_text_of_a_pod_makes_matching_slow(hooks: HooksDir, write: Write) -> None:
    write("a.json", when={"annotations": {"^list$": "^(([a-z])+.)+[A-Z]([a-z])+$"}})
    assert given(hooks, HookedContainer({"list": "a" * (64 << 10)}, "x", False)) == []


def test_what_a_file_says_beside_the_hook_is_ignored(hooks: HooksDir, write: Write) -> None:
    write("a.json", description="from the vendor's package")
    assert given(hooks) == ["a.json"]
    assert hooks.problems == {}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"version": "0.1.0"}, "version"),
    ({"hook": {"path": "true"}}, "not absolute"),
    ({"hook": {"path": "/no/such/program"}}, "/no/such/program is missing"),
    ({"hook": {"path": "/bin/true\0"}}, "hook has a NUL byte"),
    ({"hook": {"path": "/bin/true", "args": ["true", "a\0"]}}, "hook has a NUL byte"),
    ({"hook": {"path": "/bin/true", "env": ["A=\0"]}}, "hook has a NUL byte"),
    ({"hook": {"path": "/bin/true", "timeout": 0}}, "timeout"),
    ({"when": {}}, "when has no condition"),
    ({"when": {"commands": ["("]}}, "not a regular expression"),
    ({"when": {"annotations": {"a": "["}}}, "not a regular expression"),
    ({"when": {"annotations": {"[": "a"}}}, "not a regular expression"),
    ({"when": {"commands": ["(?=ahead)"]}}, "not a regular expression"),
    ({"when": {"sometimes": True}}, "sometimes"),
    ({"hook": "not-an-object"}, "hook"),
    ({"hook": {}}, "path"),
    ({"stages": []}, "stages is empty"),
    ({"stages": ["precreate"]}, "precreate"),
    ({"stages": "prestart"}, "stages"),
]


@pytest.mark.parametrize(("fields", "why"), WRONG)
def test_a_wrong_file_is_named_once_and_left_out(
    hooks: HooksDir, write: Write, fields: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    write("10-good.json")
    wrong = write("20-wrong.json", **fields)
    with caplog.at_level(logging.WARNING):
        assert given(hooks) == given(hooks) == ["10-good.json"]
    assert list(hooks.problems) == [str(wrong)]
    assert why in hooks.problems[str(wrong)]
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [f"OCI hook {wrong}"]


def test_what_is_no_readable_json_file_is_left_out(hooks: HooksDir, write: Write, tmp_path: Path) -> None:
    write("good.json")
    folder = tmp_path / "usr"
    (folder / "binary.json").write_bytes(b"\xff\x00{")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "folder.json").mkdir()
    (folder / "large.json").write_text(" " * (1 << 20))
    (folder / "link.json").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.json")
    assert given(hooks) == ["good.json"]
    names = {Path(path).name for path in hooks.problems}
    assert names == {"binary.json", "deep.json", "folder.json", "large.json", "link.json", "pipe.json"}


def test_changes_are_seen_and_what_is_unchanged_is_not_read_again(
    hooks: HooksDir, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counting(path: Path) -> Any:
        read.append(path)
        return read_rule(path)

    path = write("a.json")
    assert given(hooks) == ["a.json"]
    monkeypatch.setattr("runtime.specgen.hooks_dir.read_rule", counting)
    assert given(hooks) == ["a.json"]
    assert read == []
    write("a.json", hook={"path": "/bin/true", "args": ["true", "changed"]})
    assert given(hooks) == ["changed"]
    assert read == [path]
    path.unlink()
    assert given(hooks) == []


def test_a_program_that_comes_later_is_found(hooks: HooksDir, write: Write, tmp_path: Path) -> None:
    program = tmp_path / "program"
    write("a.json", hook={"path": str(program), "args": ["x", "a.json"]})
    assert given(hooks) == []
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert given(hooks) == ["a.json"]
    assert hooks.problems == {}


def test_start_container_takes_a_program_of_the_container(hooks: HooksDir, write: Write) -> None:
    write("a.json", hook={"path": "/only/inside", "args": ["x", "a.json"]}, stages=["startContainer"])
    assert given(hooks) == ["a.json"]


def test_annotations_of_pod_and_container_count(hooks: HooksDir, write: Write, tmp_path: Path) -> None:
    write("a.json", when={"annotations": {"^of-pod$": "^1$", "^of-container$": "^2$"}}, stages=["poststop", "prestart"])
    made = request(
        tmp_path,
        config=container(annotations={"of-container": "2"}),
        sandbox=sandbox(annotations={"of-pod": "1"}),
        hooks=hooks,
    )
    spec = draft(made).spec
    assert spec.hooks is not None
    assert [hook.args for hook in (*spec.hooks.prestart, *spec.hooks.poststop)] == [["true", "a.json"]] * 2


def test_missing_folders_have_no_hooks(hooks: HooksDir) -> None:
    assert given(hooks) == []
    assert hooks.problems == {}
