"""Random tars similar to layers: entries of every kind with unusual names, links, sizes and headers, then damaged."""

from __future__ import annotations

import io
import random
import tarfile

from tests.support.fuzz import changed

_NAMES = (
    "a", "b", "a/b", "a/b/c", "./a", "/a", "../a", "a/../b", "", ".", "..", "a/", "a//b", "x" * 100, "d/" * 60 + "f",
    "x" * 300, "ö", "a/.wh.b", ".wh.a", "a/.wh..wh..opq", ".wh..wh..opq", ".wh.", ".wh..wh.plnk", "a\n",
    "proc/self/fd/0", ".wh..wh.plnk/a", "a/.wh..wh.plnk/b",
)  # fmt: skip
_KINDS = (
    tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
    tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"Z", b"V",
)  # fmt: skip
_NUMBERS = (0, 0, 0, 1, 1000, 65535, 2**31, 2**32, 2**40, -1)
_RECORDS = (
    ("path", "\0"), ("path", ""), ("linkpath", "../../x"), ("size", "99999999999"), ("size", "-1"), ("mtime", "1e400"),
    ("mtime", "1.5"), ("uid", "99999999999999999999"), ("SCHILY.xattr.security.capability", "x"),
    ("GNU.sparse.major", "1"),
    ("GNU.sparse.map", "0,1,5,9"), ("GNU.sparse.size", "4"), ("GNU.sparse.realsize", "-4"), ("hdrcharset", "BINARY"),
)  # fmt: skip


def changed_tar(generator: random.Random) -> bytes:
    """A tar of a few entries. In half of all cases some of its bytes are changed."""
    output = io.BytesIO()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=output, mode="w", format=generator.choice(formats)) as tar:
        for _ in range(generator.randrange(1, 12)):
            entry = tarfile.TarInfo(generator.choice(_NAMES))
            entry.type = generator.choice(_KINDS)
            entry.linkname = generator.choice(_NAMES) if entry.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            content = generator.randbytes(generator.choice((0, 0, 1, 511, 512, 5000))) if entry.isreg() else b""
            entry.size = len(content)
            entry.mode = generator.choice((0, 0o644, 0o755, 0o4755, 0o7777))
            entry.uid, entry.gid = generator.choice(_NUMBERS), generator.choice(_NUMBERS)
            entry.mtime = generator.choice(_NUMBERS)
            entry.devmajor, entry.devminor = generator.choice((0, 1, 254)), generator.choice((0, 3, 2**20))
            if generator.random() < 0.3:
                entry.pax_headers = dict(generator.sample(_RECORDS, generator.randrange(1, 3)))
            try:
                tar.addfile(entry, io.BytesIO(content))
            except (ValueError, OverflowError, UnicodeError):  # this tar format cannot express it
                continue
    content = output.getvalue()
    return changed(generator, content) if generator.random() < 0.5 else content
