"""Whatever bytes a layer has, the tar reader and the layer writer raise only what they say.

``PODKEEL_FUZZ_SECONDS`` makes it go on for longer. Examples that fail are kept by hypothesis and tried first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.raw_tar import Header, archive, base256, file, padded, pax, record

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

SECONDS = float(os.environ.get("PODKEEL_FUZZ_SECONDS", "8"))
PARTS = st.sampled_from([b"a", b"b", b"c", b"..", b".", b"", b".wh.a", b".wh..wh..opq", b".wh..", b"n" * 250, b"\xff"])
NAMES = st.lists(PARTS, min_size=1, max_size=20).map(b"/".join)
KINDS = st.sampled_from([b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"Z"])
NUMBERS = st.one_of(
    st.integers(0, 0o7777777).map(lambda number: b"%07o\0" % number),
    st.integers(-(1 << 55), (1 << 55) - 1).map(lambda number: base256(number, 8)),
    st.binary(min_size=8, max_size=8),
)
TIMES = st.one_of(st.just(b"00000000005\0"), st.integers(-(1 << 87), (1 << 87) - 1).map(lambda n: base256(n, 12)))
VALUES = st.one_of(NAMES, st.integers(-(1 << 70), 1 << 70).map(lambda number: b"%d" % number), st.binary(max_size=30))
KEYS = st.sampled_from(
    [
        *(b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"GNU.sparse.major", b"GNU.sparse.minor"),
        *(b"GNU.sparse.map", b"GNU.sparse.size", b"GNU.sparse.realsize", b"GNU.sparse.name", b"GNU.sparse.offset"),
        *(b"GNU.sparse.numbytes", b"SCHILY.xattr.user.a", b"SCHILY.xattr.security.capability", b"SCHILY.xattr."),
        *(b"SCHILY.xattr.system.posix_acl_access", b"SCHILY.xattr.trusted.overlay.opaque", b"SCHILY.xattr.user.a\0"),
    ]
)


@st.composite
def entries(draw: st.DrawFn) -> bytes:
    """One entry, often with an extended header or a long name before it."""
    made = b""
    name = draw(NAMES)
    if draw(st.booleans()):
        records = [record(key, value) for key, value in draw(st.lists(st.tuples(KEYS, VALUES), max_size=4))]
        made += pax(*records, kind=draw(st.sampled_from([b"x", b"g"])))
    if len(name) > 100 or draw(st.booleans()):
        made += file(b"././@LongLink", name + b"\0", kind=b"L")
    content = draw(st.binary(max_size=700))
    header = Header(
        *(name[:100], draw(KINDS), draw(st.sampled_from([len(content), 0, 600]))),
        *(draw(NUMBERS), draw(NUMBERS), draw(NUMBERS), draw(TIMES), draw(NAMES)[:100]),
        major=draw(NUMBERS),
        minor=draw(NUMBERS),
        prefix=draw(NAMES)[:155],
    )
    return made + header.encode() + padded(content)


@pytest.fixture(scope="module")
def unpack() -> Iterator[Callable[[bytes], str]]:
    command = [sys.executable, "-m", "tests.security.tar_fuzzer"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as worker:
        to, answers = worker.stdin, worker.stdout
        assert to is not None
        assert answers is not None

        def one(data: bytes) -> str:
            to.write(len(data).to_bytes(8, "big") + data)
            to.flush()
            return answers.readline().decode().strip()

        yield one
        to.close()


def test_unpacking_raises_only_what_it_says(unpack: Callable[[bytes], str]) -> None:
    end = time.monotonic() + SECONDS

    @settings(max_examples=100_000 if SECONDS > 60 else 400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(entries(), min_size=1, max_size=6), st.integers(0, 600), st.booleans())
    def tried(made: list[bytes], cut: int, whole: bool) -> None:
        if time.monotonic() < end:
            data = archive(*made)
            assert unpack(data if whole else data[: len(data) - cut]) == "ok"

    tried()
