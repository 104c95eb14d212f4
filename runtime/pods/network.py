"""Reads the network part of a sandbox's configuration."""

from __future__ import annotations

from host.errors import InvalidArgumentError
from network.attachment import AttachRequest, PodDns, PortMapping
from network.bandwidth import bandwidth_of
from proto.runtime.v1 import cri_pb2
from runtime.state.sandbox import Sandbox

_PROTOCOLS: dict[int, str] = {cri_pb2.TCP: "tcp", cri_pb2.UDP: "udp", cri_pb2.SCTP: "sctp"}


def attach_request(sandbox: Sandbox, netns_path: str) -> AttachRequest:
    """The request for a sandbox whose network namespace is pinned at ``netns_path``.

    Raises InvalidArgumentError for a bandwidth annotation that is not a rate.
    """
    metadata, dns = sandbox.config.metadata, sandbox.config.dns_config
    try:
        bandwidth = bandwidth_of(sandbox.config.annotations)
    except InvalidArgumentError as error:
        error.add_context(sandbox.title)
        raise
    return AttachRequest(
        sandbox_id=sandbox.id,
        netns_path=netns_path,
        port_mappings=tuple(
            PortMapping(_protocol(mapping.protocol), mapping.container_port, mapping.host_port, mapping.host_ip)
            for mapping in sandbox.config.port_mappings
            if mapping.host_port
        ),
        bandwidth=bandwidth,
        name=metadata.name,
        namespace=metadata.namespace,
        uid=metadata.uid,
        dns=PodDns(tuple(dns.servers), tuple(dns.searches), tuple(dns.options)),
    )


def _protocol(number: int) -> str:
    """The name of a protocol. If the CRI does not have it, its number, which is refused with the port."""
    return _PROTOCOLS.get(number, str(number))
