"""Makes a layer of kept bytes and of those that are missing, if that is less work than to fetch it whole."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from host.concurrency.threads import acquired, in_image_thread, in_long_thread
from host.errors import InvalidArgumentError
from images.chunked.places import TocPlace, announced, estargz_digest, estargz_place, kept_place
from images.chunked.plan import KeptBlob, Plan, Summary, make_plan, write_input
from images.chunked.ranges import PARALLEL, RangeFetcher
from images.chunked.records import ESTARGZ, LARGEST_TAIL, SKIPPABLE
from images.content.layer_source import LayerSource
from images.content.progress import Transfer
from images.content.slots import Slot
from images.oci import digests
from images.oci.manifests import Descriptor
from images.options import ImageOptions

_log = logging.getLogger("podkeel.images")

SMALLEST = 1 << 20  # bytes of a layer; a smaller one is fetched as fast as its table of contents.
_LARGEST_TOC = 1 / 4  # of the blob
_MOST_FETCHED = 0.8  # of the blob
_FIRST_END = 64 << 10  # bytes of an eStargz blob that are fetched to find its table of contents
_MOST_KEPT = 8  # blobs that are compared
_MOST_LOOKED_AT = 256
_UNPACK_RATE = 50 << 20  # bytes of a blob that are unpacked in a second: a faster network is of no use
UNPACK_SECONDS = 0.1  # to start
_FIRST_WINDOW = 14 << 10
_MEASURED = 64 << 10  # bytes from which the rate of a transfer says something


@dataclass(frozen=True, slots=True)
class Assembled:
    """A layer that can be put together. ``descriptor`` is what to expect: the original blob's, or its size alone."""

    descriptor: Descriptor
    chunks: Callable[[], AsyncGenerator[bytes, None]]


def may_be_partial(source: LayerSource) -> bool:
    """Whether the source can be asked for parts of the layer, and kept blobs may have the others."""
    related = source.related.near or source.related.far
    return bool(source.ranges is not None and related and source.descriptor.size >= SMALLEST)


@asynccontextmanager
async def assembled(
    options: ImageOptions, transfer: Transfer, slot: Slot, folder: Path, blob_path: Callable[[str], Path]
) -> AsyncIterator[Assembled | None]:
    """Provide the layer of ``transfer`` without fetching all of it; None if it must or should be fetched whole.

    ``folder`` is made for the files of the plan; the caller removes it. ``blob_path`` gives the path of a kept blob.
    Raises PodkeelError and OSError; then too the layer can be fetched whole.
    """
    source = transfer.source
    if announced(source.descriptor) is None and not estargz_digest(source.descriptor):
        yield None
        return
    async with AsyncExitStack() as stack:
        kept = await _open_kept(stack, source, blob_path)
        speed = _Speed()
        place, tail = await _fetch_toc(source, slot, speed) if kept else (None, [])
        if place is None:
            yield None
            return
        work, input_path = folder / "work", folder / "input"
        await in_image_thread(work.mkdir, mode=0o700, parents=True)
        await in_long_thread(_check_toc, place, tail, source.subject)
        await in_long_thread(write_input, input_path, place, tail, kept)
        summary = await make_plan(work, input_path, source.subject, options.max_layer_entries)
        if not _pays(place, summary, speed):
            _log.info("%s: partial pull: would not pay: %d bytes in %d ranges", *_facts(source, summary))
            yield None
            return
        plan = await acquired(in_image_thread, lambda: Plan(work, input_path, place, kept, summary.size), Plan.close)
        stack.callback(plan.close)
        ranges = await in_long_thread(plan.checked_ranges)
        if sum(end - begin for begin, end in ranges) != summary.fetched:
            raise InvalidArgumentError("the plan fetches other bytes than it says")
        _log.info("%s: partial pull: fetches %d bytes in %d ranges", *_facts(source, summary))
        digest = source.descriptor.digest if summary.exact else ""
        yield Assembled(
            Descriptor(source.descriptor.media_type, digest, summary.size),
            lambda: _chunks(transfer, slot, plan, ranges),
        )


def _facts(source: LayerSource, summary: Summary) -> tuple[str, int, int]:
    return source.subject, summary.fetched, summary.ranges


async def _open_kept(stack: AsyncExitStack, source: LayerSource, blob_path: Callable[[str], Path]) -> list[KeptBlob]:
    """The kept blobs to compare with, open until ``stack`` ends: those of the same repository first, then by size."""

    size = source.descriptor.size
    is_gzip = bool(estargz_digest(source.descriptor))

    def work() -> list[KeptBlob]:
        found: list[tuple[bool, float, int, KeptBlob]] = []
        near = set(source.related.near)
        names = [digest for digest in (*source.related.near, *source.related.far) if digest != source.descriptor.digest]
        with contextlib.ExitStack() as opened:
            for digest in names[:_MOST_LOOKED_AT]:
                with contextlib.suppress(FileNotFoundError):
                    descriptor = os.open(blob_path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    opened.callback(os.close, descriptor)
                    there = kept_place(descriptor)
                    if there is not None and (there.format == ESTARGZ) == is_gzip:
                        distance = abs(math.log(there.size / size))
                        found.append((digest not in near, distance, len(found), KeptBlob(descriptor, there)))
            chosen: list[KeptBlob] = []
            tails = 0
            for *_, blob in sorted(found, key=lambda one: one[:3]):
                tails += blob.place.size - blob.place.tail
                if len(chosen) == _MOST_KEPT or tails > LARGEST_TAIL:
                    break
                chosen.append(KeptBlob(os.dup(blob.descriptor), blob.place))
            return chosen

    def close(blobs: Sequence[KeptBlob]) -> None:
        for blob in blobs:
            os.close(blob.descriptor)

    kept = await acquired(in_image_thread, work, close)
    stack.callback(close, kept)
    return kept


class _Speed:
    """The measured latency of a request in seconds, and bytes in a second."""

    def __init__(self) -> None:
        self.latency = 0.0
        self.rate = math.inf


async def _fetch_toc(source: LayerSource, slot: Slot, speed: _Speed) -> tuple[TocPlace | None, list[bytes]]:
    """The place of the table of contents and the tail of the blob; None if it has none, or a large one."""
    place, size = announced(source.descriptor), source.descriptor.size
    tail: list[bytes] = []
    if place is None:
        tail = await _fetch_tail(source, max(0, size - _FIRST_END), size, slot, speed)
        place = estargz_place(b"".join(tail), size, estargz_digest(source.descriptor))
    if place is None or place.size - place.tail > place.size * _LARGEST_TOC:
        return None, []
    more = place.size - sum(map(len, tail)) - place.tail
    if more > 0:
        tail = [*await _fetch_tail(source, place.tail, place.tail + more, slot, speed), *tail]
    else:
        tail = [b"".join(tail)[-more:]]
    return place, tail


async def _fetch_tail(source: LayerSource, first: int, end: int, slot: Slot, speed: _Speed) -> list[bytes]:
    assert source.ranges is not None
    begin = time.monotonic()
    tail: list[bytes] = []
    async with contextlib.aclosing(slot.watched(source.ranges(first, end))) as chunks:
        async for chunk in chunks:
            if not tail:
                speed.latency = time.monotonic() - begin
            tail.append(chunk)
    received = sum(map(len, tail))
    seconds = time.monotonic() - begin - speed.latency
    if received >= _MEASURED and seconds > 0:
        speed.rate = received / seconds
    return tail


def _check_toc(place: TocPlace, tail: Sequence[bytes], subject: str) -> None:
    if place.format == ESTARGZ:
        return  # the planner checks it, as it must be decompressed before
    offset, size, _ = place.toc
    begin = offset - place.tail
    assert begin >= SKIPPABLE.size
    digests.verify(b"".join(tail)[begin : begin + size], place.digest, f"table of contents of {subject}")


def _pays(place: TocPlace, summary: Summary, speed: _Speed) -> bool:
    """Whether a partial pull moves clearly less, and takes no longer than unpacking or a whole pull does anyway.

    A connection sends more with each round trip, from 14 KiB on (RFC 6928), so a whole blob takes some of them too.
    """
    moved = summary.fetched + place.size - place.tail
    seconds = summary.fetched / speed.rate + summary.ranges / PARALLEL * speed.latency
    whole = place.size / speed.rate + speed.latency * (1 + max(0.0, math.log2(place.size / _FIRST_WINDOW)))
    unpacking = UNPACK_SECONDS + place.size / _UNPACK_RATE
    return moved <= _MOST_FETCHED * place.size and seconds <= max(whole, unpacking)


async def _chunks(
    transfer: Transfer, slot: Slot, plan: Plan, ranges: Sequence[tuple[int, int]]
) -> AsyncGenerator[bytes, None]:
    """The bytes of the planned blob, counted."""
    assert transfer.source.ranges is not None
    transfer.received = 0
    async with RangeFetcher(ranges, transfer.source.ranges) as fetcher:
        async with contextlib.aclosing(slot.watched(fetcher.chunks())) as fetched:
            while True:
                local, size = await in_image_thread(plan.local)
                if not local and not size:
                    return
                if local:
                    transfer.took(len(local), from_node=True)
                    yield local
                while size > 0:
                    chunk = await anext(fetched, b"")
                    if not chunk:
                        raise InvalidArgumentError("a range has other bytes than it should have")
                    size -= len(chunk)
                    transfer.took(len(chunk))
                    yield chunk
