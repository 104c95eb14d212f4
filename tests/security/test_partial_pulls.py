"""A table of contents cannot bring other files into a layer, or show a registry what the node has of others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tests.integration.images.conftest import Node, new_node, node
from tests.integration.images.test_partial_pulls import any_speed, check_as_whole, front, layer, pulled, updated
from tests.support.chunked import ChunkedImage, chunked_image, zstd_chunked
from tests.support.registry import Registry
from tests.support.registry_front import Front, run_front

__all__ = ["any_speed", "front", "new_node", "node"]  # fixtures


async def test_a_false_table_of_contents_cannot_bring_in_other_files(
    node: Node, new_node: Callable[..., Awaitable[Node]], front: Front, registry: Registry
) -> None:
    """A file of the update has, as its table of contents says, the content of a kept file of the same size."""
    await pulled(node, front, chunked_image(layer(8)), registry, "1")
    tar = updated(8)

    def lie(entries: list[dict[str, object]]) -> None:
        kept = next(one for one in zstd_chunked(layer(8)).entries if one["name"] == "usr/share/file30")
        next(one for one in entries if one["name"] == "usr/share/file30")["digest"] = kept["digest"]

    update = ChunkedImage([tar], {"Cmd": ["sh"]}, compress=None, suffix="+zstd", packed=[zstd_chunked(tar, edit=lie)])
    image, fetched = await pulled(node, front, update, registry, "2")
    assert fetched >= len(update.packed[0].blob)
    await check_as_whole(node, new_node, front, image, "2")


async def test_files_of_another_registry_are_not_taken(node: Node, front: Front, registry: Registry) -> None:
    """The ranges that a pull asks for would show a registry what the node has of another one."""
    async with run_front(registry.host) as other:
        await pulled(node, other, chunked_image(layer(9)), registry, "1")
        _, fetched = await pulled(node, front, update := chunked_image(updated(9)), registry, "2")
        assert fetched >= len(update.packed[0].blob)
        await pulled(node, other, chunked_image(updated(9, mtime=5)), registry, "3")
        assert node.puller.reused_bytes > 0
