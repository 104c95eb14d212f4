"""The options of cri/; the other rooms have theirs in their own ``options.py``."""

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
    """Where exec, attach and port-forward streams are served, and how long they may be idle. Port 0 takes a free one.

    ``tls_certificate``, ``tls_key`` and ``tls_client_ca`` are PEM files: with the first two it is HTTPS, and all three
    are needed to listen elsewhere than on loopback. A stream without data for ``idle_seconds`` is ended (0: never);
    ``creation_seconds`` is how long a client may take to open all its streams.
    """

    address: ListenAddress = "127.0.0.1:0"
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    idle_seconds: Annotated[float, Meta(ge=0)] = 4 * 3600.0
    creation_seconds: Annotated[float, Meta(gt=0)] = 30.0


DEFAULT_METRICS_ADDRESS = "127.0.0.1:10351"


class MetricsOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where metrics and health are served over HTTP; an empty address serves neither.

    If the default is in use, for example by another agent of the node, they are not served; any other address must be
    free. With ``tls_certificate`` and ``tls_key``, PEM files, it is HTTPS; with ``tls_client_ca`` too, clients need a
    certificate that this authority signed.
    """

    address: OptionalListenAddress = DEFAULT_METRICS_ADDRESS
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""


class TracingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where traces of calls are sent, by OTLP over gRPC; an empty endpoint traces nothing.

    If the client's trace context says whether the call is traced, that counts. Of the other calls
    ``sampling_rate_per_million`` are traced. With ``tls`` the collector needs a certificate signed by ``tls_ca`` (PEM;
    empty: the host's authorities), and gets ``tls_certificate`` if it is set.
    """

    endpoint: OptionalListenAddress = ""
    sampling_rate_per_million: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    tls: bool = False
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""


class LogOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The log on standard error: its lowest level, and its form, text for people or JSON for collectors."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
