"""Extended attributes and access control lists of the files of layers."""

from __future__ import annotations

import os
import struct

from tests.integration.images.conftest import Node
from tests.integration.images.test_unpacking import unpacked
from tests.support.image_builder import entry, make_tar
from tests.support.raw_tar import Header, archive, file, pax, record

# user::rw-, user:1000:r--, group::r--, mask::r--, other::--- (acl(5), in the kernel's form)
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *item)
    for item in ((1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
)


async def test_folders_of_lower_layers_keep_their_attributes(node: Node) -> None:
    directory = Header(b"d", b"5", mode=b"0000750\0").encode()
    lower = archive(
        pax(
            record(b"SCHILY.xattr.user.note", b"kept\0\xff"),
            record(b"SCHILY.xattr.system.posix_acl_default", ACL),
        ),
        directory,
    )
    root = await unpacked(node, lower, make_tar([entry("d/f", "")]))
    assert os.getxattr(root / "d", "user.note") == b"kept\0\xff"
    assert os.getxattr(root / "d", "system.posix_acl_default") == ACL


async def test_access_control_lists_are_kept(node: Node) -> None:
    layer = archive(pax(record(b"SCHILY.xattr.system.posix_acl_access", ACL)), file(b"f", mode=b"0000640\0"))
    root = await unpacked(node, layer)
    assert os.getxattr(root / "f", "system.posix_acl_access") == ACL


async def test_default_access_control_lists_do_not_change_files_of_the_layer(node: Node) -> None:
    directory = Header(b"d", b"5", mode=b"0000755\0").encode()
    files = file(b"d/f", mode=b"0000666\0") + Header(b"d/e", b"5", mode=b"0000777\0").encode()
    layer = archive(pax(record(b"SCHILY.xattr.system.posix_acl_default", ACL)), directory, files)
    root = await unpacked(node, layer)
    assert os.getxattr(root / "d", "system.posix_acl_default") == ACL
    assert [oct((root / name).stat().st_mode & 0o777) for name in ("d/f", "d/e")] == ["0o666", "0o777"]
    for name in ("d/f", "d/e"):
        assert [attribute for attribute in os.listxattr(root / name) if "acl" in attribute] == []
