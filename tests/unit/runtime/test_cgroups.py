"""The cgroups of pods and containers with either cgroup driver, on a tree of plain folders."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from host.errors import InvalidArgumentError
from runtime.cgroups import limits
from runtime.cgroups.slices import slice_path
from runtime.cgroups.tree import CgroupTree

SANDBOX, CONTAINER = "a" * 64, "b" * 64


def tree(driver: str, root: Path) -> CgroupTree:
    return CgroupTree(2, driver, {"unified": root})


@pytest.mark.parametrize(
    "parent",
    ["kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice"],
    ids=["by its name", "with its path, as kubelet gives it"],
)
def test_containers_of_a_slice_are_scopes(parent: str, tmp_path: Path) -> None:
    cgroups = tree("systemd", tmp_path)
    cgroups.validate_parent(parent)
    assert cgroups.runtime_path(parent, CONTAINER) == f"kubepods-pod1.slice:podkeel:{CONTAINER}"
    scope = f"/kubepods.slice/kubepods-pod1.slice/podkeel-{CONTAINER}.scope"
    assert cgroups.path(parent, CONTAINER, uses_subgroup=False) == scope
    assert cgroups.path(parent, CONTAINER, uses_subgroup=True) == f"{scope}/container"
    assert cgroups.parent_path(parent) == "/kubepods.slice/kubepods-pod1.slice"


@pytest.mark.parametrize("parent", ["/kubepods/pod1", "pod1", "/other.slice/kubepods-pod1.slice", "kubepods.slice/"])
def test_what_is_no_slice_is_refused_by_the_systemd_driver(parent: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="the systemd driver takes a slice"):
        tree("systemd", tmp_path).validate_parent(parent)


@pytest.mark.parametrize("parent", ["kubepods/pod1", "/kubepods/../pod1", "/kubepods.slice"])
def test_what_is_no_path_is_refused_by_the_cgroupfs_driver(parent: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="cgroupfs"):
        tree("cgroupfs", tmp_path).validate_parent(parent)


def test_slices_are_below_the_slices_of_their_prefix() -> None:
    assert slice_path("a-b-c.slice") == "/a.slice/a-b.slice/a-b-c.slice"
    assert slice_path("-.slice") == ""


@pytest.mark.parametrize(
    ("driver", "base", "parent", "folder"),
    [
        ("cgroupfs", "/podkeel", f"/podkeel/{SANDBOX}", f"podkeel/{SANDBOX}"),
        ("systemd", "/podkeel", f"podkeel-{SANDBOX}.slice", f"podkeel.slice/podkeel-{SANDBOX}.slice"),
        ("systemd", "own.slice", f"own-{SANDBOX}.slice", f"own.slice/own-{SANDBOX}.slice"),
    ],
)
def test_parents_of_pods_that_bring_none_are_found_again(
    driver: str, base: str, parent: str, folder: str, tmp_path: Path
) -> None:
    cgroups = tree(driver, tmp_path)
    assert cgroups.default_parents(base) == {}
    assert cgroups.default_parent(base, SANDBOX) == parent
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder).with_name("other").mkdir()
    assert cgroups.default_parents(base) == {SANDBOX: parent}
    assert tmp_path / cgroups.parent_path(parent).lstrip("/") == tmp_path / folder


def test_processes_below_a_cgroup_belong_to_it(tmp_path: Path) -> None:
    (tmp_path / "pod/container/own").mkdir(parents=True)
    (tmp_path / "pod/container/cgroup.procs").write_text("")
    (tmp_path / "pod/container/own/cgroup.procs").write_text("11\n12\n")
    assert tree("cgroupfs", tmp_path).processes("/pod/container") == [11, 12]
    assert tree("cgroupfs", tmp_path).processes("/pod/gone") == []


def test_what_an_update_would_change_is_read_first(tmp_path: Path) -> None:
    files = {"memory.high": "max", "memory.oom.group": "0", "memory.current": "12288", "hugetlb.2MB.max": "max"}
    files |= {"cpuset.cpus": "", "hugetlb.1GB.max": "1073741824"}
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
    (tmp_path / "memory.current").chmod(0o444)
    cgroups = tree("cgroupfs", tmp_path)
    assert limits.settings(cgroups, "/", [*files, "memory.none"]) == {
        name: files[name] for name in files if name not in ("memory.current", "cpuset.cpus")
    }
    found = limits.huge_page_limits(cgroups, "/", ["2MB", "1GB", "64KB"])
    assert found == {"2MB": 2**63 - 4096, "1GB": 1 << 30}
    assert limits.huge_page_limits(CgroupTree(1, "cgroupfs", {}), "/", ["2MB"]) == {}


def test_processes_that_chose_their_oom_score_adj_keep_it(tmp_path: Path) -> None:
    scores = (500, 500, 600, 500)  # of the first process, two of its children, and one that is not in the cgroup
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(subprocess.Popen(["sleep", "1000"])) for _ in scores]
        for child in children:
            stack.callback(child.kill)
        files = [Path(f"/proc/{child.pid}/oom_score_adj") for child in children]
        for file, score in zip(files, scores, strict=True):
            file.write_text(str(score))
        (tmp_path / "cgroup.procs").write_text("".join(f"{child.pid}\n" for child in children[:3]))
        cgroups = tree("cgroupfs", tmp_path)
        limits.set_oom_score_adj(cgroups, "/", children[3].pid, 700)
        limits.set_oom_score_adj(cgroups, "/", children[0].pid, 700)
        assert [int(file.read_text()) for file in files] == [700, 700, 600, 500]


@pytest.mark.parametrize(("driver", "lifted"), [("systemd", ("max", "max")), ("cgroupfs", ("5000 10000", "max"))])
def test_a_quota_is_lifted_from_the_scope_too(driver: str, lifted: tuple[str, str], tmp_path: Path) -> None:
    cgroups = tree(driver, tmp_path)
    path = cgroups.path("kubepods.slice" if driver == "systemd" else "/kubepods", CONTAINER, uses_subgroup=True)
    folder = tmp_path / path.lstrip("/")
    folder.mkdir(parents=True)
    for group in (folder.parent, folder):
        (group / "cpu.max").write_text("5000 10000")
    limits.lift_cpu_quota(cgroups, path)
    assert ((folder.parent / "cpu.max").read_text(), (folder / "cpu.max").read_text()) == lifted
