"""A pod's data for plugins: CNI_ARGS and capabilities, in the form that other Kubernetes runtimes use."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

from host.errors import InvalidArgumentError
from network.attachment import AttachRequest, PortMapping
from network.bandwidth import burst_bytes

_USUAL_MTU = 1500


def arguments(request: AttachRequest) -> str:
    """CNI_ARGS. Raises InvalidArgumentError for a name that would add further arguments."""
    given = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": request.namespace,
        "K8S_POD_NAME": request.name,
        "K8S_POD_INFRA_CONTAINER_ID": request.sandbox_id,
        "K8S_POD_UID": request.uid,
    }
    for name, value in given.items():
        if set(value) & set(";=\0"):
            raise InvalidArgumentError(f"{name} {value!r} has a character that separates CNI arguments: remove it")
    return ";".join(f"{name}={value}" for name, value in given.items())


def capabilities(request: AttachRequest, mappings: Sequence[PortMapping], pod_cidrs: Sequence[str]) -> dict[str, Any]:
    """The values of all supported capabilities. Each plugin gets those that it declares."""
    known = {
        "portMappings": [_port(mapping) for mapping in mappings],
        "bandwidth": _bandwidth(request),
        "dns": _dns(request),
        "ipRanges": [[{"subnet": str(ip_network(cidr))}] for cidr in pod_cidrs],
        "aliases": [request.name] if request.name else [],
    }
    return {name: value for name, value in known.items() if value}


def _port(mapping: PortMapping) -> dict[str, Any]:
    port = {
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": mapping.protocol,
    }
    return {**port, "hostIP": mapping.host_ip} if mapping.host_ip else port


def _bandwidth(request: AttachRequest) -> dict[str, int]:
    given: dict[str, int] = {}
    for name, rate in (("ingress", request.bandwidth.ingress), ("egress", request.bandwidth.egress)):
        if rate:
            given |= {f"{name}Rate": rate, f"{name}Burst": 8 * burst_bytes(rate, _USUAL_MTU)}
    return given


def _dns(request: AttachRequest) -> dict[str, list[str]]:
    dns = request.dns
    given = {"servers": list(dns.servers), "searches": list(dns.searches), "options": list(dns.options)}
    return given if any(given.values()) else {}
