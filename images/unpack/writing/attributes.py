"""Extended attributes of the files of a layer."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection

from images.unpack.tar.headers import Entry, TarError, shown

# New files in a folder inherit its default ACL, also as their own mode. So folders get it when the layer is complete.
DEFAULT_ACL = b"system.posix_acl_default"
AT_ONCE = (b"security.capability", b"system.posix_acl_access")


def set_attributes(entry: Entry, target: bytes | int, names: Collection[bytes] = AT_ONCE) -> None:
    """Set those of the entry's attributes that are in ``names``, and with AT_ONCE also those of users.

    Attributes that overlayfs would interpret are left out, and those that the file system does not support. Raises
    TarError if it supports no more of them.
    """
    for name, value in (entry.xattrs or {}).items():
        of_users = names is AT_ONCE and name.startswith(b"user.") and not name.startswith(b"user.overlay.")
        if name not in names and not of_users:
            continue
        try:
            os.setxattr(target, name, value, follow_symlinks=isinstance(target, int))
        except OSError as error:
            if error.errno == errno.ENOSPC and os.statvfs("/").f_bavail:
                raise TarError(
                    f"{shown(entry.name)} has more extended attributes than the file system supports"
                ) from error
            if error.errno not in (errno.ENOTSUP, errno.EPERM):
                raise
