"""What an ordinary container sees, looked at from inside."""

from __future__ import annotations

from pathlib import Path

from runtime.specgen.capabilities import DEFAULT, NAMES
from runtime.specgen.node_facts import NodeFacts
from runtime.specgen.security.masked_paths import MASKED_PATHS
from tests.integration.spec.conftest import Run
from tests.unit.spec.requests import Image, container

LOOK = """
echo @id; id
echo @umask; umask
echo @status; cat /proc/self/status
echo @env; env
echo @pwd; pwd
echo @mounts; cat /proc/self/mountinfo
echo @dev; ls /dev
echo @kcore; cat /proc/keys /proc/timer_list | wc -c
echo @firmware; ls /sys/firmware | wc -l
echo @proc-sys; echo 1 > /proc/sys/vm/panic_on_oom
echo @sys; mkdir /sys/fs/cgroup/memory/x; touch /sys/kernel/x
echo @hosts; cat /etc/hosts /etc/resolv.conf /etc/hostname
echo @hostname; hostname
echo @shm; echo shared > /dev/shm/file && cat /dev/shm/file
echo @write; touch /new && echo written
echo @mknod; mknod /dev/mem2 c 1 1 && cat /dev/mem2 > /dev/null
echo @fds; ls /proc/self/fd
echo @oom; cat /proc/self/oom_score_adj
echo @limits; cat /proc/self/limits
echo @end
"""


def _masks(status: str) -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {name: int(lines[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}


def test_default_container_from_inside(run: Run, node: NodeFacts) -> None:
    result = run(LOOK, config=container(envs=[{"key": "GREETING", "value": b"hello there"}], working_dir="/srv/here"))
    seen = result.sections()
    assert "end" in seen, result.output
    assert seen["id"].startswith("uid=0(root) gid=0(root)")
    assert seen["umask"] == "0022"
    masks = _masks(seen["status"])
    expected = sum(1 << bit for bit, name in enumerate(NAMES) if name in DEFAULT & node.capabilities)
    assert masks == {"CapInh": 0, "CapPrm": expected, "CapEff": expected, "CapBnd": expected, "CapAmb": 0}
    assert "NoNewPrivs:\t0" in seen["status"]
    assert "Seccomp:\t0" in seen["status"]
    environment = set(seen["env"].splitlines())
    assert {"GREETING=hello there", "PATH=/bin", "HOSTNAME=pod-host", "HOME=/root"} <= environment
    assert seen["pwd"] == "/srv/here"
    assert seen["hostname"] == "pod-host"
    assert seen["hosts"].splitlines() == ["pod's hosts", "pod's resolv.conf", "pod's hostname"]
    assert seen["shm"] == "shared"
    assert seen["write"] == "written"
    assert seen["oom"] == str(max(0, node.min_oom_score_adj))
    assert f" {min(node.max_open_files, 1048576)} " in next(
        line for line in seen["limits"].splitlines() if line.startswith("Max open files")
    )


def test_default_container_is_isolated(run: Run, node: NodeFacts) -> None:
    seen = run(LOOK).sections()
    assert "end" in seen
    targets = {line.split()[4]: line.split() for line in seen["mounts"].splitlines()}
    assert "ro" in targets["/sys"][5].split(",")
    # On cgroup v1 the runtimes put the controllers into a tmpfs of the container's own, which stays writable.
    cgroups = [
        path for path in targets if path.startswith("/sys/fs/cgroup" + ("/" if node.cgroup_version == 1 else ""))
    ]
    assert cgroups
    assert all("ro" in targets[path][5].split(",") for path in cgroups)
    assert {"nosuid", "nodev", "noexec"} <= set(targets["/dev/shm"][5].split(","))
    here = [path for path in MASKED_PATHS if Path(path).exists()]
    assert here
    assert not [path for path in here if path not in targets]
    assert seen["kcore"] == "0"
    assert seen["firmware"] == "0"
    assert "Read-only" in seen["proc-sys"]
    assert "Read-only" in seen["sys"]
    assert "written" not in seen["sys"]
    assert "not permitted" in seen["mknod"]
    devices = set(seen["dev"].split())
    assert {"null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx", "shm", "mqueue"} <= devices
    assert not devices & {"mem", "kmsg", "kvm", "vda", "loop0", "fuse"}
    assert set(seen["fds"].split()) == {"0", "1", "2", "3"}  # 3 is the folder that ls reads


def test_a_working_directory_that_is_missing_is_made_and_the_image_has_a_say(run: Run) -> None:
    result = run("pwd; echo $HOME", image=Image(working_dir="made/by-runtime", user="app", env=["PATH=/bin"]))
    assert result.output.splitlines() == ["/made/by-runtime", "/home/app"]
