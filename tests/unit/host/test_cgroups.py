"""The abilities of the machine's cgroups, read from the mounts, for each version and for both together."""

from __future__ import annotations

from pathlib import Path

import pytest

from host.cgroups import Hierarchies, discover
from runtime.cgroups.tree import CgroupTree
from runtime.specgen.node_facts import probe_node


def unified(root: Path, controllers: str, *, swap: bool = True, cgroup: str = "system.slice") -> Hierarchies:
    (root / cgroup).mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "cgroup.controllers").write_text(controllers)
    for name in ("memory.max", *(["memory.swap.max"] if swap else [])):
        (root / cgroup / name).touch()
    return Hierarchies({}, str(root))


def legacy(root: Path, *controllers: str) -> Hierarchies:
    for name in controllers:
        (root / name).mkdir()
    return Hierarchies({name: str(root / name) for name in controllers}, None)


def huge_pages(root: Path, *kibibytes: int) -> str:
    for size in kibibytes:
        (root / f"hugepages-{size}kB").mkdir(parents=True)
    return str(root)


@pytest.mark.parametrize(
    ("v1", "mounted", "version"),
    [
        ({"memory": "/m", "pids": "/p"}, None, 1),
        ({"memory": "/m", "name=systemd": "/s"}, "/unified", 1),
        ({"name=systemd": "/s"}, "/unified", 2),  # only systemd's own hierarchy is of version 1
        ({}, "/sys/fs/cgroup", 2),
        ({}, None, 1),
    ],
)
def test_the_version_is_that_of_the_memory_controller(v1: dict[str, str], mounted: str | None, version: int) -> None:
    hierarchies = Hierarchies(v1, mounted)
    assert hierarchies.version == version
    tree = CgroupTree.of_host("cgroupfs", hierarchies)
    assert tree.version == version
    assert set(tree.mounts) == ({"unified"} if version == 2 else {*v1, *(["hybrid"] if mounted else [])})


def test_all_callers_get_the_same_cgroup_version() -> None:
    hierarchies = discover()
    assert probe_node(hierarchies).cgroup_version == CgroupTree.of_host("auto").version == hierarchies.version


def test_controllers(tmp_path: Path) -> None:
    assert unified(tmp_path, "cpu memory pids\n").controllers() == {"cpu", "memory", "pids"}
    assert Hierarchies({}, str(tmp_path / "gone")).controllers() == frozenset()
    assert Hierarchies({"memory": "/m"}, str(tmp_path)).controllers() == {"memory"}


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("own", ["0::/system.slice\n", "0::/\n", "1:name=x:/y\n0::/empty\n", ""])
def test_swap_of_version_2_is_found_in_a_cgroup_with_the_controller(tmp_path: Path, swap: bool, own: str) -> None:
    (tmp_path / "own").write_text(own)
    assert unified(tmp_path / "cgroup", "memory", swap=swap).counts_swap(str(tmp_path / "own")) == swap


def test_no_swap_without_the_memory_controller(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu")
    assert not Hierarchies({}, str(tmp_path)).counts_swap()
    assert not legacy(tmp_path, "pids").counts_swap()


@pytest.mark.parametrize("swap", [True, False])
def test_swap_of_version_1_is_found_at_the_mount_of_the_controller(tmp_path: Path, swap: bool) -> None:
    hierarchies = legacy(tmp_path, "memory", "pids")
    if swap:
        (tmp_path / "memory/memory.memsw.limit_in_bytes").touch()
    assert hierarchies.counts_swap() == swap


def test_huge_pages_can_be_limited_only_with_their_controller(tmp_path: Path) -> None:
    folder = huge_pages(tmp_path / "pages", 64, 2048, 1 << 20)
    with_it, without = unified(tmp_path / "with", "memory hugetlb"), unified(tmp_path / "without", "memory")
    assert with_it.huge_page_sizes(folder) == {"64KB", "2MB", "1GB"}
    assert without.huge_page_sizes(folder) == frozenset()
    (tmp_path / "v1").mkdir()
    assert legacy(tmp_path / "v1", "memory", "hugetlb").huge_page_sizes(folder) == {"64KB", "2MB", "1GB"}
    assert with_it.huge_page_sizes(str(tmp_path / "none")) == frozenset()
