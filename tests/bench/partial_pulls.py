"""Updates that change 5% of an image in zstd:chunked: pulled whole and in parts, from a registry on loopback.

Loopback is the worst case for partial pulls: what they do not fetch would have cost next to nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from host.database import Database
from images.images import Images
from images.options import ImageOptions
from images.schema import MIGRATIONS
from tests.bench.goals import Goal
from tests.support.chunked import chunked_image
from tests.support.registry import Registry, run_registry

_EVERY = 20  # files of which one changes


class UpdateCost(msgspec.Struct):
    """Seconds of each pull of an update, whole and in parts, and the share of its bytes that the latter moved."""

    whole: list[float] = []
    parts: list[float] = []
    moved: list[float] = []


def measure(folder: Path, layers: list[bytes], rounds: int) -> UpdateCost:
    """Two stores pull the image of ``layers``, then ``rounds`` updates of it, each store in turn."""
    with run_registry() as registry:
        size = _push(registry, layers, 0)
        for number in range(1, rounds + 1):
            size = _push(registry, [_changed(layer, number) for layer in layers], number)
        return asyncio.run(_measure(folder, registry, size, rounds))


def goals(cost: UpdateCost) -> list[Goal]:
    """The goals of partial pulls with the values of this run."""
    return [
        Goal("update of 5%: in parts / whole", min(cost.parts) / min(cost.whole), 1.1, "x"),
        Goal("update of 5%: moved bytes / all", max(cost.moved), 0.12, "x"),
    ]


def _push(registry: Registry, layers: list[bytes], number: int) -> int:
    image = chunked_image(*layers)
    registry.push(image, "bench/update", str(number))
    return sum(len(layer.blob) for layer in image.packed)


def _changed(tar: bytes, number: int) -> bytes:
    """The tar with other content in one of ``_EVERY`` files."""
    changed = bytearray(tar)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = [member for member in archive.getmembers() if member.isreg() and member.size]
    for member in members[number % _EVERY :: _EVERY]:
        content = random.Random(f"{number} {member.name}").randbytes(member.size)
        changed[member.offset_data : member.offset_data + member.size] = content
    return bytes(changed)


@contextlib.asynccontextmanager
async def _store(folder: Path, *, partial_pulls: bool) -> AsyncIterator[Images]:
    folder.mkdir(parents=True)
    database = Database(folder / "podkeel.db", {"images": MIGRATIONS})
    images = Images(ImageOptions(partial_pulls=partial_pulls), folder, database)
    await images.start()
    try:
        yield images
    finally:
        await images.close()
        database.close()


async def _measure(folder: Path, registry: Registry, size: int, rounds: int) -> UpdateCost:
    cost = UpdateCost()
    async with (
        _store(folder / "whole", partial_pulls=False) as whole,
        _store(folder / "parts", partial_pulls=True) as parts,
    ):
        pairs = [(whole, cost.whole), (parts, cost.parts)]
        for number in range(rounds + 1):
            for images, seconds in pairs if number % 2 else reversed(pairs):
                before = images.puller.fetched_bytes
                begin = time.perf_counter()
                await images.puller.pull(f"{registry.host}/bench/update:{number}")
                if number:
                    seconds.append(time.perf_counter() - begin)
                    if images is parts:
                        cost.moved.append((images.puller.fetched_bytes - before) / size)
    return cost
