"""The results of plugins: the pod's interface and addresses (CNI specification 0.3.0 to 1.1.0, section 5)."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface
from typing import Annotated, Any, NamedTuple

import msgspec

from host import untrusted_json
from host.errors import InvalidArgumentError, PodkeelError
from host.untrusted_json import JsonError
from network.attachment import POD_INTERFACE

_SHOWN_CHARACTERS = 200


class _Interface(msgspec.Struct, frozen=True):
    name: str = ""
    mac: str = ""
    sandbox: str = ""
    mtu: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0


class _Address(msgspec.Struct, frozen=True):
    address: str
    gateway: str | None = None
    interface: int | None = None


class _Result(msgspec.Struct, frozen=True):
    interfaces: tuple[_Interface, ...] | None = None
    ips: tuple[_Address, ...] | None = None


class PodInterface(NamedTuple):
    """The pod's interface in a result. Missing values are empty strings and 0."""

    addresses: tuple[str, ...]
    networks: tuple[str, ...]
    gateways: tuple[str, ...]
    mac: str
    mtu: int
    host_interface: str


def decode(kind: str, output: bytes) -> dict[str, Any]:
    """Decode the result that a plugin printed. Raises InvalidArgumentError if it is malformed."""
    try:
        return untrusted_json.decode(output, dict[str, Any])
    except JsonError as error:
        shown = output.decode(errors="replace").strip()[:_SHOWN_CHARACTERS] or "nothing"
        raise InvalidArgumentError(f"CNI plugin {kind}, ADD: printed {shown!r} instead of a result: {error}") from error


def pod_interface(network: str, result: dict[str, Any]) -> PodInterface:
    """The pod's interface in the last plugin's result. Raises PodkeelError if the result has no address for the pod."""
    try:
        reported = msgspec.convert(result, _Result)
        interfaces = reported.interfaces or ()
        own = [found for found in reported.ips or () if _in_pod(found, interfaces)]
        addresses = [ip_interface(found.address) for found in own]
        gateways = tuple(str(ip_address(found.gateway)) for found in own if found.gateway)
    except (msgspec.ValidationError, ValueError) as error:
        raise PodkeelError(f"CNI network {network}: the result of its plugins is invalid: {error}") from error
    if not addresses:
        raise PodkeelError(f"CNI network {network}: its plugins gave the pod no address: configure an ipam plugin")
    inside = next((i for i in interfaces if i.sandbox and i.name == POD_INTERFACE), _Interface())
    outside = next((i for i in interfaces if not i.sandbox and i.name.startswith("veth")), _Interface())
    return PodInterface(
        addresses=tuple(dict.fromkeys(str(address.ip) for address in addresses)),
        networks=tuple(dict.fromkeys(str(address.network) for address in addresses)),
        gateways=tuple(dict.fromkeys(gateways)),
        mac=inside.mac,
        mtu=inside.mtu,
        host_interface=outside.name,
    )


def _in_pod(found: _Address, interfaces: tuple[_Interface, ...]) -> bool:
    """Whether an address belongs to the pod. Plugins may also list the node's side, and may omit the interface."""
    if found.interface is None or not interfaces:
        return True
    if not 0 <= found.interface < len(interfaces):
        raise ValueError(f"address {found.address} is on interface {found.interface} of {len(interfaces)}")
    return bool(interfaces[found.interface].sandbox)
