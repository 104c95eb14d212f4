"""Limits the rates at which a pod sends and receives: token buckets (tc-tbf(8)) on the pod's host-side link.

Packets to the pod leave the node through that link and wait in its queue. Packets from the pod arrive on it, and
arriving packets cannot be queued. So they are redirected to a second link (an ifb). They pass its token bucket and are
then processed like packets that have just arrived.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from host.errors import InvalidArgumentError
from host.quantities import quantity
from network.attachment import Attachment, Bandwidth
from network.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Attribute,
    FilterMessage,
    Message,
    QdiscMessage,
    message,
    rtnl,
)
from network.netlink_socket import NetlinkSocket
from network.rtnetlink import add_ifb

INGRESS_ANNOTATION = "kubernetes.io/ingress-bandwidth"
EGRESS_ANNOTATION = "kubernetes.io/egress-bandwidth"
MIN_RATE = 1_000
MAX_RATE = 10**15

# A burst of this many seconds of the rate keeps the link busy when a timer is late. It hardly changes the average.
_BURST_SECONDS = 0.02
_MIN_BURST_PACKETS = 4
_QUEUE_SECONDS = 0.05
_ETHERNET_HEADER = 14
_MAX_NUMBER = 2**32 - 1
_ETHERNET = 1  # TC_LINKLAYER_ETHERNET, in the byte of struct tc_ratespec that pyroute2 names reserved

_TOKEN_BUCKET_HANDLE = 0x00010000
_INGRESS_HANDLE = 0xFFFF0000
_ALL_PROTOCOLS = 0x0003  # ETH_P_ALL
_FIRST_PRIORITY = 1
_STOLEN = 4  # TC_ACT_STOLEN
_EGRESS_REDIRECT = 1  # TCA_EGRESS_REDIR


def bandwidth_of(annotations: Mapping[str, str]) -> Bandwidth:
    """The limits in a pod's annotations. Raises InvalidArgumentError for a value that is not a rate."""
    return Bandwidth(
        ingress=_rate(INGRESS_ANNOTATION, annotations.get(INGRESS_ANNOTATION, "")),
        egress=_rate(EGRESS_ANNOTATION, annotations.get(EGRESS_ANNOTATION, "")),
    )


def _rate(name: str, text: str) -> int:
    if not text:
        return 0
    try:
        rate = quantity(text)
    except ValueError:
        raise InvalidArgumentError(
            f"annotation {name}: {text!r} is not a quantity such as 10M (bits per second)"
        ) from None
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InvalidArgumentError(f"annotation {name}: {text!r} is out of range: use 1k to 1P bits per second")
    return int(rate)


def burst_bytes(rate: int, mtu: int) -> int:
    """The number of bytes that may pass in one burst at ``rate`` bits per second."""
    smallest = _MIN_BURST_PACKETS * (mtu + _ETHERNET_HEADER)
    return min(max(int(rate / 8 * _BURST_SECONDS), smallest), _MAX_NUMBER)


def limit(route: NetlinkSocket, attachment: Attachment) -> None:
    """Set the attachment's limits on its existing host-side link. Raises OSError.

    The link ``attachment.limiter`` is created. If a killed attempt left it, it is used.
    """
    bandwidth, mtu = attachment.bandwidth, attachment.mtu
    link = socket.if_nametoindex(attachment.host_interface)
    if bandwidth.ingress:
        route.request([_token_bucket(link, bandwidth.ingress, mtu)])
    if bandwidth.egress:
        route.request([add_ifb(attachment.limiter, mtu)])
        limiter = socket.if_nametoindex(attachment.limiter)
        route.request(
            [
                _token_bucket(limiter, bandwidth.egress, mtu),
                _add_ingress(link),
                _redirect_all(link, limiter),
            ]
        )


def _token_bucket(index: int, rate: int, mtu: int) -> Message:
    """A token bucket at the root of the link (struct tc_tbf_qopt of linux/pkt_sched.h)."""
    bytes_per_second = max(rate // 8, 1)
    burst = burst_bytes(rate, mtu)
    queue = min(burst + int(bytes_per_second * _QUEUE_SECONDS), _MAX_NUMBER)
    parameters = {
        "rate_cell_log": 0,
        "rate___reserved": _ETHERNET,
        "rate": min(bytes_per_second, _MAX_NUMBER),
        "limit": queue,
    }
    options: list[Attribute] = [("TCA_TBF_PARMS", parameters), ("TCA_TBF_BURST", burst)]
    if bytes_per_second > _MAX_NUMBER:
        options.append(("TCA_TBF_RATE64", bytes_per_second))
    found = [("TCA_KIND", "tbf"), ("TCA_OPTIONS", {"attrs": options})]
    fields = {"index": index, "handle": _TOKEN_BUCKET_HANDLE, "parent": rtnl.TC_H_ROOT}
    return message(QdiscMessage, rtnl.RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, found, fields)


def _add_ingress(index: int) -> Message:
    fields = {"index": index, "handle": _INGRESS_HANDLE, "parent": rtnl.TC_H_INGRESS}
    return message(QdiscMessage, rtnl.RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, [("TCA_KIND", "ingress")], fields)


def _redirect_all(index: int, target: int) -> Message:
    """Redirect every packet that arrives on the link to another one (filter u32, action mirred)."""
    redirect = {"action": _STOLEN, "eaction": _EGRESS_REDIRECT, "ifindex": target}
    action = [
        ("TCA_ACT_KIND", "mirred"),
        ("TCA_ACT_OPTIONS", {"attrs": [("TCA_MIRRED_PARMS", redirect)]}),
    ]
    options = [
        ("TCA_U32_SEL", {"keys": ["0x0/0x0+0"]}),  # an empty mask matches every packet
        ("TCA_U32_ACT", {"attrs": [("TCA_ACT_PRIO_1", {"attrs": action})]}),
    ]
    found = [("TCA_KIND", "u32"), ("TCA_OPTIONS", {"attrs": options})]
    priority_and_protocol = _FIRST_PRIORITY << 16 | socket.htons(_ALL_PROTOCOLS)
    fields = {"index": index, "parent": _INGRESS_HANDLE, "info": priority_and_protocol}
    return message(FilterMessage, rtnl.RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, found, fields)
