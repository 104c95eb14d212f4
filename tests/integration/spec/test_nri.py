"""What plugins of the node change of a container is seen from inside and in its cgroup, under real OCI runtimes."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from runtime.specgen.node_facts import NodeFacts
from tests.integration.spec.conftest import Run
from tests.unit.spec.requests import container

Linux = nri_pb2.LinuxContainerAdjustment
Optional64 = nri_pb2.OptionalInt64


def adjustment(**fields: Any) -> nri_pb2.ContainerAdjustment:
    linux = {name: fields.pop(name) for name in list(fields) if name in Linux.DESCRIPTOR.fields_by_name}
    adjust = nri_pb2.ContainerAdjustment(**fields)
    if linux:
        adjust.linux.CopyFrom(Linux(**linux))
    return adjust


def resources(**fields: Any) -> nri_pb2.ContainerAdjustment:
    return adjustment(resources=nri_pb2.LinuxResources(**fields))


def test_process(run: Run) -> None:
    env = [
        nri_pb2.KeyValue(key="ADDED", value="a=b c"),
        nri_pb2.KeyValue(key="-GONE"),
        nri_pb2.KeyValue(key="PATH", value="/bin:/x"),
    ]
    limit = nri_pb2.POSIXRlimit(type="RLIMIT_NOFILE", hard=512, soft=256)
    config = container(envs=[cri_pb2.KeyValue(key="GONE", value=b"1")], command=["/bin/false"])
    script = "echo @env; env; echo @files; ulimit -n; echo @hard; ulimit -Hn; echo @score; cat /proc/self/oom_score_adj"
    result = run(
        "",
        config=config,
        adjustment=adjustment(
            args=["/bin/sh", "-c", script], env=env, rlimits=[limit], oom_score_adj=nri_pb2.OptionalInt(value=700)
        ),
    )
    seen = result.sections()
    assert result.status == 0, result.output
    variables = seen["env"].splitlines()
    assert "ADDED=a=b c" in variables
    assert "PATH=/bin:/x" in variables
    assert not [entry for entry in variables if entry.startswith(("GONE", "-GONE"))]
    assert (seen["files"], seen["hard"], seen["score"]) == ("256", "512", "700")


def test_mounts_through_links_of_the_image_stay_inside(run: Run, rootfs: Path, tmp_path: Path) -> None:
    (rootfs / "out").symlink_to("../../../../../../..")
    inside = f"/tmp/{secrets.token_hex(8)}"
    (tmp_path / "given").mkdir()
    (tmp_path / "given/file").write_text("from the plugin\n")
    (tmp_path / "kept").mkdir()
    mounts = [cri_pb2.Mount(container_path=path, host_path=str(tmp_path / "kept")) for path in ("/gone", "/replaced")]
    changes = [
        nri_pb2.Mount(destination="-/gone"),
        nri_pb2.Mount(destination="-/sys"),
        nri_pb2.Mount(destination="/replaced", source=str(tmp_path / "given"), type="bind", options=["rbind", "ro"]),
        nri_pb2.Mount(destination=f"/out{inside}", source=str(tmp_path / "given"), type="bind"),
        nri_pb2.Mount(destination="/memory", source="tmpfs", type="tmpfs", options=["size=64k"]),
    ]
    script = f"echo @x; cat {inside}/file; echo @r; cat /replaced/file; touch /replaced/y 2>&1; echo @m; mount"
    result = run(script, config=container(mounts=mounts), adjustment=adjustment(mounts=changes))
    seen = result.sections()
    assert seen["x"] == "from the plugin"
    assert "Read-only" in seen["r"]
    points = [line.split()[2] for line in seen["m"].splitlines()]
    assert "/memory" in points
    assert not {"/gone", "/sys"} & set(points)
    assert not Path(inside).exists()


def test_mounts_are_refused_where_links_lead_them_over_proc(run: Run, rootfs: Path, tmp_path: Path) -> None:
    (rootfs / "link").symlink_to("proc")
    for destination in ("/link/sys", "/proc/self/attr", "/proc/sysrq-trigger"):
        given = adjustment(mounts=[nri_pb2.Mount(destination=destination, source=str(tmp_path), type="bind")])
        with pytest.raises(InvalidArgumentError):
            run("true", adjustment=given)


def test_a_source_that_is_missing_is_named_with_its_plugin(run: Run, tmp_path: Path) -> None:
    given = adjustment(mounts=[nri_pb2.Mount(destination="/data", source=f"{tmp_path}/none", type="bind")])
    with pytest.raises(InvalidArgumentError, match=r"NRI plugin 10-test: mount /data: .*/none"):
        run("true", adjustment=given)


def test_devices(run: Run, runtime: str) -> None:
    devices = [
        nri_pb2.LinuxDevice(
            path="/dev/injected",
            type="c",
            major=1,
            minor=3,
            file_mode=nri_pb2.OptionalFileMode(value=0o640),
            uid=nri_pb2.OptionalUInt32(value=7),
        ),
        nri_pb2.LinuxDevice(path="-/dev/asked"),
    ]
    config = container(devices=[cri_pb2.Device(host_path="/dev/zero", container_path="/dev/asked", permissions="r")])
    script = "stat -c '%a %u %t:%T' /dev/injected; echo hello > /dev/injected && echo written; ls /dev"
    result = run(script, config=config, adjustment=adjustment(devices=devices))
    lines = result.output.splitlines()
    assert lines[:2] == ["640 7 1:3", "written"]
    assert "asked" not in lines


def test_a_device_is_allowed_without_a_rule(run: Run) -> None:
    """Nothing else allows the container to open it. The node need not have that device."""
    result = run("mknod /x c 10 229; cat /x")
    assert "not permitted" in result.output
    device = nri_pb2.LinuxDevice(path="/dev/fuse2", type="c", major=10, minor=229)
    result = run("head -c 0 /dev/fuse2; echo done", adjustment=adjustment(devices=[device]))
    assert "not permitted" not in result.output
    assert result.output.endswith("done\n")


@pytest.mark.parametrize(
    ("given", "file", "value"),
    [
        (nri_pb2.LinuxMemory(limit=Optional64(value=32 << 20)), "memory/memory.limit_in_bytes", str(32 << 20)),
        (nri_pb2.LinuxMemory(limit=Optional64(value=32 << 20)), "memory/memory.memsw.limit_in_bytes", str(32 << 20)),
        (
            nri_pb2.LinuxMemory(limit=Optional64(value=32 << 20), swap=Optional64(value=48 << 20)),
            "memory/memory.memsw.limit_in_bytes",
            str(48 << 20),
        ),
        (
            nri_pb2.LinuxMemory(reservation=Optional64(value=16 << 20)),
            "memory/memory.soft_limit_in_bytes",
            str(16 << 20),
        ),
        (nri_pb2.LinuxMemory(swappiness=nri_pb2.OptionalUInt64(value=13)), "memory/memory.swappiness", "13"),
        (nri_pb2.LinuxMemory(swappiness=nri_pb2.OptionalUInt64(value=0)), "memory/memory.swappiness", "0"),
        (
            nri_pb2.LinuxMemory(disable_oom_killer=nri_pb2.OptionalBool(value=True)),
            "memory/memory.oom_control",
            "oom_kill_disable 1",
        ),
        (nri_pb2.LinuxCPU(shares=nri_pb2.OptionalUInt64(value=512)), "cpu/cpu.shares", "512"),
        (
            nri_pb2.LinuxCPU(quota=Optional64(value=20000), period=nri_pb2.OptionalUInt64(value=50000)),
            "cpu/cpu.cfs_quota_us",
            "20000",
        ),
        (nri_pb2.LinuxCPU(cpus="0"), "cpuset/cpuset.cpus", "0"),
        (nri_pb2.LinuxCPU(mems="0"), "cpuset/cpuset.mems", "0"),
        (nri_pb2.LinuxPids(limit=77), "pids/pids.max", "77"),
        (nri_pb2.LinuxPids(limit=0), "pids/pids.max", "max"),
        (nri_pb2.HugepageLimit(page_size="2MB", limit=4 << 20), "hugetlb/hugetlb.2MB.limit_in_bytes", str(4 << 20)),
    ],
)
def test_resources_are_in_cgroup_files(run: Run, node: NodeFacts, given: Any, file: str, value: str) -> None:
    if node.cgroup_version == 2:
        pytest.skip("the files are those of cgroup v1")
    fields = {
        nri_pb2.LinuxMemory: "memory",
        nri_pb2.LinuxCPU: "cpu",
        nri_pb2.LinuxPids: "pids",
        nri_pb2.HugepageLimit: "hugepage_limits",
    }
    name = fields[type(given)]
    config = container(command=["/bin/sh", "-c", f"cat /sys/fs/cgroup/{file}"])
    result = run("", config=config, adjustment=resources(**{name: [given] if name == "hugepage_limits" else given}))
    assert result.output.splitlines()[0] == value, result.output


def test_sysctls(run: Run) -> None:
    given = {"net.core.somaxconn": "77", "kernel.shm_rmid_forced": "1"}
    result = run(
        "cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shm_rmid_forced", adjustment=adjustment(sysctl=given)
    )
    assert result.output.split() == ["77", "1"]


def test_namespaces(run: Run) -> None:
    script = "readlink /proc/self/ns/uts; readlink /proc/self/ns/ipc; readlink /proc/self/ns/net"
    before = run(script).output.split()
    given = [
        nri_pb2.LinuxNamespace(type="uts"),
        nri_pb2.LinuxNamespace(type="ipc", path="/proc/self/ns/ipc"),
        nri_pb2.LinuxNamespace(type="-network"),
    ]
    after = run(script, adjustment=adjustment(namespaces=given)).output.split()
    assert after[0] != before[0]
    assert after[1] == str(Path("/proc/self/ns/ipc").readlink())
    assert after[2] == str(Path("/proc/self/ns/net").readlink())


def test_seccomp_policy_takes_the_place_of_the_profile(run: Run) -> None:
    policy = nri_pb2.LinuxSeccomp(default_action="SCMP_ACT_ALLOW", architectures=["SCMP_ARCH_X86_64"])
    policy.syscalls.add(names=["mkdir", "mkdirat"], action="SCMP_ACT_ERRNO").errno_ret.value = 95
    context = cri_pb2.LinuxContainerSecurityContext(
        seccomp=cri_pb2.SecurityProfile(profile_type=cri_pb2.SecurityProfile.RuntimeDefault)
    )
    config = container(linux=cri_pb2.LinuxContainerConfig(security_context=context))
    result = run(
        "mkdir /x; unshare -u true && echo unshared", config=config, adjustment=adjustment(seccomp_policy=policy)
    )
    assert "not supported" in result.output
    assert "Function not implemented" not in result.output


def test_hooks_of_every_stage(run: Run, runtime: str, tmp_path: Path, rootfs: Path) -> None:
    # crun 1.8.1 takes a hook with a time limit for hung when another of its children ends at the same moment.
    limit = 0 if runtime == "crun" else 10
    log = tmp_path / "log"
    program = tmp_path / "hook"
    program.write_text(f'#!/bin/sh\ncat > /dev/null\necho "$1 $HOOK" >> {log}\n')
    program.chmod(0o755)
    inside = rootfs / "bin/hook"
    inside.write_text('#!/bin/sh\ncat > /dev/null\necho "$1 $HOOK" >> /tmp/log\n')
    inside.chmod(0o755)
    hooks = nri_pb2.Hooks()
    for stage in ("prestart", "create_runtime", "create_container", "poststart", "poststop"):
        hook = getattr(hooks, stage).add(path=str(program), args=["hook", stage], env=["HOOK=set"])
        if limit:
            hook.timeout.value = limit
    hooks.start_container.add(path="/bin/hook", args=["hook", "start_container"], env=["HOOK=set", "PATH=/bin"])
    result = run("cat /tmp/log", adjustment=adjustment(hooks=hooks))
    assert result.output.strip() == "start_container set"
    seen = [line.split() for line in log.read_text().splitlines()]
    assert {stage for stage, _ in seen} >= {"prestart", "create_runtime", "create_container", "poststart"}
    assert all(value == "set" for _, value in seen)


def test_cdi_device_that_a_plugin_asks_for(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "cdi"
    folder.mkdir()
    (folder / "x.json").write_text(
        '{"cdiVersion":"0.6.0","kind":"vendor.com/thing","devices":[{"name":"one","containerEdits":{"env":["THING=one"]}}]}'
    )
    given = adjustment(CDI_devices=[nri_pb2.CDIDevice(name="vendor.com/thing=one")])
    result = run("echo $THING", adjustment=given, cdi_folders=[folder])
    assert result.output.strip() == "one"
