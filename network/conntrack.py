"""Deletes conntrack entries of UDP flows to host ports, which would still lead to the earlier pod of a port."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Collection, Iterable

from network.attachment import PortMapping
from network.netlink import (
    ATTRIBUTE_HEADER,
    NLM_F_DUMP,
    Attribute,
    FlowMessage,
    Message,
    attributes,
    message,
    nfctsocket,
    nfnetlink,
)
from network.netlink_socket import NetlinkSocket

_log = logging.getLogger("podkeel.network")

_GET = nfnetlink.NFNL_SUBSYS_CTNETLINK << 8 | nfctsocket.IPCTNL_MSG_CT_GET
_DELETE = nfnetlink.NFNL_SUBSYS_CTNETLINK << 8 | nfctsocket.IPCTNL_MSG_CT_DELETE
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_ASKED_ONE_BY_ONE = 2
# Any sender of packets to a port can make as many flows as the kernel keeps. So many are deleted at a time, with the
# attributes from the kernel's list.
_DELETED_AT_ONCE = 128
_HEAD = 4  # struct nfgenmsg
_TUPLE, _ZONE = 1, 18  # CTA_TUPLE_ORIG, CTA_ZONE
_TUPLE_PROTOCOL, _PROTOCOL_NUMBER, _DESTINATION_PORT = 2, 1, 3  # CTA_TUPLE_PROTO, CTA_PROTO_NUM, CTA_PROTO_DST_PORT


def forget_udp(netfilter: NetlinkSocket, mappings: Iterable[PortMapping], versions: Iterable[int] = (4, 6)) -> None:
    """Delete the flows whose first packet went to one of the UDP host ports. If the kernel cannot, this is only logged.

    ``versions`` are the IP versions in which the pod has an address.
    """
    ports = sorted({mapping.host_port for mapping in mappings if mapping.protocol == "udp"})
    # The kernel walks all its flows for each query, so many ports are queried together and filtered here.
    questions: list[int | None] = [*ports] if len(ports) <= _ASKED_ONE_BY_ONE else [None]
    try:
        for port in questions:
            for version in versions:
                _forget(netfilter, _FAMILIES[version], port, frozenset(ports))
    except OSError as error:
        _log.warning("UDP host ports %s: conntrack entries cannot be deleted: %s", ports, error.strerror or error)


def _forget(netfilter: NetlinkSocket, family: int, port: int | None, wanted: Collection[int]) -> None:
    """Delete the flows of the ``wanted`` ports among the flows to ``port`` (None: all UDP flows)."""
    protocol: list[Attribute] = [("CTA_PROTO_NUM", socket.IPPROTO_UDP)]
    flags = nfctsocket.FILTER_FLAG_CTA_PROTO_NUM
    if port is not None:
        protocol.append(("CTA_PROTO_DST_PORT", port))
        flags |= nfctsocket.FILTER_FLAG_CTA_PROTO_DST_PORT
    question: list[Attribute] = [
        ("CTA_TUPLE_ORIG", {"attrs": [("CTA_TUPLE_PROTO", {"attrs": protocol})]}),
        ("CTA_FILTER", {"attrs": [("CTA_FILTER_ORIG_FLAGS", flags)]}),
    ]

    def deletion(body: bytes) -> Message | None:
        same = {kind: whole for kind, whole in attributes(body, _HEAD) if kind in (_TUPLE, _ZONE)}
        # Kernels before 5.8 ignore the filter and answer with every flow.
        if not _is_udp_to(same.get(_TUPLE, b""), wanted):
            return None
        return Message(_DELETE, 0, struct.pack("=BBH", family, 0, 0) + b"".join(same.values()))

    doomed = netfilter.ask(_request(_GET, NLM_F_DUMP, family, question), deletion)
    for start in range(0, len(doomed), _DELETED_AT_ONCE):
        for refusal in netfilter.exchange(doomed[start : start + _DELETED_AT_ONCE]):
            _log.debug("conntrack: entry of a UDP port had ended already: %s", refusal.reason)


def _is_udp_to(direction: bytes, ports: Collection[int]) -> bool:
    """Whether this tuple of addresses and ports is UDP to one of the ports."""
    for kind, part in attributes(direction, ATTRIBUTE_HEADER):
        if kind == _TUPLE_PROTOCOL:
            about = {kind: whole[ATTRIBUTE_HEADER:] for kind, whole in attributes(part, ATTRIBUTE_HEADER)}
            number, port = about.get(_PROTOCOL_NUMBER, b""), about.get(_DESTINATION_PORT, b"")
            return number[:1] == bytes([socket.IPPROTO_UDP]) and int.from_bytes(port[:2], "big") in ports
    return False


def _request(kind: int, flags: int, family: int, found: list[Attribute]) -> Message:
    return message(FlowMessage, kind, flags, found, {"nfgen_family": family})
