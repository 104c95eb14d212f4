"""The hosts for an image, in order, and their settings: ``<folder>/<registry>/hosts.toml`` in containerd's format.

Document: containerd's docs/hosts.md. The file is read on each pull, so that a change needs no restart.
"""

from __future__ import annotations

import re
import ssl
import tomllib
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from host import untrusted_json
from host.errors import InvalidArgumentError
from images.oci.reference import DEFAULT_DOMAIN
from images.options import ImageOptions
from images.registry.redirects import origin_of

DOCKER_HUB = "registry-1.docker.io"
_ALL = frozenset(("pull", "resolve", "push"))
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class RegistryHost:
    """One host. ``base`` is the address of its API, such as ``https://registry.k8s.io/v2``."""

    base: str
    capabilities: frozenset[str] = _ALL
    ca: tuple[Path, ...] = ()
    client: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    connect_seconds: float = 0.0
    mirror: bool = False
    origin: str = ""  # the file that configures it

    @property
    def address(self) -> str:
        """``host`` or ``host:port``."""
        return urlsplit(self.base).netloc

    def tls(self, *, with_client: bool = True) -> ssl.SSLContext:
        """The TLS settings for the host, with or without its client certificate. Blocks: it reads files.

        Raises InvalidArgumentError for a file that cannot be used.
        """
        context = ssl.create_default_context()
        # Python 3.13 sets this flag, which refuses private authorities without key usage; containerd accepts them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        for path in self.ca:
            try:
                context.load_verify_locations(path)
            except OSError as error:
                raise InvalidArgumentError(
                    f"registry host {self.address}: ca {path} cannot be used: {error}"
                ) from error
        for certificate, key in self.client if with_client else ():
            try:
                context.load_cert_chain(certificate, key)
            except OSError as error:
                raise InvalidArgumentError(
                    f"registry host {self.address}: client certificate {certificate} cannot be used: {error}"
                ) from error
        return context


@dataclass(slots=True)
class _Place:
    """The configuration file of one registry, for relative paths and messages."""

    file: Path
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.file.parent

    def wrong(self, what: str) -> InvalidArgumentError:
        """An error naming the file."""
        return InvalidArgumentError(f"registry configuration {self.file}: {what}")


def hosts_for(domain: str, options: ImageOptions) -> list[RegistryHost]:
    """The hosts for images of ``domain``, in the order to try them; blocks.

    Raises InvalidArgumentError for a malformed file, naming it, and for a ``domain`` that is no address.
    """
    _check_address(domain)
    default = RegistryHost(_default_base(domain, options))
    folder = _folder_for(domain, Path(options.registry_config_dir))
    if folder is None:
        return [default]
    file = folder / "hosts.toml"
    try:
        content = tomllib.loads(untrusted_json.read_file(file).decode())
    except FileNotFoundError:
        return [_with_certificates(default, folder)]
    except (ValueError, OSError, RecursionError) as error:
        raise InvalidArgumentError(f"registry configuration {file}: {error}") from error
    place = _Place(file)
    tables = content.get("host", {})
    if not isinstance(tables, dict):
        raise place.wrong("host is not a table")
    server = content.get("server", "") or default.base
    if not isinstance(server, str):
        raise place.wrong("server is not a string")
    own = _host(server, {key: value for key, value in content.items() if key != "host"}, place, mirror=False)
    hosts = []
    for address, table in tables.items():
        host = _host(address, table, place, mirror=True)
        # The file may list the registry itself, to set its options. Then it is no mirror.
        itself = host.address in (domain, default.address) or _same(host, default) or _same(host, own)
        hosts.append(replace(host, mirror=not itself))
    return hosts if any(_same(host, own) for host in hosts) else [*hosts, own]


def _same(one: RegistryHost, other: RegistryHost) -> bool:
    """Whether both are one address, which may name its default port."""
    return origin_of(one.base) == origin_of(other.base) and urlsplit(one.base).path == urlsplit(other.base).path


def is_loopback(domain: str) -> bool:
    """Whether the host of ``domain`` is this machine."""
    host = urlsplit(f"//{domain}").hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check_address(domain: str) -> None:
    """Check ``domain``, because the grammar of references allows invalid ports and IPv6 addresses."""
    try:
        parts = urlsplit(f"//{domain}")
        if parts.netloc.startswith("["):
            IPv6Address(parts.hostname or "")
        usable = parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InvalidArgumentError(f"registry {domain!r} is not an address: check host and port of the reference")


def _default_base(domain: str, options: ImageOptions) -> str:
    if domain == DEFAULT_DOMAIN:
        return f"https://{DOCKER_HUB}/v2"
    plain = is_loopback(domain) or domain in options.insecure_registries
    plain = plain or (urlsplit(f"//{domain}").hostname or "") in options.insecure_registries
    return f"{'http' if plain else 'https'}://{domain}/v2"


def _folder_for(domain: str, root: Path) -> Path | None:
    host, colon, port = domain.rpartition(":")
    names = [f"{host}_{port}_"] if colon and port.isdigit() else []
    for name in (*names, domain, "_default"):
        if (root / name).is_dir():
            return root / name
    return None


def _with_certificates(host: RegistryHost, folder: Path) -> RegistryHost:
    """The host with docker's older files: ``*.crt`` are authorities, ``*.cert`` with ``*.key`` client certificates."""
    client = tuple((path, path.with_suffix(".key")) for path in sorted(folder.glob("*.cert")))
    return RegistryHost(host.base, ca=tuple(sorted(folder.glob("*.crt"))), client=client, origin=str(folder))


def _host(address: str, table: Any, place: _Place, *, mirror: bool) -> RegistryHost:
    if not isinstance(table, dict):
        raise place.wrong(f'host."{address}" is not a table')
    try:
        url = urlsplit(address if "://" in address else f"https://{address}")
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise place.wrong(f"{address!r} is not an http or https address")
    path = url.path.rstrip("/")
    if not _flag(table, "override_path", place) and not path.endswith("/v2"):
        path += "/v2"
    capabilities = frozenset(_strings(table.get("capabilities", sorted(_ALL)), place, "capabilities"))
    if not capabilities <= _ALL:
        raise place.wrong(f"unknown capabilities {', '.join(sorted(capabilities - _ALL))}")
    headers = []
    given = table.get("header", {})
    if not isinstance(given, dict):
        raise place.wrong("header is not a table")
    for name, value in given.items():
        if not _HEADER_NAME.fullmatch(name):
            raise place.wrong(f"{name!r} is not the name of a header")
        items = _strings(value, place, f"header {name}")
        if not all(item.isprintable() for item in items):
            raise place.wrong(f"header {name} holds characters that no header may have")
        headers += [(name, item) for item in items]
    netloc = url.netloc.rpartition("@")[2]  # without user and password, which would appear in errors and logs
    return RegistryHost(
        f"{url.scheme}://{netloc}{path}",
        capabilities,
        tuple(place.folder / item for item in _strings(table.get("ca", ()), place, "ca")),
        _client(table.get("client", ()), place),
        _flag(table, "skip_verify", place),
        tuple(headers),
        _seconds(table.get("dial_timeout", "0s"), place),
        mirror,
        str(place.file),
    )


def _flag(table: dict[str, Any], key: str, place: _Place) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):  # the string "false" would count as true
        raise place.wrong(f"{key} is neither true nor false: {value!r}")
    return value


def _client(value: Any, place: _Place) -> tuple[tuple[Path, Path | None], ...]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        value = [value]
    pairs: list[tuple[Path, Path | None]] = []
    for item in value:
        if isinstance(item, str):
            pairs.append((place.folder / item, None))
        elif isinstance(item, list) and len(item) in (1, 2) and all(isinstance(part, str) for part in item):
            pairs.append((place.folder / item[0], place.folder / item[1] if len(item) == 2 and item[1] else None))
        else:
            raise place.wrong("client is neither a file, a list of files nor a list of pairs")
    return tuple(pairs)


def _strings(value: Any, place: _Place, key: str) -> list[str]:
    items = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else None
    if items is None or not all(isinstance(item, str) for item in items):
        raise place.wrong(f"{key} is neither a string nor a list of strings")
    return items


def _seconds(value: Any, place: _Place) -> float:
    parts = _DURATION.findall(value) if isinstance(value, str) else []
    if not parts and value not in ("0", "0s"):
        raise place.wrong(f"dial_timeout {value!r} is not a duration such as 5s")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
