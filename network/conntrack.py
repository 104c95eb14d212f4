"""Forgetting UDP flows to host ports: the kernel would keep sending them where they went before the port changed."""

from __future__ import annotations

import logging
import struct
from collections.abc import Collection, Iterable

from network.attachment import PortMapping
from network.netlink import NLM_F_DUMP, Message, NetlinkSocket, attribute, attributes, nested

_log = logging.getLogger("podkeel.network")

_SUBSYSTEM = 1
_GET = _SUBSYSTEM << 8 | 1
_DELETE = _SUBSYSTEM << 8 | 2
_TUPLE_ORIG = 1
_TUPLE_PROTO = 2
_PROTO_NUM = 1
_PROTO_DST_PORT = 3
_ZONE = 18
_FILTER = 25
_FILTER_ORIG_FLAGS = 1
_FLAG_PROTO_NUM = 1 << 3
_FLAG_DST_PORT = 1 << 5
_UDP = 17
_FAMILIES = {4: 2, 6: 10}
_ASKED_ONE_BY_ONE = 2


def forget_udp(netfilter: NetlinkSocket, mappings: Iterable[PortMapping], versions: Iterable[int] = (4, 6)) -> None:
    """Delete the flows whose first packet went to one of the UDP host ports; a kernel that cannot is only logged.

    ``versions`` are the IP versions in which the pod has an address.
    """
    ports = sorted({mapping.host_port for mapping in mappings if mapping.protocol == "udp"})
    # Each question has the kernel walk all its flows, so many ports are asked for together and told apart here.
    questions: list[int | None] = [*ports] if len(ports) <= _ASKED_ONE_BY_ONE else [None]
    wanted = {struct.pack(">H", port) for port in ports}
    try:
        for port in questions:
            for version in versions:
                _forget(netfilter, _FAMILIES[version], port, wanted)
    except OSError as error:
        _log.warning("flows to UDP host ports %s could not be forgotten: %s", ports, error.strerror or error)


def _forget(netfilter: NetlinkSocket, family: int, port: int | None, wanted: Collection[bytes]) -> None:
    """Delete the ``wanted`` ports' flows among those to ``port`` (all UDP flows, if None)."""
    head = struct.pack(">BBH", family, 0, 0)
    protocol, flags = attribute(_PROTO_NUM, bytes([_UDP])), _FLAG_PROTO_NUM
    if port is not None:
        protocol, flags = protocol + attribute(_PROTO_DST_PORT, struct.pack(">H", port)), flags | _FLAG_DST_PORT
    limits = nested(_FILTER, attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", flags)))
    question = head + nested(_TUPLE_ORIG, nested(_TUPLE_PROTO, protocol)) + limits

    def deletion(body: bytes) -> Message | None:
        found = attributes(body[4:])
        flow = attributes(attributes(found[_TUPLE_ORIG])[_TUPLE_PROTO])
        # Kernels before 5.8 ignore the filter and answer with every flow.
        if flow.get(_PROTO_NUM) != bytes([_UDP]) or flow.get(_PROTO_DST_PORT) not in wanted:
            return None
        zone = attribute(_ZONE, found[_ZONE]) if _ZONE in found else b""
        return Message(_DELETE, 0, head + nested(_TUPLE_ORIG, found[_TUPLE_ORIG]) + zone)

    for message in netfilter.ask(Message(_GET, NLM_F_DUMP, question), deletion):
        for refusal in netfilter.exchange([message]):
            _log.debug("a flow to a UDP port ended by itself: %s", refusal.reason)
