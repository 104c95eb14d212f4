"""The options of the gRPC surface; the other rooms keep theirs in their own ``options.py``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

UnixSocket = Annotated[
    str, Meta(pattern=r"^unix:///[^\0]+\Z", description='a unix socket such as "unix:///run/podkeel/podkeel.sock"')
]
ListenAddress = Annotated[
    str,
    Meta(
        pattern=r"^(\[[0-9a-fA-F:.%]+\]|[^\[\]:]+):\d{1,5}\Z",
        description='an address with a port such as "127.0.0.1:0" or "[::1]:10350"',
    ),
]
OptionalListenAddress = Annotated[
    str,
    Meta(
        pattern=r"^((\[[0-9a-fA-F:.%]+\]|[^\[\]:]+):\d{1,5})?\Z",
        description='an address with a port such as "127.0.0.1:10351", or "" for none',
    ),
]


class ServerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the CRI is served.

    ``socket`` follows ``runtime.run_dir`` when only that is given.
    """

    socket: UnixSocket = "unix:///run/podkeel/podkeel.sock"


class StreamingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where exec, attach and port-forward streams are served; port 0 takes a free one."""

    address: ListenAddress = "127.0.0.1:0"


class MetricsOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where metrics and health are served over HTTP; an empty address serves neither.

    With ``tls_certificate`` and ``tls_key``, PEM files, it is HTTPS.
    """

    address: OptionalListenAddress = ""
    tls_certificate: str = ""
    tls_key: str = ""


class LogOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the agent writes to standard error: from which level on, as text for people or JSON for collectors."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
