"""Limits on what a pod sends and receives: token buckets (tc-tbf(8)) on the pod's host-side link.

What the pod receives leaves the node through that link and waits there. What it sends arrives through it, where nothing
can wait: it is led to a link of its own (an ifb), whose bucket it passes before it goes on as if it had just arrived.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Mapping
from decimal import Decimal

from host.errors import InvalidArgumentError
from network.attachment import Attachment, Bandwidth
from network.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    attribute,
    nested,
    number32,
    text,
)

INGRESS_ANNOTATION = "kubernetes.io/ingress-bandwidth"
EGRESS_ANNOTATION = "kubernetes.io/egress-bandwidth"
LOWEST_RATE = 1_000
HIGHEST_RATE = 10**15

_QUANTITY = re.compile(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)(?:([eE][+-]?[0-9]{1,3})|([numkMGTPE]|[KMGTPE]i)?)")
_DECIMAL = {suffix: Decimal(10) ** (3 * (power - 3)) for power, suffix in enumerate(("n", "u", "m", "", *"kMGTPE"))}
_BINARY = {f"{letter}i": Decimal(1024) ** (power + 1) for power, letter in enumerate("KMGTPE")}
_FACTORS = {**_DECIMAL, **_BINARY}

# A burst of this many seconds of the rate keeps the bucket busy over late timers, and hardly counts in the average.
_BURST_SECONDS = 0.02
_SMALLEST_BURST_PACKETS = 4
_QUEUE_SECONDS = 0.05
_ETHERNET_HEADER = 14
_LARGEST_NUMBER = 2**32 - 1

_RTM_NEWLINK = 16
_RTM_NEWQDISC = 36
_RTM_NEWTFILTER = 44
_IFF_UP = 1
_IFLA_IFNAME = 3
_IFLA_MTU = 4
_IFLA_LINKINFO = 18
_IFLA_INFO_KIND = 1
_TCA_KIND = 1
_TCA_OPTIONS = 2
_TCA_TBF_PARMS = 1
_TCA_TBF_RATE64 = 4
_TCA_TBF_BURST = 6
_TCA_U32_SEL = 5
_TCA_U32_ACT = 7
_TCA_ACT_KIND = 1
_TCA_ACT_OPTIONS = 2
_TCA_MIRRED_PARMS = 2
_TC_H_ROOT = 0xFFFFFFFF
_TC_H_INGRESS = 0xFFFFFFF1
_INGRESS_HANDLE = 0xFFFF0000
_TBF_HANDLE = 0x00010000
_TC_LINKLAYER_ETHERNET = 1
_TC_U32_TERMINAL = 1
_TC_ACT_STOLEN = 4
_TCA_EGRESS_REDIR = 1
_ETH_P_ALL = 3


def bandwidth_of(annotations: Mapping[str, str]) -> Bandwidth:
    """The limits a pod's annotations ask for; raises InvalidArgumentError for what is no rate."""
    return Bandwidth(
        ingress=_rate(INGRESS_ANNOTATION, annotations.get(INGRESS_ANNOTATION, "")),
        egress=_rate(EGRESS_ANNOTATION, annotations.get(EGRESS_ANNOTATION, "")),
    )


def _rate(name: str, quantity: str) -> int:
    if not quantity:
        return 0
    found = _QUANTITY.fullmatch(quantity)
    if found is None:
        raise InvalidArgumentError(f"annotation {name}: {quantity!r} is no quantity such as 10M (bits per second)")
    number, exponent, suffix = found.groups()
    rate = Decimal(number + exponent) if exponent else Decimal(number) * _FACTORS[suffix or ""]
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise InvalidArgumentError(f"annotation {name}: {quantity!r} is not between 1k and 1P bits per second")
    return int(rate)


def burst_bytes(rate: int, mtu: int) -> int:
    """How many bytes may pass at once at ``rate`` bits per second."""
    smallest = _SMALLEST_BURST_PACKETS * (mtu + _ETHERNET_HEADER)
    return min(max(int(rate / 8 * _BURST_SECONDS), smallest), _LARGEST_NUMBER)


def limit(route: NetlinkSocket, attachment: Attachment) -> None:
    """Put the attachment's limits on its host-side link, which is there; raises OSError.

    The link ``attachment.limiter`` is made, or taken over if an attempt that was killed left it.
    """
    bandwidth, mtu = attachment.bandwidth, attachment.mtu
    link = socket.if_nametoindex(attachment.host_interface)
    if bandwidth.ingress:
        route.request([_token_bucket(link, bandwidth.ingress, mtu)])
    if bandwidth.egress:
        route.request([_add_ifb(attachment.limiter, mtu)])
        limiter = socket.if_nametoindex(attachment.limiter)
        route.request(
            [
                _token_bucket(limiter, bandwidth.egress, mtu),
                _add_ingress(link),
                _redirect_all(link, limiter),
            ]
        )


def _add_ifb(name: str, mtu: int) -> Message:
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, _IFF_UP, _IFF_UP)
    kind = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "ifb"))
    return Message(_RTM_NEWLINK, NLM_F_CREATE, body + text(_IFLA_IFNAME, name) + number32(_IFLA_MTU, mtu) + kind)


def _token_bucket(index: int, rate: int, mtu: int) -> Message:
    """A token bucket at the root of the link (struct tc_tbf_qopt of linux/pkt_sched.h)."""
    bytes_per_second = max(rate // 8, 1)
    burst = burst_bytes(rate, mtu)
    queue = min(burst + int(bytes_per_second * _QUEUE_SECONDS), _LARGEST_NUMBER)
    rate_specification = struct.pack(
        "=BBHhHI", 0, _TC_LINKLAYER_ETHERNET, 0, 0, 0, min(bytes_per_second, _LARGEST_NUMBER)
    )
    options = nested(
        _TCA_OPTIONS,
        attribute(_TCA_TBF_PARMS, rate_specification + bytes(12) + struct.pack("=III", queue, 0, 0)),
        number32(_TCA_TBF_BURST, burst),
        *([attribute(_TCA_TBF_RATE64, struct.pack("=Q", bytes_per_second))] if bytes_per_second > 2**32 - 1 else []),
    )
    body = _target(index, _TBF_HANDLE, _TC_H_ROOT) + text(_TCA_KIND, "tbf") + options
    return Message(_RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body)


def _add_ingress(index: int) -> Message:
    body = _target(index, _INGRESS_HANDLE, _TC_H_INGRESS) + text(_TCA_KIND, "ingress")
    return Message(_RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, body)


def _redirect_all(index: int, target: int) -> Message:
    """Lead every packet that arrives at the link to another one (filter u32, action mirred)."""
    # One key whose mask is empty: it matches whatever is there.
    selector = struct.pack("=BBBxHHhhI", _TC_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + bytes(16)
    redirect = struct.pack("=IIiiiiI", 0, 0, _TC_ACT_STOLEN, 0, 0, _TCA_EGRESS_REDIR, target)
    action = nested(1, text(_TCA_ACT_KIND, "mirred"), nested(_TCA_ACT_OPTIONS, attribute(_TCA_MIRRED_PARMS, redirect)))
    options = nested(_TCA_OPTIONS, attribute(_TCA_U32_SEL, selector), nested(_TCA_U32_ACT, action))
    priority_and_protocol = 1 << 16 | socket.htons(_ETH_P_ALL)
    body = _target(index, 0, _INGRESS_HANDLE, priority_and_protocol) + text(_TCA_KIND, "u32") + options
    return Message(_RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, body)


def _target(index: int, handle: int, parent: int, information: int = 0) -> bytes:
    return struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, handle, parent, information)
