"""An adjustment is put into a spec, and what cannot be done is refused with the names of the plugin and the field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from host.errors import InvalidArgumentError, UnsupportedError
from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from runtime.nri.abilities import RuntimeAbilities
from runtime.nri.adjustment import adjust, apply
from runtime.nri.answers.merging import Merging
from runtime.nri.answers.owners import Owners
from runtime.oci.oci_runtime import RuntimeFeatures
from runtime.specgen import config
from runtime.specgen.builder import complete
from runtime.specgen.draft import Draft, draft
from tests.unit.spec.requests import NODE, container, request

Adjustment = nri_pb2.ContainerAdjustment
Linux = nri_pb2.LinuxContainerAdjustment
Resources = nri_pb2.LinuxResources
OLD = RuntimeFeatures(version="runc version 1.1.5")
NEWEST = RuntimeFeatures(
    version="runc version 1.4.0",
    scheduler=True,
    io_priority=True,
    net_devices=True,
    memory_policies=("MPOL_BIND",),
)
PRIORITY = nri_pb2.LinuxIOPriority(priority=3, **{"class": nri_pb2.IOPRIO_CLASS_BE})
BATCH = nri_pb2.LinuxScheduler(policy=nri_pb2.SCHED_BATCH, nice=5)


def linux(**fields: Any) -> Adjustment:
    return Adjustment(linux=Linux(**fields))


def limits(**fields: Any) -> Adjustment:
    return linux(resources=Resources(**fields))


def optional(value: int) -> nri_pb2.OptionalInt64:
    return nri_pb2.OptionalInt64(value=value)


def applied(given: Adjustment, spec: config.Spec, features: RuntimeFeatures = OLD, **node: Any) -> config.Spec:
    merging = Merging(nri_pb2.Container(), Owners("container c1"))
    merging.add("10-test", given)
    abilities = RuntimeAbilities("runc", features, dataclasses.replace(NODE, **node))
    apply(merging.adjustment, spec, abilities, merging.owners.message())
    return spec


@pytest.fixture
def drafted(tmp_path: Path) -> Draft:
    return draft(request(tmp_path))


@pytest.fixture
def spec(drafted: Draft) -> config.Spec:
    return drafted.spec


WRONG: list[tuple[str, Adjustment]] = [
    ("Mounts a", Adjustment(mounts=[nri_pb2.Mount(destination="a", source="/x")])),
    ("Mounts /a/../..", Adjustment(mounts=[nri_pb2.Mount(destination="/a/../..", source="/x")])),
    ("Mounts /", Adjustment(mounts=[nri_pb2.Mount(destination="/", source="/x")])),
    ("Mounts -/proc", Adjustment(mounts=[nri_pb2.Mount(destination="-/proc")])),
    ("Mounts -/dev", Adjustment(mounts=[nri_pb2.Mount(destination="-/dev")])),
    ("Mounts /proc", Adjustment(mounts=[nri_pb2.Mount(destination="/proc", type="tmpfs", source="t")])),
    ("Mounts /proc/self/attr", Adjustment(mounts=[nri_pb2.Mount(destination="/proc/self/attr", type="tmpfs")])),
    ("Mounts /a", Adjustment(mounts=[nri_pb2.Mount(destination="/a", source="relative", type="bind")])),
    ("Annotations run.oci.seccomp_bpf_data", Adjustment(annotations={"run.oci.seccomp_bpf_data": "x"})),
    ("OciHooks", Adjustment(hooks=nri_pb2.Hooks(prestart=[nri_pb2.Hook(path="relative")]))),
    (
        "OciHooks",
        Adjustment(hooks=nri_pb2.Hooks(poststop=[nri_pb2.Hook(path="/x", timeout=nri_pb2.OptionalInt(value=0))])),
    ),
    ("Rlimits RLIMIT_X", Adjustment(rlimits=[nri_pb2.POSIXRlimit(type="RLIMIT_X", hard=1, soft=1)])),
    ("Rlimits RLIMIT_CORE", Adjustment(rlimits=[nri_pb2.POSIXRlimit(type="RLIMIT_CORE", hard=1, soft=2)])),
    ("Devices /dev/../x", linux(devices=[nri_pb2.LinuxDevice(path="/dev/../x", type="c")])),
    ("Devices /dev/x", linux(devices=[nri_pb2.LinuxDevice(path="/dev/x", type="z")])),
    ("Devices /dev/x", linux(devices=[nri_pb2.LinuxDevice(path="/dev/x", type="c", major=-1)])),
    ("Devices /dev/null", linux(devices=[nri_pb2.LinuxDevice(path="/dev/null", type="c", major=1, minor=1)])),
    ("Sysctl vm.swappiness", linux(sysctl={"vm.swappiness": "1"})),
    ("Sysctl net.core.somaxconn", linux(sysctl={"net.core.somaxconn": "1\n2"})),
    ("Namespace pid", linux(namespaces=[nri_pb2.LinuxNamespace(type="pid", path="x")])),
    ("CgroupsPath", linux(cgroups_path="a/b")),
    ("CgroupsPath", linux(cgroups_path="/a/../b")),
    ("OomScoreAdj", linux(oom_score_adj=nri_pb2.OptionalInt(value=1001))),
    ("IoPriority", linux(io_priority=nri_pb2.LinuxIOPriority(priority=8, **{"class": nri_pb2.IOPRIO_CLASS_BE}))),
    ("LinuxSched", linux(scheduler=nri_pb2.LinuxScheduler(policy=nri_pb2.SCHED_FIFO))),
    ("LinuxSched", linux(scheduler=nri_pb2.LinuxScheduler(policy=nri_pb2.SCHED_ISO))),
    ("LinuxSched", linux(scheduler=nri_pb2.LinuxScheduler(policy=nri_pb2.SCHED_DEADLINE, runtime=2, deadline=1))),
    ("SeccompPolicy", linux(seccomp_policy=nri_pb2.LinuxSeccomp(default_action="allow"))),
    ("linux.resources", limits(cpu=nri_pb2.LinuxCPU(cpus="a-b"))),
    ("linux.resources", limits(memory=nri_pb2.LinuxMemory(limit=optional(-2)))),
    ("linux.resources", limits(memory=nri_pb2.LinuxMemory(limit=optional(2), swap=optional(1)))),
    ("linux.resources", limits(unified={"memory.high": "1"})),
    ("linux.resources", limits(hugepage_limits=[nri_pb2.HugepageLimit(page_size="7MB", limit=1)])),
    ("MemSwappiness", limits(memory=nri_pb2.LinuxMemory(swappiness=nri_pb2.OptionalUInt64(value=101)))),
]


def test_a_cgroup_whose_name_only_begins_with_the_id_is_refused(spec: config.Spec) -> None:
    assert spec.linux.cgroups_path is not None
    own = spec.linux.cgroups_path.rpartition("/")[2]
    assert applied(linux(cgroups_path=f"/of/a-{own}"), spec).linux.cgroups_path == f"/of/a-{own}"
    with pytest.raises(UnsupportedError, match="must end with the container's id"):
        applied(linux(cgroups_path=f"/of/{own}-a"), spec)


@pytest.mark.parametrize(("field", "given"), WRONG, ids=[f"{n}-{field}" for n, (field, _) in enumerate(WRONG)])
def test_what_cannot_be_is_refused_by_plugin_and_field(spec: config.Spec, field: str, given: Adjustment) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        applied(given, spec, NEWEST)
    assert raised.value.message.startswith(f"NRI plugin 10-test: {field}: ")


UNSUPPORTED: list[tuple[str, Adjustment]] = [
    ("Namespace user", linux(namespaces=[nri_pb2.LinuxNamespace(type="user", path="/x")])),
    ("Namespace mount", linux(namespaces=[nri_pb2.LinuxNamespace(type="-mount")])),
    ("Namespace time", linux(namespaces=[nri_pb2.LinuxNamespace(type="time")])),
    ("LinuxNetDevices eth9", linux(net_devices={"eth9": nri_pb2.LinuxNetDevice(name="x")})),
    ("MemoryPolicy", linux(memory_policy=nri_pb2.LinuxMemoryPolicy(mode=nri_pb2.MPOL_BIND, nodes="0"))),
    ("RdtClass", limits(rdt_class=nri_pb2.OptionalString(value="gold"))),
    ("RdtClosID", linux(rdt=nri_pb2.LinuxRdt(clos_id=nri_pb2.OptionalString(value="gold")))),
    ("RdtSchemata", linux(rdt=nri_pb2.LinuxRdt(schemata=nri_pb2.OptionalRepeatedString(value=["L3:0=f"])))),
    ("RdtEnableMonitoring", linux(rdt=nri_pb2.LinuxRdt(enable_monitoring=nri_pb2.OptionalBool(value=True)))),
    ("BlockioClass gold", limits(blockio_class=nri_pb2.OptionalString(value="gold"))),
    ("MemKernelLimit", limits(memory=nri_pb2.LinuxMemory(kernel=optional(1 << 20)))),
    ("MemUseHierarchy", limits(memory=nri_pb2.LinuxMemory(use_hierarchy=nri_pb2.OptionalBool(value=False)))),
    ("OomScoreAdj", linux(oom_score_adj=nri_pb2.OptionalInt(value=-999))),
    ("CgroupsPath", linux(cgroups_path="/of/another")),
    ("Rlimits RLIMIT_NOFILE", Adjustment(rlimits=[nri_pb2.POSIXRlimit(type="RLIMIT_NOFILE", hard=1 << 60, soft=1)])),
]


@pytest.mark.parametrize(("field", "given"), UNSUPPORTED, ids=[field for field, _ in UNSUPPORTED])
def test_what_is_not_supported_is_refused_by_plugin_and_field(
    spec: config.Spec, field: str, given: Adjustment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.nri.linux_adjustment.RESCTRL", tmp_path / "resctrl")
    with pytest.raises(UnsupportedError) as raised:
        applied(given, spec)
    assert raised.value.message.startswith(f"NRI plugin 10-test: {field}: ")


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("MemTCPLimit", limits(memory=nri_pb2.LinuxMemory(kernel_tcp=optional(1)))),
        ("MemSwappiness", limits(memory=nri_pb2.LinuxMemory(swappiness=nri_pb2.OptionalUInt64(value=1)))),
        (
            "MemDisableOomKiller",
            limits(memory=nri_pb2.LinuxMemory(disable_oom_killer=nri_pb2.OptionalBool(value=True))),
        ),
        ("CPURealtimeRuntime", limits(cpu=nri_pb2.LinuxCPU(realtime_runtime=optional(1)))),
        ("CPURealtimePeriod", limits(cpu=nri_pb2.LinuxCPU(realtime_period=nri_pb2.OptionalUInt64(value=1)))),
    ],
)
def test_what_cgroup_v2_does_not_have_is_refused(spec: config.Spec, field: str, given: Adjustment) -> None:
    with pytest.raises(UnsupportedError, match=rf"NRI plugin 10-test: {field}: .*cgroup v2"):
        applied(given, spec, cgroup_version=2)


def test_what_newer_runtimes_can_do_is_in_the_spec(spec: config.Spec) -> None:
    policy = nri_pb2.LinuxMemoryPolicy(mode=nri_pb2.MPOL_BIND, nodes="0", flags=[nri_pb2.MPOL_F_STATIC_NODES])
    devices = {"eth9": nri_pb2.LinuxNetDevice(name="inside")}
    applied(linux(io_priority=PRIORITY, scheduler=BATCH, net_devices=devices, memory_policy=policy), spec, NEWEST)
    written = msgspec.json.decode(config.encode(spec))
    assert written["process"]["ioPriority"] == {"class": "IOPRIO_CLASS_BE", "priority": 3}
    assert written["process"]["scheduler"] == {"policy": "SCHED_BATCH", "nice": 5}
    assert written["linux"]["netDevices"] == {"eth9": {"name": "inside"}}
    assert written["linux"]["memoryPolicy"] == {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}


def test_rdt(spec: config.Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.nri.linux_adjustment.RESCTRL", tmp_path)
    (tmp_path / "schemata").touch()
    missing = limits(rdt_class=nri_pb2.OptionalString(value="gold"))
    with pytest.raises(InvalidArgumentError, match=r"10-test: RdtClass gold: .*/gold does not exist"):
        applied(missing, spec)
    (tmp_path / "gold").mkdir()
    applied(missing, spec)
    assert spec.linux.intel_rdt == config.IntelRdt(clos_id="gold")
    applied(linux(rdt=nri_pb2.LinuxRdt(remove=True)), spec)
    assert spec.linux.intel_rdt is None
    able = RuntimeFeatures(rdt_schemata=True, rdt_monitoring=True)
    rdt = nri_pb2.LinuxRdt(schemata=nri_pb2.OptionalRepeatedString(value=["L3:0=f"]))
    rdt.enable_monitoring.value = True
    applied(linux(rdt=rdt), spec, able)
    assert spec.linux.intel_rdt == config.IntelRdt(schemata=["L3:0=f"], enable_monitoring=True)


def test_sysctls_of_a_namespace_that_is_the_node_s_are_refused(spec: config.Spec) -> None:
    given = linux(namespaces=[nri_pb2.LinuxNamespace(type="-network")], sysctl={"net.core.somaxconn": "1"})
    with pytest.raises(InvalidArgumentError, match="would change the whole node"):
        applied(given, spec)


def test_names_with_a_dash_remove_and_the_same_name_replaces(spec: config.Spec) -> None:
    spec.annotations |= {"gone": "1", "kept": "1", "replaced": "1"}
    spec.process.env = ["GONE=1", "KEPT=1", "REPLACED=1"]
    given = Adjustment(annotations={"-gone": "", "replaced": "2", "-never": ""})
    for key, value in (("-GONE", ""), ("-REPLACED", ""), ("REPLACED", "2"), ("-NEVER", "")):
        given.env.add(key=key, value=value)
    applied(given, spec)
    assert spec.process.env == ["KEPT=1", "REPLACED=2"]
    assert {"kept": "1", "replaced": "2"}.items() <= spec.annotations.items()
    assert not {"gone", "-gone", "never", "-never"} & spec.annotations.keys()


def test_a_removed_device_is_closed_and_one_of_the_same_number_stays_open(tmp_path: Path) -> None:
    devices = [
        cri_pb2.Device(host_path="/dev/zero", container_path=path, permissions="rwm") for path in ("/dev/a", "/dev/b")
    ]
    spec = draft(request(tmp_path, config=container(devices=devices))).spec
    resources = spec.linux.resources
    assert resources is not None
    zero = config.DeviceRule(allow=True, type="c", major=1, minor=5, access="rwm")
    applied(linux(devices=[nri_pb2.LinuxDevice(path="-/dev/a")]), spec)
    assert [node.path for node in spec.linux.devices] == ["/dev/b"]
    assert zero in resources.devices
    applied(linux(devices=[nri_pb2.LinuxDevice(path="-/dev/b")]), spec)
    assert spec.linux.devices == []
    assert resources.devices == [config.DeviceRule(allow=False, access="rwm")]


def test_limits_of_the_configuration_stay_where_a_plugin_sets_others(tmp_path: Path) -> None:
    given = cri_pb2.LinuxContainerResources(cpu_shares=512, memory_limit_in_bytes=1 << 25)
    spec = draft(request(tmp_path, config=container(linux=cri_pb2.LinuxContainerConfig(resources=given)))).spec
    applied(limits(cpu=nri_pb2.LinuxCPU(cpus="0"), memory=nri_pb2.LinuxMemory(reservation=optional(1 << 20))), spec)
    resources = spec.linux.resources
    assert resources is not None
    assert resources.cpu == config.Cpu(shares=512, cpus="0")
    assert resources.memory == config.Memory(limit=1 << 25, swap=1 << 25, reservation=1 << 20)
    applied(limits(memory=nri_pb2.LinuxMemory(limit=optional(1 << 26))), spec)
    assert resources.memory is not None
    assert (resources.memory.limit, resources.memory.swap) == (1 << 26, 1 << 26)


def test_a_plugin_s_devices_belong_to_ids_of_the_container(tmp_path: Path, drafted: Draft) -> None:
    mapping = [config.IDMapping(container_id=0, host_id=100000, size=65536)]
    drafted.spec.linux.uid_mappings = drafted.spec.linux.gid_mappings = mapping
    merging = Merging(nri_pb2.Container(), Owners("container c1"))
    device = nri_pb2.LinuxDevice(path="/dev/x", type="c", major=1, minor=3, uid=nri_pb2.OptionalUInt32(value=7))
    merging.add("10-test", linux(devices=[device]))
    adjust(drafted, merging.adjustment, merging.owners.message(), RuntimeAbilities("runc", RuntimeFeatures(), NODE))
    built = complete(drafted)
    assert built.private_devices is not None
    made = next(node for node in built.private_devices.nodes if node.path == "/dev/x")
    assert made.owner == (100007, 100000)
