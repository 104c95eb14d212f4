"""The node's registry credentials: a file in the format of docker's ``config.json``, and its credential helpers.

Documents: docker's "docker login" (``auths``, ``credHelpers``, ``credsStore``); docker-credential-helpers' protocol:
``docker-credential-NAME get`` reads an address from standard input and prints JSON.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import msgspec

from host import processes, untrusted_json
from host.concurrency.threads import in_image_thread
from host.errors import InvalidArgumentError, PodkeelError
from host.untrusted_json import JsonError
from images.options import ImageOptions
from images.registry.credentials import Credentials

T = TypeVar("T")

DOCKER_HUB_NAMES = ("index.docker.io", "docker.io", "registry-1.docker.io")

_log = logging.getLogger("podkeel.images")

_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ANSWER_LIMIT = 1 << 20
_MAX_FILE_BYTES = 4 << 20


class _Entry(msgspec.Struct):
    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None
    registrytoken: str | None = None

    def credentials(self) -> Credentials:
        """The entry as Credentials."""
        return Credentials(
            self.username or "",
            self.password or "",
            self.auth or "",
            self.identitytoken or "",
            self.registrytoken or "",
        )


class _File(msgspec.Struct, rename="camel"):
    auths: dict[str, _Entry | None] | None = None
    cred_helpers: dict[str, str | None] | None = None
    creds_store: str | None = None


class _HelperAnswer(msgspec.Struct, rename="pascal"):
    username: str = ""
    secret: str = ""


@dataclass(frozen=True, slots=True)
class FoundCredentials:
    """Credentials for one host, or None. ``origin`` names their source, or the reason why there are none."""

    credentials: Credentials | None
    origin: str


async def find_credentials(options: ImageOptions, addresses: Sequence[str], path: str) -> FoundCredentials:
    """The node's credentials for a host with these ``addresses`` (``host`` or ``host:port``) and repository ``path``.

    The helper for this host is used first, then an entry of the file, then the helper for all hosts. If a helper fails
    or is too slow, no credentials are used, because the image may be public. Raises InvalidArgumentError for a
    malformed file.
    """
    file = Path(options.credentials_file)
    content = await in_image_thread(_read, file) if options.credentials_file else None
    if content is None:
        return FoundCredentials(None, "none are configured")
    helpers = {key: name for key, name in (content.cred_helpers or {}).items() if name}
    helper = _best(helpers, addresses, path)
    if helper is not None:
        return await _run_helper(helper[1], helper[0], options.credential_helper_seconds)
    entries = {key: entry.credentials() for key, entry in (content.auths or {}).items() if entry is not None}
    usable = {key: credentials for key, credentials in entries.items() if credentials != Credentials()}
    entry = _best(usable, addresses, path)
    if entry is not None:
        return FoundCredentials(entry[1], f"{file}, entry {entry[0]}")
    if content.creds_store:
        key = _DOCKER_HUB_KEY if addresses[0] in DOCKER_HUB_NAMES else addresses[0]
        return await _run_helper(content.creds_store, key, options.credential_helper_seconds)
    return FoundCredentials(None, f"{file} has none for {addresses[0]}")


def _read(file: Path) -> _File | None:
    try:
        return untrusted_json.decode(untrusted_json.read_file(file, _MAX_FILE_BYTES), _File, max_bytes=_MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (JsonError, OSError) as error:
        raise InvalidArgumentError(f"registry credentials {file} cannot be used: {error}") from error


def _best(table: Mapping[str, T], addresses: Sequence[str], path: str) -> tuple[str, T] | None:
    """The entry for one of the addresses that has the longest path. An exact host is preferred to a pattern."""
    best: tuple[int, bool] | None = None
    chosen: tuple[str, T] | None = None
    for key, value in table.items():
        host, _, prefix = _normalized(key).partition("/")
        if prefix and not f"{path}/".startswith(f"{prefix}/"):
            continue
        exact = host in addresses
        rank = (len(prefix), exact)
        if (exact or any(_host_matches(host, address) for address in addresses)) and (best is None or rank > best):
            best, chosen = rank, (key, value)
    return chosen


def _normalized(key: str) -> str:
    """The host and path of an entry's key: ``https://index.docker.io/v1/`` becomes ``index.docker.io``."""
    plain = key.rpartition("://")[2].rstrip("/")
    return re.sub(r"/v[12]\Z", "", plain)


def _host_matches(pattern: str, address: str) -> bool:
    """Whether ``pattern`` with ``*`` and ``?`` matches label by label: ``*.example`` does not match ``a.b.example``."""
    labels, others = pattern.split("."), address.split(".")
    return len(labels) == len(others) and all(map(fnmatchcase, others, labels))


async def _run_helper(helper: str, server: str, seconds: float) -> FoundCredentials:
    program = f"docker-credential-{helper}"
    try:
        if not _HELPER_NAME.fullmatch(helper):
            raise InvalidArgumentError(f"{helper!r} is not the name of a helper")
        done = await processes.run(
            (program, "get"), stdin=server.encode(), timeout=seconds, check=False, limit=_ANSWER_LIMIT
        )
    except (PodkeelError, OSError) as error:
        return _failed(program, str(error))
    if done.status == 0:
        return _decode_answer(program, done.stdout)
    output = (done.stdout.strip() or done.stderr.strip()).decode(errors="replace")[:200]
    if "credentials not found" in output:
        return FoundCredentials(None, f"{program} has none for {server}")
    return _failed(program, f"it ended with status {done.status}: {output}")


def _decode_answer(program: str, output: bytes) -> FoundCredentials:
    try:
        answer = untrusted_json.decode(output, _HelperAnswer)
    except JsonError:
        return _failed(program, "its answer is not understood")  # not quoted: it may hold a secret
    if answer.username == "<token>":
        return FoundCredentials(Credentials(identity_token=answer.secret), program)
    return FoundCredentials(Credentials(username=answer.username, password=answer.secret), program)


def _failed(program: str, reason: str) -> FoundCredentials:
    _log.warning("credential helper %s: %s", program, reason)
    return FoundCredentials(None, f"{program} failed: {reason}")
