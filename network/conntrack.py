"""Forgetting UDP flows to host ports: the kernel would keep sending them where they went before the port changed."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable

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
_FAMILIES = (2, 10)


def forget_udp(netfilter: NetlinkSocket, mappings: Iterable[PortMapping]) -> None:
    """Delete the flows whose first packet went to one of the UDP host ports; a kernel that cannot is only logged."""
    ports = sorted({mapping.host_port for mapping in mappings if mapping.protocol == "udp"})
    try:
        for port in ports:
            for family in _FAMILIES:
                _forget(netfilter, family, port)
    except OSError as error:
        _log.warning("flows to UDP host ports %s could not be forgotten: %s", ports, error.strerror or error)


def _forget(netfilter: NetlinkSocket, family: int, port: int) -> None:
    head = struct.pack(">BBH", family, 0, 0)
    protocol = attribute(_PROTO_NUM, bytes([_UDP])) + attribute(_PROTO_DST_PORT, struct.pack(">H", port))
    flags = attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", _FLAG_PROTO_NUM | _FLAG_DST_PORT))
    question = head + nested(_TUPLE_ORIG, nested(_TUPLE_PROTO, protocol)) + nested(_FILTER, flags)
    for body in netfilter.answers(Message(_GET, NLM_F_DUMP, question)):
        found = attributes(body[4:])
        flow = attributes(attributes(found[_TUPLE_ORIG])[_TUPLE_PROTO])
        # Kernels before 5.8 ignore the filter and answer with every flow.
        if flow.get(_PROTO_NUM) != bytes([_UDP]) or flow.get(_PROTO_DST_PORT) != struct.pack(">H", port):
            continue
        zone = attribute(_ZONE, found[_ZONE]) if _ZONE in found else b""
        for refusal in netfilter.exchange([Message(_DELETE, 0, head + nested(_TUPLE_ORIG, found[_TUPLE_ORIG]) + zone)]):
            _log.debug("a flow to UDP port %d ended by itself: %s", port, refusal.reason)
