"""The contents of a pod's resolv.conf and hosts files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path

from host.errors import InvalidArgumentError

MAX_SEARCHES = 32
MAX_SEARCH_CHARACTERS = 2048

_HOST_RESOLV_CONF = Path("/etc/resolv.conf")
_HOST_HOSTS = Path("/etc/hosts")

_LOCAL_NAMES = (
    ("127.0.0.1", "localhost"),
    ("::1", "localhost ip6-localhost ip6-loopback"),
    ("fe00::", "ip6-localnet"),
    ("ff00::", "ip6-mcastprefix"),
    ("ff02::1", "ip6-allnodes"),
    ("ff02::2", "ip6-allrouters"),
)


def resolv_conf(
    servers: Sequence[str], searches: Sequence[str], options: Sequence[str], *, host_file: Path = _HOST_RESOLV_CONF
) -> str:
    """The text of a resolv.conf(5). Without any values it is the node's own.

    Raises InvalidArgumentError for a value that is not an address, domain or option, and for more search domains than
    resolvers read (32 with 2,048 characters together).
    """
    if not (servers or searches or options):
        return _text_of(host_file)
    for server in servers:
        try:
            ip_address(server)
        except ValueError as error:
            raise InvalidArgumentError(f"DNS server: {error}") from error
    _check_words("DNS search domain", searches)
    _check_words("DNS option", options)
    if len(searches) > MAX_SEARCHES or len(" ".join(searches)) > MAX_SEARCH_CHARACTERS:
        raise InvalidArgumentError(
            f"{len(searches)} DNS search domains of {len(' '.join(searches))} characters: resolvers read at most "
            f"{MAX_SEARCHES} of {MAX_SEARCH_CHARACTERS} characters together"
        )
    lines = [f"search {' '.join(searches)}"] if searches else []
    lines += [f"nameserver {server}" for server in servers]
    lines += [f"options {' '.join(options)}"] if options else []
    return "\n".join(lines) + "\n"


def hosts_file(
    hostname: str, addresses: Sequence[str], *, host_network: bool = False, host_file: Path = _HOST_HOSTS
) -> str:
    """The text of a hosts(5) file: localhost, and the pod's name at its addresses. A host pod gets the node's own."""
    if host_network:
        return _text_of(host_file)
    entries = [*_LOCAL_NAMES, *((address, hostname) for address in addresses)]
    return "".join(f"{address}\t{names}\n" for address, names in entries)


def _check_words(what: str, words: Iterable[str]) -> None:
    for word in words:
        if not word or not word.isprintable() or len(word.split()) != 1 or word.split()[0] != word:
            raise InvalidArgumentError(f"{what} {word!r} is not one word")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
