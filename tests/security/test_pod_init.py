"""The init of a shared PID namespace: no process of the pod can change its program, root or open files.

A process that traces it gains nothing: the init has no rights, and only the namespaces of the pod.
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
from pathlib import Path

import grpc
import pytest

from host import libc
from host.concurrency.thread_starting import run_in_new_thread
from host.files import mounts
from host.files.procfs import all_pids, command_line
from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import PRELUDE, PYTHON, Attacker, import_image, like_kubelets, with_python
from tests.security.conftest import FIRST_ID, pod_config
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import log_lines, shared_pids

# Tries to change everything of the init that it can reach, through each of the kernel's links to it.
CHANGES = """
import stat
ROOT = %r
def all_below(folder, depth=3):
    names = attempt(os.listdir, folder)
    if isinstance(names, list):
        for name in names:
            path = f"{folder}/{name}"
            yield path
            if depth and attempt(os.path.islink, path) is False and os.path.isdir(path):
                yield from all_below(path, depth - 1)
def write(path):
    with open(path, "r+b", buffering=0) as file:
        file.write(b"#")
    return "written"
def changes(path):
    mode = attempt(os.stat, path)
    yield "chmod", attempt(os.chmod, path, 0o4755)
    yield "chown", attempt(os.chown, path, 1000, 1000)
    yield "touch", attempt(os.utime, path, (1, 1))
    yield "xattr", attempt(os.setxattr, path, "user.mark", b"1")
    if isinstance(mode, os.stat_result) and not stat.S_ISCHR(mode.st_mode):
        yield "write", attempt(write, path)
        yield "rename", attempt(os.rename, path, path + ".moved")
        yield "make", attempt(os.mkdir, path + ".made")
        yield "link", attempt(os.symlink, "/bin/sh", path + "/new")
paths = [ROOT, *all_below(ROOT)]
if ROOT == "/proc/1/root":
    paths += ["/proc/1/exe", "/proc/1/cwd", *all_below("/proc/1/fd", 0), *all_below("/proc/1/cwd")]
found = [(path, what, result) for path in paths for what, result in changes(path)]
answer({"paths": paths, "changed": [entry for entry in found if not str(entry[2]).startswith("E")], "found": found})
"""

POWERS = {
    "no capabilities": (),
    "all kept": ("SYS_PTRACE", "DAC_READ_SEARCH", "LINUX_IMMUTABLE"),
}


# Controls the init with ptrace(2) and makes it execute system calls. It is in a system call, so its program counter is
# after a "syscall" instruction. Calls: socket (AF_UNIX, AF_INET), unshare (CLONE_NEWUSER), mount, ptrace (TRACEME).
TRACE = """
SEIZE, INTERRUPT, GETREGS, SETREGS, STEP, DETACH = 0x4206, 0x4207, 12, 13, 9, 17
def ptrace(request, address=0, data=0):
    return call(101, ctypes.c_long(request), ctypes.c_long(1), ctypes.c_void_p(address), data)
def stopped():
    return os.waitpid(1, 0x40000000)
Registers = ctypes.c_ulong * 27
R10, R9, R8, RAX, RDX, RSI, RDI, ORIG_RAX, RIP = 7, 8, 9, 10, 12, 13, 14, 15, 16
def make(before, number, *arguments):
    registers = Registers(*before)
    registers[RAX], registers[ORIG_RAX], registers[RIP] = number, 2**64 - 1, before[RIP] - 2
    for place, value in zip((RDI, RSI, RDX, R10, R8), arguments):
        registers[place] = value
    assert ptrace(SETREGS, 0, ctypes.byref(registers)) == "done"
    assert ptrace(STEP) == "done"
    stopped()
    assert ptrace(GETREGS, 0, ctypes.byref(registers)) == "done"
    result = ctypes.c_long(registers[RAX]).value
    return result if result >= 0 else errno.errorcode[-result]
seized = ptrace(SEIZE)
results = []
if seized == "done":
    assert ptrace(INTERRUPT) == "done"
    stopped()
    before = Registers()
    assert ptrace(GETREGS, 0, ctypes.byref(before)) == "done"
    calls = (41, 1, 1, 0), (41, 2, 1, 0), (272, 0x10000000), (165, 0, 0, 0, 0, 0), (101, 0, 0, 0, 0)
    results = [make(before, *one) for one in calls]
    before[RIP], before[RAX], before[ORIG_RAX] = before[RIP] - 2, before[ORIG_RAX], 2**64 - 1
    assert ptrace(SETREGS, 0, ctypes.byref(before)) == "done"
    assert ptrace(DETACH) == "done"
answer([seized, results])
"""


@pytest.fixture
def catatonit() -> bytes:
    return Path("/usr/bin/catatonit").read_bytes()


def init_of(agent: AgentProcess, sandbox_id: str) -> int:
    """The pid of a pod's init on the node."""
    for pid in all_pids():
        if sandbox_id.encode() in command_line(pid)[0]:
            return pid
    raise AssertionError("the pod has no init")


def start(agent: AgentProcess, handler: str, config: cri_pb2.ContainerConfig, *, user_namespace: bool) -> Attacker:
    sandbox = pod_config(agent, user_namespace=user_namespace)
    shared_pids(sandbox)
    config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    return Attacker(agent, sandbox, sandbox_id, container_id)


def test_its_root_becomes_read_only_while_a_child_being_started_holds_a_file(tmp_path: Path) -> None:
    """On a busy node, a pod with a shared PID namespace failed with "Device or resource busy: '/dev'"."""

    def make() -> None:
        mounts.enter_new_mount_namespace()
        libc.mount("trial", str(tmp_path), "tmpfs", mounts.MS_NOSUID, "size=64k")
        with (tmp_path / "held").open("w") as held:
            threading.Timer(0.2, held.close).start()
            mounts.make_file_system_read_only(str(tmp_path), mounts.MS_NOSUID)
            with pytest.raises(OSError, match="Read-only file system"):
                (tmp_path / "other").touch()

    run_in_new_thread(make, name="trial")


@pytest.mark.parametrize("powers", POWERS)
def test_nothing_of_the_init_can_be_changed(
    quiet_log: AgentProcess, handler: str, user_namespace: bool, powers: str, catatonit: bytes
) -> None:
    config = with_python(like_kubelets("main"))
    if powers == "no capabilities":
        config.linux.security_context.capabilities.drop_capabilities.append("ALL")
        config.linux.security_context.no_new_privs = True
    config.linux.security_context.capabilities.add_capabilities.extend(POWERS[powers])
    attacker = start(quiet_log, handler, config, user_namespace=user_namespace)
    found = attacker.python(CHANGES % "/proc/1/root")
    assert found["changed"] == []
    assert "/proc/1/exe" in found["paths"]
    if powers == "all kept" and not user_namespace:  # it could enter, so the attempts were real
        assert "/proc/1/root/catatonit" in found["paths"]
        assert {result for path, _, result in found["found"] if path == "/proc/1/root/catatonit"} <= {
            "EROFS",
            "ENOTDIR",
        }
        of_root = {result for path, what, result in found["found"] if path == "/proc/1/root" and what != "rename"}
        assert of_root <= {"EROFS", "EISDIR", "ENOENT"}
    assert Path("/usr/bin/catatonit").read_bytes() == catatonit


def test_working_directory_in_the_root_of_the_init_changes_nothing(
    quiet_log: AgentProcess, handler: str, user_namespace: bool, catatonit: bytes, tmp_path: Path
) -> None:
    """The image's working directory is a link to /proc/1/root. OCI runtimes enter it before they drop rights."""
    link = tarfile.TarInfo("w")
    link.type, link.linkname = tarfile.SYMTYPE, "/proc/1/root"
    image = import_image(quiet_log, tmp_path, "linked-init", [(link, b"")], {"WorkingDir": "/w"})
    program = PRELUDE + CHANGES % "."
    config = with_python(
        like_kubelets("main", PYTHON, "-I", "-c", f"{program}\ntime.sleep(900)", image=image, seccomp=True)
    )
    config.linux.security_context.capabilities.drop_capabilities.append("ALL")
    config.linux.security_context.no_new_privs = True
    sandbox = pod_config(quiet_log, user_namespace=user_namespace)
    shared_pids(sandbox)
    config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    sandbox_id = quiet_log.client.run_sandbox(sandbox, handler)
    try:
        container_id = quiet_log.client.create(sandbox_id, config, sandbox)
        quiet_log.client.start(container_id)
    except grpc.RpcError as error:  # a refusal is good too
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    else:
        log = Path(quiet_log.client.status(container_id).log_path)
        wait_for(lambda: log_lines(log), what="the attacker's word")
        assert json.loads(log_lines(log)[0])["changed"] == []
    assert Path("/usr/bin/catatonit").read_bytes() == catatonit
    assert Path("/usr/bin/catatonit").stat().st_mode & 0o7777 == 0o755


def test_the_root_of_the_init_has_no_file_of_the_node(
    quiet_log: AgentProcess, handler: str, user_namespace: bool
) -> None:
    attacker = start(quiet_log, handler, like_kubelets("main"), user_namespace=user_namespace)
    init = Path(f"/proc/{init_of(quiet_log, attacker.sandbox_id)}")
    inside = [init / "exe", *(init / "fd").iterdir(), init / "root", *(init / "root").rglob("*")]
    node = {
        (status.st_dev, status.st_ino) for status in (Path(p).stat() for p in ("/", "/dev/null", "/usr/bin/catatonit"))
    }
    assert not node & {(status.st_dev, status.st_ino) for status in (path.stat() for path in inside)}
    devices = {path.stat().st_dev for path in (init / "exe", init / "root")}
    mounted = {Path(p).stat().st_dev for p in ("/", "/dev", "/run", "/usr", "/tmp")}
    assert not devices & mounted
    names = {path.name for path in (init / "root").iterdir()}
    assert names <= {"dev", "catatonit", f"podkeel-pod-init-{attacker.sandbox_id}"}
    mounts = (init / "mountinfo").read_text().splitlines()
    assert all(" ro" in line.rpartition(" - ")[2] or "/dev" not in line for line in mounts), mounts
    assert len(mounts) <= 2, mounts


def test_pods_share_their_processes_and_the_init_reaps(
    quiet_log: AgentProcess, handler: str, user_namespace: bool
) -> None:
    attacker = start(quiet_log, handler, like_kubelets("main"), user_namespace=user_namespace)
    assert "sleep" in attacker.shell("cat /proc/[0-9]*/comm")
    attacker.shell("(sh -c 'sleep 0.1 &' &) ; sleep 0.4")
    assert " Z " not in attacker.shell("cat /proc/[0-9]*/stat")


def test_the_init_has_no_rights_and_no_namespace_of_the_node(
    quiet_log: AgentProcess, handler: str, user_namespace: bool
) -> None:
    """It is the only process of the pod that the node starts. Containers can read about its network."""
    attacker = start(quiet_log, handler, like_kubelets("main"), user_namespace=user_namespace)
    init, agent = Path(f"/proc/{init_of(quiet_log, attacker.sandbox_id)}"), Path("/proc/self")
    for kind in ("net", "ipc", "uts", "mnt", "pid"):
        assert (init / "ns" / kind).readlink() != (agent / "ns" / kind).readlink(), kind
    fields = dict(line.split(":\t", 1) for line in (init / "status").read_text().splitlines() if ":\t" in line)
    if user_namespace:
        assert (init / "ns/user").readlink() != (agent / "ns/user").readlink()
        assert fields["Uid"].split() == [str(FIRST_ID)] * 4
    else:
        assert (int(fields["CapPrm"], 16), int(fields["CapEff"], 16), int(fields["CapAmb"], 16)) == (0, 0, 0)
        assert "0" not in fields["Uid"].split() + fields["Gid"].split()
        limits = {line[:25].strip(): line[25:].split()[0] for line in (init / "limits").read_text().splitlines()[1:]}
        assert (limits["Max address space"], limits["Max processes"]) == (str(64 << 20), "1")
        assert (fields["NoNewPrivs"], fields["Seccomp"], fields["Groups"].strip()) == ("1", "2", "")
    assert attacker.shell("cat /proc/1/net/dev | wc -l") == attacker.shell("cat /proc/self/net/dev | wc -l")
    assert attacker.shell("wc -l < /proc/1/net/unix").strip() == "1"  # the header line


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the attack is written for x86-64")
@pytest.mark.parametrize("powers", POWERS)
def test_a_process_that_traces_the_init_gains_nothing(
    quiet_log: AgentProcess, handler: str, user_namespace: bool, powers: str
) -> None:
    config = with_python(like_kubelets("main"))
    config.linux.security_context.capabilities.add_capabilities.extend(POWERS[powers])
    attacker = start(quiet_log, handler, config, user_namespace=user_namespace)
    seized, results = attacker.python(TRACE)
    if user_namespace or powers != "all kept":
        assert seized == "EPERM"
    else:
        assert (seized, set(results)) == ("done", {"EPERM"}), results
    assert init_of(quiet_log, attacker.sandbox_id)
    assert "sleep" in attacker.shell("cat /proc/[0-9]*/comm")
