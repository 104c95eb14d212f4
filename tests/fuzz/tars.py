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

# Names that are in each other's way.
_CROWDED = (
    "a", "b", "c", "d", "l", "a/x", "a/y", "a/b", "b/x", "l/x", "l/y", "c/d", "c/d/e", "c/d/f", "a/b/c", "a/.wh.x",
    ".wh.a", "c/.wh..wh..opq", "a/b/c/d", "l/z/w", "./a/q", "./c/d/r",
)  # fmt: skip


def crowded_tar(generator: random.Random) -> bytes:
    """A tar whose entries have names that lead to each other: later ones replace, hide and link to earlier ones."""
    output = io.BytesIO()
    names = generator.sample(_CROWDED, generator.randrange(4, len(_CROWDED)))
    files = ["a"]
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for _ in range(generator.randrange(5, 60)):
            name = generator.choice(names) + (str(generator.randrange(30)) if generator.random() < 0.2 else "")
            entry = tarfile.TarInfo(name)
            is_folder = any(other.startswith(name + "/") for other in names)
            weights = (2, 26, 2, 1, 1) if is_folder else (26, 1, 2, 2, 1)
            kinds = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
            (entry.type,) = generator.choices(kinds, weights)
            entry.mode = generator.choice((0o644, 0o755, 0o4755, 0o700, 0o700, 0o2755))
            entry.uid, entry.gid = generator.choice((0, 0, 0, 1000)), generator.choice((0, 0, 0, 7))
            entry.mtime = generator.choice((0, 5, 10**9, 12.5))
            content = b""
            if entry.isreg():
                content = generator.randbytes(generator.choice((0, 1, 3, 511, 512, 5000, 40_000)))
                entry.size = len(content)
                files.append(name)
            elif entry.issym():
                entry.linkname = "/" + generator.choice(("a", "b", "c", "c/d", "b/new", "."))
            elif entry.islnk():
                entry.linkname = generator.choice(files)
            tar.addfile(entry, io.BytesIO(content))
    return output.getvalue()


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
