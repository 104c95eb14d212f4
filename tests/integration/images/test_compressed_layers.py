"""Layers compressed in several members or frames, and layers in unsupported compressions."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import struct
from functools import partial
from itertools import pairwise

import pytest
import zstandard

from host.errors import InvalidArgumentError
from tests.integration.images.conftest import Node
from tests.integration.images.test_odd_layers import as_compressed
from tests.integration.images.test_unpacking import refused, unpacked
from tests.support.image_builder import entry, make_tar


@pytest.mark.parametrize("form", ["xz", "bzip2", "lz4"])
async def test_other_compressions_are_named(node: Node, form: str) -> None:
    layer = make_tar([entry("a", "x")])
    packed = {"xz": lzma.compress(layer), "bzip2": bz2.compress(layer), "lz4": b"\x04\x22\x4d\x18" + layer}[form]
    assert f"it is compressed with {form}" in await refused(node, packed)
    assert (await unpacked(node, make_tar([entry("BZh91AY&.txt", "x")]))).is_dir()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("form", ["gzip", "zstd"])
async def test_members_and_frames_of_compressed_streams(node: Node, form: str, seed: int) -> None:
    """The layer is divided at random into members or frames. Some are empty, and some zstd frames are skippable."""
    layer = make_tar([entry("a", os.urandom(3000)), entry("b", "x")])
    chance = random.Random(seed)
    cuts = sorted(chance.sample(range(len(layer)), 5))
    parts = [layer[begin:end] for begin, end in pairwise([0, *cuts, cuts[-1], len(layer)])]
    skipped = struct.pack("<II", 0x184D2A50 + seed, 1 << 20) + os.urandom(1 << 20)
    packed = {
        "gzip": b"".join(map(gzip.compress, parts)) + bytes(512),
        "zstd": skipped.join([b"", *map(zstandard.compress, parts), b""]),
    }[form]
    root = await as_compressed(node, layer, lambda _: packed, f"+{form}")
    assert (root / "b").read_text() == "x"


@pytest.mark.parametrize("cut", [1, 4, 9, 300])
async def test_a_truncated_stream_is_reported_as_truncated(node: Node, cut: int) -> None:
    """What is left has the end of the tar, so only the stream itself says that something is missing."""
    layer = make_tar([entry("a", "x")]) + os.urandom(1000)
    checksum = zstandard.ZstdCompressor(write_checksum=True)
    for form, compress in (("gzip", gzip.compress), ("zstd", zstandard.compress), ("zstd", checksum.compress)):
        packed = compress(layer)[:-cut]
        with pytest.raises(InvalidArgumentError, match="its compressed stream is cut off"):
            await as_compressed(node, layer, partial(_instead, packed), f"+{form}")


def _instead(packed: bytes, layer: bytes) -> bytes:
    return packed
