"""A message that is kept and filled again says the same as one that was made for the occasion."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from cri.services.stats_messages import container_stats, sandbox_stats
from images.snapshots.usage import WritableUsage
from metrics.stats import CpuUsage, InterfaceReading, MemoryReading, NetworkReading, PressureReading, Psi, PsiLine
from metrics.usage import Usage
from proto.runtime.v1 import cri_pb2
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox

numbers = st.integers(0, 2**40)
# Few values, so that the same ones come again.
lines = st.builds(PsiLine, st.sampled_from([0.0, 1.5]), st.just(0.0), st.just(0.25), st.sampled_from([0, 7]))
pressures = st.builds(PressureReading, numbers, *[st.builds(Psi, lines, lines)] * 3)
usages = st.none() | st.builds(
    Usage,
    cpu=st.builds(CpuUsage, numbers, numbers),
    nano_cores=st.none() | numbers,
    memory=st.none() | st.builds(MemoryReading, *[numbers] * 13),
    memory_limit=st.none() | numbers,
    swap_limit=st.none() | numbers,
    pressure=st.none() | pressures,
    tasks=st.none() | numbers,
)
layers = st.none() | st.builds(WritableUsage, numbers, numbers, numbers)
interfaces = st.builds(InterfaceReading, st.sampled_from(["eth0", "net1", "tun0"]), *[numbers] * 8)
networks = st.none() | st.builds(
    NetworkReading, numbers, st.lists(interfaces, max_size=3, unique_by=lambda i: i.name).map(tuple)
)


def an_object(config: Any) -> Any:
    return SimpleNamespace(id="a" * 64, config=config, statistics=None)


@given(st.lists(st.tuples(usages, layers), max_size=5))
def test_containers(readings: list[tuple[Usage | None, WritableUsage | None]]) -> None:
    config = cri_pb2.ContainerConfig(metadata=cri_pb2.ContainerMetadata(name="c"), labels={"a": "b"})
    kept = cast(Container, an_object(config))
    for usage, written in readings:
        message = container_stats(kept, usage, written, "/data")
        assert message == container_stats(cast(Container, an_object(config)), usage, written, "/data")
        stats = cri_pb2.ContainerStats.FromString(message)
        assert stats.attributes.metadata.name == "c"
        assert stats.HasField("cpu") == (usage is not None)
        assert stats.HasField("writable_layer") == (written is not None)
        assert stats.cpu.HasField("usage_nano_cores") == (usage is not None and usage.nano_cores is not None)


@given(st.lists(st.tuples(usages, networks), max_size=5))
def test_pods(readings: list[tuple[Usage | None, NetworkReading | None]]) -> None:
    config = cri_pb2.PodSandboxConfig(metadata=cri_pb2.PodSandboxMetadata(name="p"))
    kept = cast(Sandbox, an_object(config))
    for usage, network in readings:
        message = sandbox_stats(kept, usage, network, [b""])
        assert message == sandbox_stats(cast(Sandbox, an_object(config)), usage, network, [b""])
        told = cri_pb2.PodSandboxStats.FromString(message).linux.network
        names = [] if network is None else [interface.name for interface in network.interfaces]
        default = "eth0" if "eth0" in names else next(iter(names), "")
        assert told.default_interface.name == default
        assert [interface.name for interface in told.interfaces] == [name for name in names if name != default]
