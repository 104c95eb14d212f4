"""Which cgroups are frozen, and thawing them, in folders that look like those of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.cgroups.tree import CgroupTree


def group(root: Path, path: str, **files: str) -> Path:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")
    return folder


def test_version_2_by_itself_and_from_above(tmp_path: Path) -> None:
    tree = CgroupTree(2, "systemd", {"unified": tmp_path})
    pod = group(tmp_path, "pod", cgroup_freeze="0", cgroup_events="populated 1\nfrozen 0")
    scope = group(tmp_path, "pod/scope", cgroup_freeze="0", cgroup_events="populated 1\nfrozen 0")
    group(scope, "container", cgroup_freeze="0", cgroup_events="populated 1\nfrozen 0")
    assert not tree.is_frozen("/pod/scope/container")
    (scope / "cgroup.freeze").write_text("1\n")  # as the OCI runtime freezes it
    assert tree.is_frozen("/pod/scope/container")
    (scope / "container" / "cgroup.freeze").write_text("1\n")
    tree.thaw("/pod/scope/container")
    assert [(scope / name).read_text().strip() for name in ("cgroup.freeze", "container/cgroup.freeze")] == ["0", "0"]
    (scope / "cgroup.events").write_text("populated 1\nfrozen 1\n")  # from above
    assert tree.is_frozen("/pod/scope/container")
    (pod / "cgroup.freeze").write_text("1\n")
    tree.thaw("/pod/scope/container")
    assert (pod / "cgroup.freeze").read_text() == "1\n"
    assert tree.frozen_holder("/pod/scope/container") is None  # SIGKILL ends them there


@pytest.mark.parametrize("state", ["FROZEN", "FREEZING"])
def test_version_1_names_what_holds_the_dying(tmp_path: Path, state: str) -> None:
    tree = CgroupTree(1, "cgroupfs", {"freezer": tmp_path, "pids": tmp_path / "pids"})
    group(tmp_path, "pod", freezer_state=state, freezer_self_freezing="1")
    inner = group(tmp_path, "pod/container", freezer_state=state, freezer_self_freezing="0")
    nested = group(inner, "nested", freezer_state=state, freezer_self_freezing="1")
    assert tree.is_frozen("/pod/container")
    tree.thaw("/pod/container")
    assert (nested / "freezer.state").read_text().strip().startswith("THAWED")
    assert (inner / "freezer.state").read_text().strip() == state
    assert tree.frozen_holder("/pod/container") == str(tmp_path / "pod")
    assert tree.frozen_holder("/gone") is None
