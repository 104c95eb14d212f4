"""What several plugins answer to CreateContainer becomes one adjustment, or a conflict that names both."""

from __future__ import annotations

from typing import Any

import pytest

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.answers.merging import Merging
from runtime.nri.answers.owners import ConflictError, Owners

Adjustment = nri_pb2.ContainerAdjustment
Linux = nri_pb2.LinuxContainerAdjustment
Field = nri_pb2.Field


@pytest.fixture
def merging() -> Merging:
    container = nri_pb2.Container(
        id="c1",
        args=["serve"],
        env=["PATH=/bin", "MODE=old"],
        annotations={"a": "1"},
        mounts=[nri_pb2.Mount(destination="/data", source="/host")],
    )
    container.linux.sysctl["net.core.somaxconn"] = "128"
    container.linux.devices.add(path="/dev/fuse", type="c", major=10, minor=229)
    return Merging(container, Owners("container web"))


def test_a_later_plugin_sees_what_an_earlier_one_changed(merging: Merging) -> None:
    given = Adjustment(annotations={"b": "2"}, env=[nri_pb2.KeyValue(key="X", value="a=b")], args=["serve", "--fast"])
    given.mounts.add(destination="/extra", source="/from")
    merging.add("10-first", given)
    now = merging.container
    assert dict(now.annotations) == {"a": "1", "b": "2"}
    assert list(now.env) == ["PATH=/bin", "MODE=old", "X=a=b"]
    assert list(now.args) == ["serve", "--fast"]
    assert [mount.destination for mount in now.mounts] == ["/data", "/extra"]


ALL: list[tuple[str, Adjustment, Field]] = [
    ("annotation", Adjustment(annotations={"k": "v"}), Field.Annotations),
    ("variable", Adjustment(env=[nri_pb2.KeyValue(key="K", value="v")]), Field.Env),
    ("mount", Adjustment(mounts=[nri_pb2.Mount(destination="/m", source="/s")]), Field.Mounts),
    ("arguments", Adjustment(args=["x"]), Field.Args),
    ("limit", Adjustment(rlimits=[nri_pb2.POSIXRlimit(type="RLIMIT_CORE", hard=1, soft=1)]), Field.Rlimits),
    ("CDI device", Adjustment(CDI_devices=[nri_pb2.CDIDevice(name="v/c=d")]), Field.CdiDevices),
    ("device", Adjustment(linux=Linux(devices=[nri_pb2.LinuxDevice(path="/dev/x")])), Field.Devices),
    ("namespace", Adjustment(linux=Linux(namespaces=[nri_pb2.LinuxNamespace(type="ipc")])), Field.Namespace),
    ("sysctl", Adjustment(linux=Linux(sysctl={"net.a": "1"})), Field.Sysctl),
    (
        "net device",
        Adjustment(linux=Linux(net_devices={"eth1": nri_pb2.LinuxNetDevice(name="x")})),
        Field.LinuxNetDevices,
    ),
    ("cgroup", Adjustment(linux=Linux(cgroups_path="/x")), Field.CgroupsPath),
    ("score", Adjustment(linux=Linux(oom_score_adj=nri_pb2.OptionalInt(value=0))), Field.OomScoreAdj),
    ("I/O", Adjustment(linux=Linux(io_priority=nri_pb2.LinuxIOPriority(priority=1))), Field.IoPriority),
    ("seccomp", Adjustment(linux=Linux(seccomp_policy=nri_pb2.LinuxSeccomp())), Field.SeccompPolicy),
    ("scheduler", Adjustment(linux=Linux(scheduler=nri_pb2.LinuxScheduler())), Field.LinuxSched),
    ("memory policy", Adjustment(linux=Linux(memory_policy=nri_pb2.LinuxMemoryPolicy())), Field.MemoryPolicy),
    (
        "class",
        Adjustment(linux=Linux(rdt=nri_pb2.LinuxRdt(clos_id=nri_pb2.OptionalString(value="a")))),
        Field.RdtClosID,
    ),
]


@pytest.mark.parametrize(("what", "given", "number"), ALL, ids=[entry[0] for entry in ALL])
def test_two_plugins_that_set_the_same_thing_conflict(
    merging: Merging, what: str, given: Adjustment, number: Field
) -> None:
    merging.add("10-first", given)
    with pytest.raises(ConflictError, match=r"container web: NRI plugins 10-first and 20-second both set") as caught:
        merging.add("20-second", given)
    assert Field.Name(number) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("memory", {"limit": 1}, Field.MemLimit),
        ("memory", {"reservation": 0}, Field.MemReservation),
        ("memory", {"swap": -1}, Field.MemSwapLimit),
        ("memory", {"swappiness": 0}, Field.MemSwappiness),
        ("memory", {"disable_oom_killer": False}, Field.MemDisableOomKiller),
        ("cpu", {"shares": 2}, Field.CPUShares),
        ("cpu", {"quota": -1}, Field.CPUQuota),
        ("cpu", {"realtime_period": 1}, Field.CPURealtimePeriod),
    ],
)
def test_each_value_of_the_resources_has_one_owner(
    merging: Merging, name: str, value: dict[str, Any], number: Field
) -> None:
    given = Adjustment()
    for key, wanted in value.items():
        getattr(getattr(given.linux.resources, name), key).value = wanted
    merging.add("10-first", given)
    assert merging.owners.message().simple[number] == "10-first"
    assert merging.adjustment.linux.resources == given.linux.resources
    with pytest.raises(ConflictError, match=Field.Name(number)):
        merging.add("20-second", given)


def test_a_removal_frees_what_another_plugin_set(merging: Merging) -> None:
    merging.add("10-first", Adjustment(annotations={"k": "1"}, env=[nri_pb2.KeyValue(key="MODE", value="new")]))
    merging.add(
        "20-second",
        Adjustment(
            annotations={"-k": "", "k": "2", "-a": ""},
            env=[nri_pb2.KeyValue(key="-MODE"), nri_pb2.KeyValue(key="MODE", value="newer")],
            mounts=[nri_pb2.Mount(destination="-/data")],
            linux=Linux(sysctl={"-net.core.somaxconn": ""}, devices=[nri_pb2.LinuxDevice(path="-/dev/fuse")]),
        ),
    )
    now = merging.container
    assert (dict(now.annotations), list(now.env)) == ({"k": "2"}, ["PATH=/bin", "MODE=newer"])
    assert (list(now.mounts), dict(now.linux.sysctl), list(now.linux.devices)) == ([], {}, [])
    owners = merging.owners.message()
    assert dict(owners.compound[Field.Annotations].owners) == {"k": "20-second", "a": "-20-second"}
    assert merging.owners.changes()["-Mounts /data"] == "20-second"
    changed = merging.adjustment
    assert dict(changed.annotations) == {"-k": "", "k": "2", "-a": ""}
    assert [mount.destination for mount in changed.mounts] == ["-/data"]
    assert [device.path for device in changed.linux.devices] == ["-/dev/fuse"]


def test_arguments_are_replaced_after_an_empty_first_one(merging: Merging) -> None:
    merging.add("10-first", Adjustment(args=["a"]))
    merging.add("20-second", Adjustment(args=["", "b", "c"]))
    assert list(merging.adjustment.args) == ["b", "c"]
    assert merging.owners.message().simple[Field.Args] == "20-second"


def test_hooks_of_several_plugins_add_up(merging: Merging) -> None:
    for name in ("10-first", "20-second"):
        given = Adjustment()
        given.hooks.poststop.add(path=f"/{name}")
        merging.add(name, given)
    assert [hook.path for hook in merging.adjustment.hooks.poststop] == ["/10-first", "/20-second"]
    assert merging.owners.message().simple[Field.OciHooks] == "10-first,20-second"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Adjustment(env=[nri_pb2.KeyValue(key="")]), "not a name of a variable"),
        (Adjustment(env=[nri_pb2.KeyValue(key="-")]), "not a name of a variable"),
        (Adjustment(env=[nri_pb2.KeyValue(key="A=B")]), "not a name of a variable"),
        (Adjustment(args=[""]), "no command is left"),
        (Adjustment(mounts=[nri_pb2.Mount(destination="-")]), "destination is empty"),
        (Adjustment(linux=Linux(devices=[nri_pb2.LinuxDevice()])), "path is empty"),
        (
            Adjustment(linux=Linux(resources=nri_pb2.LinuxResources(hugepage_limits=[nri_pb2.HugepageLimit(limit=1)]))),
            "has no page size",
        ),
    ],
)
def test_invalid_adjustments_are_refused(merging: Merging, given: Adjustment, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        merging.add("10-first", given)
