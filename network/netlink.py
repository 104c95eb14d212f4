"""The netlink messages that the agent sends and reads (RFC 3549, rtnetlink(7)): pyroute2's message classes.

This is the only module that imports pyroute2. Its sockets are not used (see ``network/netlink_socket.py``): they need
an event loop or a process for each network namespace, and a call for each message. docs/decisions/pyroute2.md has the
measurements.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self

if "pyroute2" not in sys.modules and (_package := importlib.util.find_spec("pyroute2")) is not None:
    # Executing the package itself would import all of its parts: twice the time, and most of them are not used here.
    sys.modules["pyroute2"] = importlib.util.module_from_spec(_package)

from pyroute2 import config
from pyroute2.netlink import (
    NETLINK_EXT_ACK,
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    NLA_F_NESTED,
    NLM_F_ACK,
    NLM_F_ACK_TLVS,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
    NotInitialized,
    nfnetlink,
    nla,
    nlmsg,
    nlmsg_atoms,
    nlmsgerr,
    rtnl,
)
from pyroute2.netlink.nfnetlink import nfctsocket, nftsocket
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD, ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import IFF_UP, ifinfbase
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import sched_tbf, tcmsg

__all__ = [
    "IFA_F_NODAD",
    "IFF_UP",
    "NETLINK_EXT_ACK",
    "NETLINK_NETFILTER",
    "NETLINK_ROUTE",
    "NLM_F_ACK",
    "NLM_F_ACK_TLVS",
    "NLM_F_CREATE",
    "NLM_F_DUMP",
    "NLM_F_DUMP_INTR",
    "NLM_F_EXCL",
    "NLM_F_REPLACE",
    "NLM_F_REQUEST",
    "NLMSG_DONE",
    "NLMSG_ERROR",
    "SOL_NETLINK",
    "nfctsocket",
    "nfnetlink",
    "nftsocket",
    "rtnl",
]

# A process that has loaded gRPC must not fork. With this setting any call of pyroute2 that would fork fails.
config.child_process_mode = "off"

_NLA_TYPE_MASK = 0x3FFF

_ATTRIBUTE = struct.Struct("=HH")
ATTRIBUTE_HEADER = _ATTRIBUTE.size

Attribute = tuple[str, Any]
# A decoded message: its fields are read as in a dict, its attributes with ``get_attr`` (None for a missing one).
Answer = Any


class Message(NamedTuple):
    """One request: its type, flags (NLM_F_REQUEST is added), and the bytes after the header."""

    kind: int
    flags: int
    body: bytes


def message(
    layout: type[nlmsg],
    kind: int,
    flags: int,
    attributes: Sequence[Attribute] = (),
    fields: Mapping[str, int] = MappingProxyType({}),
) -> Message:
    """A request of the class ``layout``. Raises ValueError for an attribute that the class does not know.

    An attribute is its name and value. The value of a nested one is a dict with the attributes in ``attrs``. pyroute2
    itself drops unknown names without an error.
    """
    encoded = layout()
    encoded.update(fields)
    encoded["attrs"] = list(attributes)
    _refuse_unknown(encoded)
    encoded.encode()
    return Message(kind, flags, bytes(encoded.data))


def _refuse_unknown(encoded: Answer) -> None:
    for name, _ in encoded["attrs"]:
        if not encoded.valid_nla(name):
            raise ValueError(f"{type(encoded).__name__} has no attribute {name}")


class _Lean:
    """Makes pyroute2 three times as fast: fields are packed together and only looked up in the message itself.

    pyroute2 would look for an attribute with the field's name first. The message begins behind the netlink header.
    """

    __slots__ = ()
    header = None
    prefix = None
    # Otherwise a class could get the compiled map of its base class, if that was used first.
    _nlmsg_base__compiled_nla = False
    __getitem__ = dict.__getitem__
    get = dict.get
    pack_fields = struct.Struct("").pack
    field_names: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        fields: Sequence[tuple[str, str]] = getattr(cls, "fields", ())
        if not any(part.startswith(("!", ">")) for _, part in fields):
            cls.pack_fields = struct.Struct("=" + "".join(part for _, part in fields)).pack
            cls.field_names = tuple(name for name, part in fields if not part.endswith("x"))

    def __missing__(self, key: str) -> Any:
        return NotInitialized if key == "value" else 0

    def ft_encode(self: Answer, offset: int) -> tuple[int, int]:
        if not self.field_names:
            offset_and_padding: tuple[int, int] = nlmsg.ft_encode(self, offset)
            return offset_and_padding
        packed = self.pack_fields(*[self.get(name, 0) for name in self.field_names])
        self.data += packed
        return offset + len(packed), 0


class _Leaf(_Lean):
    """An attribute with one value, packed in one step. pyroute2 packs header and value field by field."""

    __slots__ = ()

    header = nla.header

    def setvalue(self: Answer, value: object) -> Any:
        self.value = value
        return self

    def encode(self: Answer) -> None:
        payload = self.pack(self.value)
        self.length = _ATTRIBUTE.size + len(payload)
        self.data += _ATTRIBUTE.pack(self.length, self["header"]["type"]) + payload + bytes(-len(payload) % 4)


class _Uint8(_Leaf, nlmsg_atoms.uint8):
    __slots__ = ()
    pack = struct.Struct("=B").pack


class _Uint32(_Leaf, nlmsg_atoms.uint32):
    __slots__ = ()
    pack = struct.Struct("=I").pack


class _Bytes(_Leaf, nlmsg_atoms.cdata):
    __slots__ = ()
    pack = bytes


class _Text(_Leaf, nlmsg_atoms.asciiz):
    __slots__ = ()

    @staticmethod
    def pack(value: str) -> bytes:
        return os.fsencode(value) + b"\0"  # a link in a pod may have a name that is not UTF-8


class _LeanAttributes(_Lean):
    """The kinds of attributes by pyroute2's names for them. Addresses are bytes."""

    __slots__ = ()
    uint8, uint32, cdata, asciiz = _Uint8, _Uint32, _Bytes, _Text
    ipaddr = target = l2addr = _Bytes


def attributes(body: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each attribute from ``start`` on. Ends at an attribute that is too long."""
    while start + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, start)
        end = start + length
        if length < _ATTRIBUTE.size or end > len(body):
            return
        yield kind & _NLA_TYPE_MASK, body[start:end] + bytes(-length % 4)
        start += (length + 3) & ~3


class Reader:
    """Decodes answers of the class ``layout``, and only the attributes ``names``.

    A link has sixty attributes, and pyroute2 makes an object of each: decoding all takes ten times as long. An
    attribute that is too short, or reaches beyond the end of the answer, is left out.
    """

    def __init__(self, layout: type[nlmsg], *names: str) -> None:
        self._layout = layout
        self._head = sum(struct.calcsize(part) for _, part in layout.fields)
        self._wanted = frozenset(number for number, row in enumerate(layout.nla_map) if row[0] in names)

    def __call__(self, body: bytes) -> Answer:
        """Decode an answer from the bytes after its header. Raises struct.error if it is too short."""
        parts = [body[: self._head]]
        for kind, attribute in attributes(body, self._head):
            if kind in self._wanted:
                parts.append(attribute)
                if len(parts) > len(self._wanted):
                    break
        kept = b"".join(parts)
        decoded = self._layout(kept, length=len(kept))
        decoded.decode()
        return decoded


class _Nested(_LeanAttributes, nla):
    """Attributes in an attribute. A name that is not in the map is an error, and values are not copied."""

    __slots__ = ()
    header = nla.header
    nla_flags = NLA_F_NESTED

    def setvalue(self, value: Mapping[str, Any]) -> Self:
        self.update(value)
        return self

    def encode(self: Answer) -> None:
        _refuse_unknown(self)
        start = len(self.data)
        self.data += bytes(_ATTRIBUTE.size) + self.pack_fields(*[self.get(name, 0) for name in self.field_names])
        self.encode_nlas(len(self.data))
        self.length = len(self.data) - start
        _ATTRIBUTE.pack_into(self.data, start, self.length, self["header"]["type"])


def _rows(stock: Sequence[tuple[str, str]], *names: str) -> tuple[tuple[int, str, str], ...]:
    """The rows of a pyroute2 map with these names, and their numbers."""
    return tuple((number, name, kind) for number, (name, kind) in enumerate(stock) if name in names)


class _BridgeData(_Nested):
    __slots__ = ()
    nla_map = (
        *_rows(
            ifinfbase.ifinfo.bridge_data.nla_map,
            "IFLA_BR_FORWARD_DELAY",
            "IFLA_BR_STP_STATE",
            "IFLA_BR_MCAST_SNOOPING",
        ),
        (46, "IFLA_BR_MULTI_BOOLOPT", "boolopt"),
    )

    class boolopt(nla):  # noqa: N801 - pyroute2 finds the class by this name
        __slots__ = ()
        fields = (("optval", "I"), ("optmask", "I"))


class _BridgePortData(_Nested):
    __slots__ = ()
    nla_map = _rows(ifinfbase.ifinfo.bridge_slave_data.nla_map, "IFLA_BRPORT_MODE")


class _FamilyData(_Nested):
    __slots__ = ()
    nla_map = _rows(ifinfbase.af_spec_inet.nla_map, "AF_INET6")

    class inet6(_Nested):  # noqa: N801 - as above
        __slots__ = ()
        nla_map = _rows(ifinfbase.af_spec_inet.inet6.nla_map, "IFLA_INET6_ADDR_GEN_MODE")


class _LinkAttributes(_LeanAttributes, ifinfbase):
    """The attributes of a link."""

    state = _Uint8
    netns_fd = _Uint32
    af_spec = _FamilyData

    class ifinfo(_Nested):  # noqa: N801 - as above
        __slots__ = ()
        nla_map = ifinfbase.ifinfo.nla_map

        @staticmethod
        def info_data(about: Answer, **_: object) -> Any:
            kinds = {"bridge": _BridgeData, "veth": _VethData}
            return kinds.get(about.get_attr("IFLA_INFO_KIND"), nlmsg_atoms.hex)

        @staticmethod
        def info_slave_data(about: Answer, **_: object) -> Any:
            return _BridgePortData if about.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge" else nlmsg_atoms.hex


class LinkMessage(_LinkAttributes, nlmsg):
    """A link (struct ifinfomsg)."""


class _Peer(_LinkAttributes, _Nested):
    """The other end of a veth pair: a link as an attribute."""


class _VethData(_Nested):
    __slots__ = ()
    nla_map = ((1, "VETH_INFO_PEER", "peer"),)
    peer = _Peer


class AddressMessage(_LeanAttributes, ifaddrmsg):
    """An address of a link (struct ifaddrmsg)."""

    __slots__ = ()


class RouteMessage(_LeanAttributes, rtmsg):
    """A route (struct rtmsg)."""

    __slots__ = ()


class NeighbourMessage(_LeanAttributes, ndmsg):
    """A neighbour (struct ndmsg)."""

    __slots__ = ()


class FlowMessage(_LeanAttributes, nfctsocket.nfct_msg):
    """A tracked connection (struct nfgenmsg)."""


class FilterMessage(_Lean, tcmsg):
    """A filter of packets (struct tcmsg)."""


class _TokenBucket(_Nested):
    __slots__ = ()
    nla_map = (
        *_rows(sched_tbf.options.nla_map, "TCA_TBF_PARMS"),
        (4, "TCA_TBF_RATE64", "uint64"),
        (6, "TCA_TBF_BURST", "uint32"),
    )

    class tbf_parms(nla):  # noqa: N801 - as above
        """Without the table of times that pyroute2 computes; the kernel has not used it since 3.8."""

        __slots__ = ()
        fields = sched_tbf.options.tbf_parms.fields


class QdiscMessage(_LeanAttributes, nlmsg):
    """A queueing discipline (struct tcmsg): a token bucket, or one without options."""

    __slots__ = ()
    fields = tcmsg.fields
    nla_map = ((1, "TCA_KIND", "asciiz"), (2, "TCA_OPTIONS", "token_bucket"))
    token_bucket = _TokenBucket


class _Refused(_LeanAttributes, nlmsg):
    """An NLMSG_ERROR that has only the header of the request (NETLINK_CAP_ACK)."""

    __slots__ = ()
    fields = (*nlmsgerr.fields, *((f"request_{name}", kind) for name, kind in nlmsg.header))
    nla_map = nlmsgerr.nla_map


read_refusal = Reader(_Refused, "NLMSGERR_ATTR_MSG")
