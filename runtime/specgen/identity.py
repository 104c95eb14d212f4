"""The user of a container: user, group, supplemental groups and home folder, from the image's own files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from host.errors import InvalidArgumentError
from images.image import numeric_user
from proto.runtime.v1 import cri_pb2
from runtime.specgen.mounts import openat2

MAX_ID = 2**32 - 2


@dataclass(frozen=True, slots=True)
class Identity:
    """The effective user; ``supplemental_groups`` begins with the primary group, as the process sees them."""

    uid: int
    gid: int
    supplemental_groups: tuple[int, ...]
    home: str


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str


def identify(context: cri_pb2.LinuxContainerSecurityContext, image_user: str, rootfs: Path) -> Identity:
    """Resolve the configuration's user, else the image's USER, else root, in passwd and group below ``rootfs``.

    A number is always an id, never the name of an account. Otherwise an image could name its root account ``1000`` and
    it would be mistaken for a user without privilege.
    """
    user, group = _wanted(context, image_user)
    passwd = openat2.read_file(rootfs, "etc/passwd")
    account = _find_account(passwd, user)
    if account is None and not _is_number(user):
        raise InvalidArgumentError(
            f"user {user!r} is not in the image's /etc/passwd: name one that it has, or set run_as_user to a number"
        )
    uid = account.uid if account else _identifier(user, "user")
    groups: bytes | None = None
    if group and not _is_number(group):
        groups = openat2.read_file(rootfs, "etc/group")
        gid = _find_group(groups, group)
    elif group:
        gid = _identifier(group, "group")
    else:
        gid = account.gid if account else 0
    supplemental = {_identifier(str(number), "supplemental group") for number in context.supplemental_groups}
    if account is not None and context.supplemental_groups_policy == cri_pb2.SupplementalGroupsPolicy.Merge:
        groups = openat2.read_file(rootfs, "etc/group") if groups is None else groups
        supplemental.update(_memberships(groups, account.name))
    supplemental.discard(gid)
    return Identity(uid, gid, (gid, *sorted(supplemental)), account.home if account else "/")


def _wanted(context: cri_pb2.LinuxContainerSecurityContext, image_user: str) -> tuple[str, str]:
    user = context.run_as_username
    if not user and context.HasField("run_as_user"):
        user = str(context.run_as_user.value)
        _identifier(user, "run_as_user")
    group = ""
    if context.HasField("run_as_group"):
        group = str(context.run_as_group.value)
        _identifier(group, "run_as_group")
        if not user:
            raise InvalidArgumentError(
                f"run_as_group {group} is set without a user: set run_as_user or run_as_username as well"
            )
    if not user:
        user, _, group = image_user.partition(":")
        if user != user.strip() or group != group.strip():
            # Otherwise one program would trim it and see root, and another would see a name.
            raise InvalidArgumentError(f"USER {image_user!r} of the image has spaces around a name: set run_as_user")
    return user or "0", group


def _is_number(text: str) -> bool:
    return numeric_user(text.removeprefix("-")) is not None


def _identifier(text: str, what: str) -> int:
    number = int(text)
    if text.startswith("-") or number > MAX_ID:
        raise InvalidArgumentError(f"{what} {text} is not an id: use a number from 0 to {MAX_ID}")
    return number


def _find_account(passwd: bytes, user: str) -> _Account | None:
    by_number = _is_number(user)
    wanted = str(_identifier(user, "user")) if by_number else user
    for fields in _entries(passwd, 7):
        if fields[2 if by_number else 0] == wanted:
            try:
                account = _Account(fields[0], int(fields[2]), int(fields[3] or "0"), fields[5])
            except ValueError:
                continue
            if not 0 <= account.uid <= MAX_ID or not 0 <= account.gid <= MAX_ID:
                raise InvalidArgumentError(
                    f"user {user!r} has an id out of range in the image's /etc/passwd: repair the image, "
                    "or set run_as_user and run_as_group to numbers"
                )
            home = account.home if account.home.startswith("/") else "/"
            return _Account(account.name, account.uid, account.gid, home)
    return None


def _find_group(groups: bytes, name: str) -> int:
    for fields in _entries(groups, 3):
        if fields[0] == name and _is_number(fields[2]):
            return _identifier(fields[2], f"group {name!r} of the image's /etc/group:")
    raise InvalidArgumentError(
        f"group {name!r} is not in the image's /etc/group: name one that it has, or set run_as_group to a number"
    )


def _memberships(groups: bytes, account: str) -> Iterator[int]:
    for fields in _entries(groups, 4):
        if account in fields[3].split(",") and _is_number(fields[2]):
            yield _identifier(fields[2], f"group {fields[0]!r} of the image's /etc/group:")


def _entries(content: bytes, fields: int) -> Iterator[list[str]]:
    """The lines of a passwd(5) or group(5) file that have at least that many fields."""
    for line in content.decode("utf-8", "replace").split("\n"):
        entry = line.split(":")
        if len(entry) >= fields and entry[0] and "\0" not in line:
            yield entry
