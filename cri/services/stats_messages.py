"""The CRI's statistics messages, encoded: attributes never change and are kept encoded, numbers are appended.

Encoded parts of a message can be joined (protobuf's encoding guide, "last one wins"), so kept attributes are never
decoded again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

from images.snapshots.usage import WritableUsage
from metrics.stats import InterfaceReading, NetworkReading, PressureReading, Psi
from metrics.usage import Usage
from proto.runtime.v1 import cri_pb2
from proto.wire import encode_field
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox

_DEFAULT_INTERFACE = "eth0"

M = TypeVar("M", cri_pb2.ContainerStats, cri_pb2.LinuxPodSandboxStats)


class _Kept(Generic[M]):
    """The cache for one object: its encoded attributes, and a message whose numbers are set for each answer.

    Most numbers are separate messages in the CRI, and making those is most of the work. ``shape`` says which exist: if
    it changed since the last time, the numbers are set in an empty message.
    """

    def __init__(self, attributes: cri_pb2.ContainerAttributes | cri_pb2.PodSandboxAttributes, empty: type[M]) -> None:
        self.attributes = encode_field(1, attributes.SerializeToString())
        self.lock = threading.Lock()
        self._empty: type[M] = empty
        self._message: M = empty()
        self._shape: tuple[object, ...] = ()
        self._pressure: PressureReading | None = None

    def message(self, shape: tuple[object, ...]) -> M:
        """The message to fill; under the lock."""
        if shape != self._shape:
            self._message, self._shape, self._pressure = self._empty(), shape, None
        return self._message

    def fill_pressure(self, message: M, pressure: PressureReading | None) -> None:
        """Set the PSI values that changed: a reader returns the same object as long as nothing changed."""
        if pressure is None:
            return
        message.io.timestamp = pressure.time_ns
        known, self._pressure = self._pressure, pressure
        if known is None or known.cpu is not pressure.cpu:
            _fill_psi(message.cpu.psi, pressure.cpu)
        if message.HasField("memory") and (known is None or known.memory is not pressure.memory):
            _fill_psi(message.memory.psi, pressure.memory)
        if known is None or known.io is not pressure.io:
            _fill_psi(message.io.psi, pressure.io)


def container_stats(container: Container, usage: Usage | None, written: WritableUsage | None, mountpoint: str) -> bytes:
    """ContainerStats; without ``usage`` the container does not run, and only its writable layer is reported."""
    kept = _of_container(container)
    with kept.lock:
        stats = kept.message((*_shape(usage), written is None))
        if usage is not None:
            _fill_cpu(stats.cpu, usage)
            _fill_memory(stats.memory, usage)
            _fill_swap(stats.swap, usage)
            kept.fill_pressure(stats, usage.pressure)
        if written is not None:
            layer = stats.writable_layer
            layer.timestamp = written.time_ns
            layer.fs_id.mountpoint = mountpoint
            layer.used_bytes.value = written.used_bytes
            layer.inodes_used.value = written.inodes
        return kept.attributes + stats.SerializeToString()


def sandbox_stats(
    sandbox: Sandbox, usage: Usage | None, network: NetworkReading | None, containers: Iterable[bytes]
) -> bytes:
    """PodSandboxStats with the encoded ContainerStats of ``containers``; without ``usage`` it is not ready."""
    kept = _of_sandbox(sandbox)
    interfaces = () if network is None else tuple(interface.name for interface in network.interfaces)
    with kept.lock:
        stats = kept.message((*_shape(usage), interfaces))
        if usage is not None:
            _fill_cpu(stats.cpu, usage)
            _fill_memory(stats.memory, usage)
            kept.fill_pressure(stats, usage.pressure)
            stats.process.timestamp = usage.cpu.time_ns
            stats.process.process_count.value = usage.tasks or 0
        if network is not None and interfaces:
            _fill_network(stats.network, network)
        numbers = stats.SerializeToString()
    linux = numbers + b"".join(encode_field(5, container) for container in containers)
    return kept.attributes + encode_field(2, linux)


def _of_container(container: Container) -> _Kept[cri_pb2.ContainerStats]:
    if not isinstance(container.statistics, _Kept):
        config = container.config
        attributes = cri_pb2.ContainerAttributes(
            id=container.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
        )
        container.statistics = _Kept(attributes, cri_pb2.ContainerStats)
    return container.statistics


def _of_sandbox(sandbox: Sandbox) -> _Kept[cri_pb2.LinuxPodSandboxStats]:
    if not isinstance(sandbox.statistics, _Kept):
        config = sandbox.config
        attributes = cri_pb2.PodSandboxAttributes(
            id=sandbox.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
        )
        sandbox.statistics = _Kept(attributes, cri_pb2.LinuxPodSandboxStats)
    return sandbox.statistics


def _shape(usage: Usage | None) -> tuple[object, ...]:
    """Which of the optional numbers are present."""
    if usage is None:
        return (None,)
    return (
        usage.nano_cores is None,
        usage.memory is None,
        usage.memory_limit is None,
        usage.swap_limit is None,
        usage.pressure is None,
    )


def _fill_cpu(message: cri_pb2.CpuUsage, usage: Usage) -> None:
    message.timestamp = usage.cpu.time_ns
    message.usage_core_nano_seconds.value = usage.cpu.usage_ns
    if usage.nano_cores is not None:
        message.usage_nano_cores.value = usage.nano_cores


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


def _fill_swap(message: cri_pb2.SwapUsage, usage: Usage) -> None:
    if usage.memory is None:
        return
    message.timestamp = usage.memory.time_ns
    message.swap_usage_bytes.value = usage.memory.swap
    if usage.swap_limit is not None:
        message.swap_available_bytes.value = max(0, usage.swap_limit - usage.memory.swap)


def _fill_psi(message: cri_pb2.PsiStats, psi: Psi) -> None:
    for data, line in ((message.Full, psi.full), (message.Some, psi.some)):
        data.Total = line.total_ns
        data.Avg10 = line.avg10
        data.Avg60 = line.avg60
        data.Avg300 = line.avg300


def _fill_network(message: cri_pb2.NetworkUsage, network: NetworkReading) -> None:
    """Append the network's numbers. kubelet reads the default interface without a check, so it is always set."""
    message.timestamp = network.time_ns
    default, *others = sorted(network.interfaces, key=lambda interface: interface.name != _DEFAULT_INTERFACE)
    _fill_interface(message.default_interface, default)
    for position, interface in enumerate(others):
        there = position < len(message.interfaces)
        _fill_interface(message.interfaces[position] if there else message.interfaces.add(), interface)


def _fill_interface(message: cri_pb2.NetworkInterfaceUsage, interface: InterfaceReading) -> None:
    message.name = interface.name
    message.rx_bytes.value = interface.rx_bytes
    message.rx_errors.value = interface.rx_errors
    message.tx_bytes.value = interface.tx_bytes
    message.tx_errors.value = interface.tx_errors
