"""Whiteouts that hide nothing, as written by tools that do not read the layers below."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.integration.images.conftest import Node
from tests.integration.images.test_unpacking import install
from tests.support.image_builder import entry, folder, make_tar


@pytest.mark.parametrize(
    "layers",
    [
        ([folder("x"), entry("x/.wh.y", ""), entry("x/k", "1")],),
        ([entry("a", "")], [folder("x"), entry("x/.wh.y", ""), entry("x/k", "1")], [entry("b", "")]),
        ([folder("x"), entry("x/y", "")], [entry("x/.wh..wh..opq", ""), entry("x/.wh.y", ""), entry("x/k", "")]),
        ([folder("x/s"), entry("x/s/y", "")], [entry("x/.wh..wh..opq", ""), entry("x/s/.wh.y", ""), entry("x/k", "")]),
        ([folder("x"), entry("x/y", "")], [entry(".wh..wh..opq", ""), entry("x/.wh.y", ""), entry("x/k", "")]),
        ([entry("x", "a file")], [folder("x"), entry("x/.wh.y", ""), entry("x/k", "")]),
    ],
)
async def test_needless_whiteouts_are_not_visible(node: Node, layers: tuple[list[Any], ...]) -> None:
    """overlayfs shows a whiteout in a folder that no layer below has. Such a folder could not be removed."""
    root = await install(node, *map(make_tar, layers))
    assert [path.name for path in (root / "x").iterdir() if path.name != "s"] == ["k"]
    shutil.rmtree(root / "x")
    assert not (root / "x").exists()


async def test_whiteouts_below_a_file_do_not_hide_the_file(node: Node) -> None:
    lower = make_tar([entry("a", "1"), entry("b", "2"), folder("d"), entry("d/x", ""), entry("d/y", "")])
    upper = make_tar([entry("a/.wh.x", ""), entry("b/c/.wh.x", ""), entry("none/.wh.x", ""), entry("d/.wh.x", "")])
    root = await install(node, lower, upper)
    assert ((root / "a").read_text(), (root / "b").read_text()) == ("1", "2")
    assert sorted(path.name for path in root.iterdir()) == ["a", "b", "d"]
    assert [path.name for path in (root / "d").iterdir()] == ["y"]


@pytest.mark.parametrize(
    "names",
    [
        ("d/.wh.sub", "d/sub/.wh.x"),
        ("d/sub/.wh.x", "d/.wh.sub"),
        (".wh.d", "d/.wh.sub", "d/sub/.wh.x"),
        ("d/sub/.wh.x", ".wh.d", "d/.wh.sub"),
        ("none/.wh.sub", "none/sub/.wh.x", "d/.wh.sub"),
        ("none/.wh.sub", "none/sub/.wh..wh..opq", "none/sub/deep/.wh.x", "d/.wh.sub"),
    ],
)
async def test_whiteouts_of_a_folder_and_of_files_in_it(node: Node, names: tuple[str, ...]) -> None:
    lower = make_tar([folder("d"), folder("d/sub"), entry("d/sub/x", ""), entry("d/sub/y", ""), entry("k", "")])
    root = await install(node, lower, make_tar([entry(name, "") for name in names]))
    assert sorted(path.name for path in root.iterdir()) == (["k"] if ".wh.d" in names else ["d", "k"])
    assert ".wh.d" in names or list((root / "d").iterdir()) == []


async def test_an_entry_in_a_folder_with_a_whiteout_makes_it_a_new_folder(node: Node) -> None:
    lower = make_tar([folder("d"), entry("d/x", ""), entry("d/y", "")])
    root = await install(node, lower, make_tar([entry("d/.wh.x", ""), entry(".wh.d", ""), entry("d/z", "1")]))
    assert [path.name for path in (root / "d").iterdir()] == ["z"]
