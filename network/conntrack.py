"""Forgetting UDP flows to host ports: the kernel would keep sending them where they went before the port changed."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Iterable

from network.attachment import PortMapping
from network.netlink import NLM_F_DUMP, Attribute, FlowMessage, Message, Reader, message, nfctsocket, nfnetlink
from network.netlink_socket import NetlinkSocket

_log = logging.getLogger("podkeel.network")

_GET = nfnetlink.NFNL_SUBSYS_CTNETLINK << 8 | nfctsocket.IPCTNL_MSG_CT_GET
_DELETE = nfnetlink.NFNL_SUBSYS_CTNETLINK << 8 | nfctsocket.IPCTNL_MSG_CT_DELETE
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_ASKED_ONE_BY_ONE = 2

_read_flow = Reader(FlowMessage, "CTA_TUPLE_ORIG", "CTA_ZONE")


def forget_udp(netfilter: NetlinkSocket, mappings: Iterable[PortMapping], versions: Iterable[int] = (4, 6)) -> None:
    """Delete the flows whose first packet went to one of the UDP host ports; a kernel that cannot is only logged.

    ``versions`` are the IP versions in which the pod has an address.
    """
    ports = sorted({mapping.host_port for mapping in mappings if mapping.protocol == "udp"})
    # For each query the kernel walks all its flows, so many ports are queried together and sorted out here.
    questions: list[int | None] = [*ports] if len(ports) <= _ASKED_ONE_BY_ONE else [None]
    try:
        for port in questions:
            for version in versions:
                _forget(netfilter, _FAMILIES[version], port, frozenset(ports))
    except OSError as error:
        _log.warning("UDP host ports %s: conntrack entries cannot be deleted: %s", ports, error.strerror or error)


def _forget(netfilter: NetlinkSocket, family: int, port: int | None, wanted: Collection[int]) -> None:
    """Delete the ``wanted`` ports' flows among those to ``port`` (all UDP flows, if None)."""
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
        flow = _read_flow(body)
        direction = flow.get_attr("CTA_TUPLE_ORIG")
        asked = direction.get_attr("CTA_TUPLE_PROTO")
        # Kernels before 5.8 ignore the filter and answer with every flow.
        if asked.get_attr("CTA_PROTO_NUM") != socket.IPPROTO_UDP or asked.get_attr("CTA_PROTO_DST_PORT") not in wanted:
            return None
        same: list[Attribute] = [("CTA_TUPLE_ORIG", direction)]
        zone = flow.get_attr("CTA_ZONE")
        if zone is not None:
            same.append(("CTA_ZONE", zone))
        return _request(_DELETE, 0, family, same)

    for doomed in netfilter.ask(_request(_GET, NLM_F_DUMP, family, question), deletion):
        for refusal in netfilter.exchange([doomed]):
            _log.debug("conntrack: entry of a UDP port had ended already: %s", refusal.reason)


def _request(kind: int, flags: int, family: int, found: list[Attribute]) -> Message:
    return message(FlowMessage, kind, flags, found, {"nfgen_family": family})
