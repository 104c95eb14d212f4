"""The CRI's statistics messages, encoded: attributes never change and are kept, numbers are put behind them.

An encoded message is also what its parts, encoded one by one, come to when they are joined (protobuf's encoding
guide, "last one wins"); so nothing that is kept is decoded again.
"""

from __future__ import annotations

from collections.abc import Iterable

from cri.lists import encode_field
from images.writable import WritableUsage
from metrics.readings import InterfaceReading, NetworkReading, Psi
from proto.runtime.v1 import cri_pb2
from runtime.container import Container
from runtime.meters import Usage
from runtime.sandbox import Sandbox

_DEFAULT_INTERFACE = "eth0"


def container_stats(container: Container, usage: Usage | None, written: WritableUsage | None, mountpoint: str) -> bytes:
    """ContainerStats; without ``usage`` the container does not run, and only what it wrote is told."""
    stats = cri_pb2.ContainerStats()
    if usage is not None:
        _fill_cpu(stats.cpu, usage)
        _fill_memory(stats.memory, usage)
        _fill_swap(stats.swap, usage)
        _fill_io(stats.io, usage)
    if written is not None:
        layer = stats.writable_layer
        layer.timestamp = written.time_ns
        layer.fs_id.mountpoint = mountpoint
        layer.used_bytes.value = written.used_bytes
        layer.inodes_used.value = written.inodes
    return _container_attributes(container) + stats.SerializeToString()


def sandbox_stats(
    sandbox: Sandbox, usage: Usage | None, network: NetworkReading | None, containers: Iterable[bytes]
) -> bytes:
    """PodSandboxStats with the encoded ContainerStats of ``containers``; without ``usage`` it is not ready."""
    stats = cri_pb2.LinuxPodSandboxStats()
    if usage is not None:
        _fill_cpu(stats.cpu, usage)
        _fill_memory(stats.memory, usage)
        _fill_io(stats.io, usage)
        stats.process.timestamp = usage.cpu.time_ns
        stats.process.process_count.value = usage.tasks or 0
    if network is not None and network.interfaces:
        _fill_network(stats.network, network)
    linux = stats.SerializeToString() + b"".join(encode_field(5, container) for container in containers)
    return _sandbox_attributes(sandbox) + encode_field(2, linux)


def _container_attributes(container: Container) -> bytes:
    if container.attributes is None:
        config = container.config
        attributes = cri_pb2.ContainerAttributes(
            id=container.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
        )
        container.attributes = encode_field(1, attributes.SerializeToString())
    return container.attributes


def _sandbox_attributes(sandbox: Sandbox) -> bytes:
    if sandbox.attributes is None:
        config = sandbox.config
        attributes = cri_pb2.PodSandboxAttributes(
            id=sandbox.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
        )
        sandbox.attributes = encode_field(1, attributes.SerializeToString())
    return sandbox.attributes


def _fill_cpu(message: cri_pb2.CpuUsage, usage: Usage) -> None:
    message.timestamp = usage.cpu.time_ns
    message.usage_core_nano_seconds.value = usage.cpu.usage_ns
    if usage.nano_cores is not None:
        message.usage_nano_cores.value = usage.nano_cores
    if usage.pressure is not None:
        _fill_pressure(message.psi, usage.pressure.cpu)


def _fill_memory(message: cri_pb2.MemoryUsage, usage: Usage) -> None:
    memory = usage.memory
    if memory is None:
        return
    message.timestamp = memory.time_ns
    message.working_set_bytes.value = memory.working_set
    if usage.memory_limit is not None:
        message.available_bytes.value = max(0, usage.memory_limit - memory.working_set)
    message.usage_bytes.value = memory.usage
    message.rss_bytes.value = memory.rss
    message.page_faults.value = memory.page_faults
    message.major_page_faults.value = memory.major_page_faults
    if usage.pressure is not None:
        _fill_pressure(message.psi, usage.pressure.memory)


def _fill_swap(message: cri_pb2.SwapUsage, usage: Usage) -> None:
    if usage.memory is None:
        return
    message.timestamp = usage.memory.time_ns
    message.swap_usage_bytes.value = usage.memory.swap
    if usage.swap_limit is not None:
        message.swap_available_bytes.value = max(0, usage.swap_limit - usage.memory.swap)


def _fill_io(message: cri_pb2.IoUsage, usage: Usage) -> None:
    if usage.pressure is not None:
        message.timestamp = usage.pressure.time_ns
        _fill_pressure(message.psi, usage.pressure.io)


def _fill_pressure(message: cri_pb2.PsiStats, psi: Psi) -> None:
    for data, line in ((message.Full, psi.full), (message.Some, psi.some)):
        data.Total = line.total_ns
        data.Avg10 = line.avg10
        data.Avg60 = line.avg60
        data.Avg300 = line.avg300


def _fill_network(message: cri_pb2.NetworkUsage, network: NetworkReading) -> None:
    """The default interface is always there: kubelet reads it without asking. The others stand beside it."""
    message.timestamp = network.time_ns
    names = [interface.name for interface in network.interfaces]
    default = names.index(_DEFAULT_INTERFACE) if _DEFAULT_INTERFACE in names else 0
    for position, interface in enumerate(network.interfaces):
        _fill_interface(message.default_interface if position == default else message.interfaces.add(), interface)


def _fill_interface(message: cri_pb2.NetworkInterfaceUsage, interface: InterfaceReading) -> None:
    message.name = interface.name
    message.rx_bytes.value = interface.rx_bytes
    message.rx_errors.value = interface.rx_errors
    message.tx_bytes.value = interface.tx_bytes
    message.tx_errors.value = interface.tx_errors
