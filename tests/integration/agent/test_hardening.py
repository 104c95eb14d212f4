"""Known ways out of a container, each tried from inside, and none may lead out.

A test that fails here changes nothing on the host: what is written is what was there, and what is called does nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import (
    PRELUDE,
    PYTHON,
    Attacker,
    confined_by_apparmor,
    init_pid,
    like_kubelets,
    with_python,
)
from tests.integration.streaming.websocket_client import WebSocketClient
from tests.support.agent import PATIENCE, AgentProcess, wait_for
from tests.support.pods import log_lines, shared_pids, wait_for_log

# System calls that a container without capabilities has no use for, by machine.
_NUMBERS = {
    "x86_64": "mount 165 umount2 166 pivot_root 155 fsopen 430 unshare 272 setns 308 keyctl 250 add_key 248"
    " request_key 249 bpf 321 perf_event_open 298 io_uring_setup 425 userfaultfd 323 open_by_handle_at 304"
    " kexec_load 246 init_module 175 delete_module 176 swapon 167 reboot 169 settimeofday 164 syslog 103 quotactl 179"
    " acct 163 clone3 435 ptrace 101",
    "aarch64": "mount 40 umount2 39 pivot_root 41 fsopen 430 unshare 97 setns 268 keyctl 219 add_key 217"
    " request_key 218 bpf 280 perf_event_open 241 io_uring_setup 425 userfaultfd 282 open_by_handle_at 265"
    " kexec_load 104 init_module 105 delete_module 106 swapon 224 reboot 142 settimeofday 170 syslog 116 quotactl 60"
    " acct 89 clone3 435 ptrace 117",
}


def numbers() -> dict[str, int]:
    words = _NUMBERS[platform.machine()].split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


@pytest.fixture
def attacker(agent: AgentProcess, handler: str) -> Attacker:
    return Attacker.start(agent, handler, with_python(like_kubelets("main")))


@pytest.fixture
def core_pattern() -> Iterator[None]:
    """The file by which many an escape ran its program on the host stays as it is."""
    path = Path("/proc/sys/kernel/core_pattern")
    before = path.read_text()
    yield
    assert path.read_text() == before


# Looks into every process that appears beside it, keeps what it may open of their programs and lists their descriptors.
WATCH = """
known, programs, seen = set(os.listdir("/proc")), [], {}
end = time.monotonic() + WATCH_SECONDS
while time.monotonic() < end:
    for pid in set(os.listdir("/proc")) - known:
        if not pid.isdigit():
            continue
        try:
            program = os.readlink(f"/proc/{pid}/exe")
            for number in os.listdir(f"/proc/{pid}/fd"):
                seen[os.readlink(f"/proc/{pid}/fd/{number}")] = program
            if not program.startswith("/bin/") and len(programs) < 40:
                programs.append(os.open(f"/proc/{pid}/exe", os.O_RDONLY))
        except OSError:
            continue
def overwrite(program):
    writable = os.open(f"/proc/self/fd/{program}", os.O_RDWR)
    return "written" if os.pwrite(writable, os.pread(writable, 1, 0), 0) else "nothing"
while "ETXTBSY" in (results := [attempt(overwrite, program) for program in programs]) and time.monotonic() < end + 5:
    time.sleep(0.05)
answer({"results": results, "seen": seen})
"""


@pytest.mark.parametrize("powers", [(), ("SYS_PTRACE", "DAC_READ_SEARCH")])
def test_runtime_program_cannot_be_overwritten_nor_looked_into(
    agent: AgentProcess, handler: str, powers: tuple[str, ...]
) -> None:
    """CVE-2019-5736: the runtime enters the container to execute, there is opened by /proc/PID/exe and overwritten."""
    program = Path(shutil.which(handler) or "")
    before = hashlib.sha256(program.read_bytes()).digest()
    config = with_python(like_kubelets("main"))
    config.linux.security_context.capabilities.add_capabilities.extend(powers)
    attacker = Attacker.start(agent, handler, config)
    found: list[dict[str, object]] = []
    watching = threading.Thread(
        target=lambda: found.append(attacker.python(f"WATCH_SECONDS = {min(1.5 * PATIENCE, 8)}\n{WATCH}"))
    )
    watching.start()
    versions, end = 0, time.monotonic() + min(2 * PATIENCE, 12)
    while time.monotonic() < end:
        versions += b"version" in agent.client.exec(attacker.container_id, "/proc/self/exe", "--version").stdout
        agent.client.exec(attacker.container_id, "true")
    watching.join()
    assert versions > 2, "the runtime was not executed inside"
    results, seen = found[0]["results"], found[0]["seen"]
    assert isinstance(results, list)
    assert isinstance(seen, dict)
    assert results or confined_by_apparmor(agent, attacker.container_id), "no program was seen"
    assert set(results) <= {"EROFS", "EPERM", "EACCES", "ETXTBSY"}, results
    assert hashlib.sha256(program.read_bytes()).digest() == before
    if "SYS_PTRACE" in powers:
        return  # which is the right to look into the runtime while it is inside
    # What the agent hands to the runtime for this one call is not for the container's eyes, nor are files of the host.
    # What is its own program, which was executed inside above, looks at itself and is open to all that see it.
    seen = {link: by for link, by in seen.items() if not link.startswith(f"/memfd:{handler} ")}
    leaks = [link for link in seen if "memfd:" in link or "podkeel" in link or str(agent.folder) in link]
    assert not leaks, {link: seen[link] for link in leaks}


def test_script_of_the_runtime_s_own_program(agent: AgentProcess, handler: str) -> None:
    """The same by the container's first process, a script whose interpreter is /proc/self/exe."""
    attacker = Attacker.start(agent, handler, like_kubelets("main"))
    attacker.shell("printf '#!/proc/self/exe\\n' > /bin/entry; chmod +x /bin/entry")
    output = attacker.shell("/bin/entry; echo ended")
    assert "ended" in output
    assert handler not in output


DESCRIPTORS = """
found = {}
for number in os.listdir("/proc/self/fd"):
    link = attempt(os.readlink, f"/proc/self/fd/{number}")
    if link != "ENOENT":  # the folder that is being listed
        found[number] = link
answer(found)
"""


@pytest.mark.parametrize("how", ["plain", "stdin", "terminal"])
def test_first_process_has_no_descriptors_but_its_own(agent: AgentProcess, handler: str, how: str) -> None:
    config = like_kubelets("main", stdin=how != "plain", tty=how == "terminal")
    attacker = Attacker.start(agent, handler, config)
    process = Path(f"/proc/{init_pid(agent, attacker.container_id)}")
    wait_for(lambda: (process / "comm").read_text() == "sleep\n", what="the runtime's last step")
    folder = process / "fd"
    assert sorted(entry.name for entry in folder.iterdir()) == ["0", "1", "2"]
    links = {str((folder / name).readlink()) for name in "012"}
    assert all(link == "/dev/null" or link.startswith(("pipe:", "/dev/pts/")) for link in links), links


def test_executed_process_has_no_descriptors_but_its_own(attacker: Attacker) -> None:
    found = attacker.python(DESCRIPTORS)
    assert sorted(found) == ["0", "1", "2"], found


@pytest.mark.parametrize("how", ["plain", "stdin", "terminal"])
def test_process_of_an_exec_stream_has_no_descriptors_but_its_own(attacker: Attacker, how: str) -> None:
    request = cri_pb2.ExecRequest(
        container_id=attacker.container_id,
        cmd=[PYTHON, "-I", "-c", PRELUDE + DESCRIPTORS],
        stdin=how != "plain",
        stdout=True,
        tty=how == "terminal",
    )
    url = attacker.agent.client.call("Exec", request).url

    async def read() -> str:
        client = await WebSocketClient.connect(url, "v4.channel.k8s.io")
        await client.closed()
        await client.close()
        return client.text(1)

    found = json.loads(asyncio.run(read()))
    assert sorted(found) == ["0", "1", "2"], found


def test_silent_streams_are_not_the_node_s_null_device(attacker: Attacker) -> None:
    """Root inside may change the mode of what it is handed; that must not be a file of the node's."""
    before = Path("/dev/null").stat()
    look = "answer([os.fstat(0).st_dev, os.fstat(0).st_ino, attempt(os.fchmod, 0, 0), os.read(0, 1).decode()])"
    device, inode, _, read = attacker.python(look)
    assert (device, inode) != (before.st_dev, before.st_ino)
    assert read == ""
    assert Path("/dev/null").stat().st_mode == before.st_mode
    assert init_pid(attacker.agent, attacker.container_id) > 0
    first = Path(f"/proc/{init_pid(attacker.agent, attacker.container_id)}/fd/0").stat()
    assert (first.st_dev, first.st_ino) != (before.st_dev, before.st_ino)
    assert attacker.python("answer(os.read(0, 1).decode())") == ""


# Each line tries one way to change something of the node's; every write is of the value that is there.
ESCAPES = r"""
try() { name=$1; shift; if "$@" 2>/dev/null; then echo "$name: DONE"; else echo "$name: refused"; fi; }
same() { value=$(cat "$1") && echo "$value" > "$1"; }
any() { for path in "$@"; do same "$path" && return 0; done; return 1; }
mkdir -p /tmp/p /tmp/s /tmp/c
try core_pattern same /proc/sys/kernel/core_pattern
try panic_on_oom same /proc/sys/vm/panic_on_oom
try modprobe same /proc/sys/kernel/modprobe
try binfmt_misc same /proc/sys/fs/binfmt_misc/status
try sysrq sh -c 'echo h > /proc/sysrq-trigger'
try irq any /proc/irq/default_smp_affinity
try kcore sh -c 'head -c 1 /proc/kcore | grep -q .'
try keys sh -c 'head -c 1 /proc/keys | grep -q .'
try uevent_helper same /sys/kernel/uevent_helper
try sys_module any /sys/module/*/parameters/*
try release_agent any /sys/fs/cgroup/release_agent /sys/fs/cgroup/*/release_agent
try memory_limit any /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max
try devices_allow sh -c 'echo a > /sys/fs/cgroup/devices/devices.allow'
try new_cgroup mkdir /sys/fs/cgroup/pids/inner
try proc_again sh -c 'mount -t proc proc /tmp/p && head -c 1 /tmp/p/kcore | grep -q .'
try proc_sys_again sh -c 'mount -t proc proc /tmp/p && cat /tmp/p/sys/vm/panic_on_oom | tee /tmp/p/sys/vm/panic_on_oom'
try cgroup_again mount -t cgroup -o pids pids /tmp/c
try cgroup2_again sh -c 'mount -t cgroup2 none /tmp/c && mkdir /tmp/c/inner'
try remount mount -o remount,rw,bind /proc/sys
try remount_sys mount -o remount,rw,bind /sys
try unmask umount /proc/kcore
try unmask_lazily umount -l /proc/sys
try kernel_memory sh -c 'mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem | grep -q .'
try kernel_log sh -c 'mknod /tmp/kmsg c 1 11 && echo > /tmp/kmsg'
try disk sh -c 'mknod /tmp/disk b DISK && head -c 1 /tmp/disk > /dev/null'
try chroot_out sh -c 'mkdir -p /tmp/r && chroot /tmp/r true'
try hostname hostname other
"""
# Not by unshare(1), which mounts something itself: AppArmor denies that, so that nothing else would be tried.
AS_ROOT = """
if libc.unshare(0x10020000) != 0:
    sys.exit("no user namespace")
for name, value in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
    with open("/proc/self/" + name, "w") as file:
        file.write(value)
os.execv("/bin/sh", ["sh", "/tmp/escapes"])
"""
INSIDE = ("plain", "as root of a user namespace", "with seccomp")


@pytest.mark.parametrize("inside", INSIDE)
def test_kernel_and_devices_cannot_be_reached(
    agent: AgentProcess, handler: str, inside: str, core_pattern: None
) -> None:
    disk = Path("/").stat().st_dev
    script = ESCAPES.replace("DISK", f"{os.major(disk)} {os.minor(disk)}")
    config = with_python(like_kubelets("main", seccomp=inside == "with seccomp"))
    attacker = Attacker.start(agent, handler, config)
    if inside == "as root of a user namespace":
        script = f"cat > /tmp/escapes <<'end'\n{script}\nend\n{PYTHON} -I -c '{PRELUDE}{AS_ROOT}'"
    output = attacker.shell(script)
    lines = [line.split(": ") for line in output.splitlines() if line.endswith((": refused", ": DONE"))]
    assert len(lines) == ESCAPES.count("\ntry "), output
    assert [name for name, result in lines if result == "DONE"] == []


# Called without arguments, which would do nothing if it were allowed.
CALLS = "answer({name: call(number, 0, 0, 0, 0, 0) for name, number in %s.items()})"


def test_default_seccomp_profile_keeps_calls_out(agent: AgentProcess, handler: str) -> None:
    attacker = Attacker.start(agent, handler, with_python(like_kubelets("main", seccomp=True)))
    wanted = {name: number for name, number in numbers().items() if name != "ptrace"}
    results = attacker.python(CALLS % wanted)
    assert results == {name: "ENOSYS" if name == "clone3" else "EPERM" for name in wanted}
    clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    forked = f"answer(call({clone}, 0x10000000 | 17, 0, 0, 0, 0))"
    assert attacker.python(forked) == "EPERM"  # clone of a user namespace
    sockets = """
from socket import *
kinds = ((AF_VSOCK, SOCK_STREAM, 0), (AF_INET, SOCK_RAW, 1), (AF_PACKET, SOCK_RAW, 0))
answer([attempt(lambda: socket(*kind).close()) for kind in kinds])"""
    assert attacker.python(sockets) == ["EPERM", None, None]  # CAP_NET_RAW is in the default set, as documented


def test_keyrings_are_the_container_s_own(agent: AgentProcess, handler: str) -> None:
    """The keys of all are hidden in /proc/keys; here it is about who has which session keyring."""
    keyctl = numbers()["keyctl"]
    look = f"answer([libc.syscall(ctypes.c_long({keyctl}), 0, keyring, 0) for keyring in (-3, -5)])"
    seen = []
    for _ in range(2):
        config = with_python(
            like_kubelets("main", PYTHON, "-I", "-c", f"{PRELUDE}{look}\nos.closerange(0, 3)\ntime.sleep(900)")
        )
        attacker = Attacker.start(agent, handler, config)
        path = agent.client.status(attacker.container_id).log_path
        wait_for(lambda path=path: log_lines(path), what="the container's word")
        first, executed = json.loads(log_lines(path)[0]), attacker.python(look)
        assert first[0] != first[1], "the first process has no own session keyring"
        assert executed[0] != executed[1], "an executed one has that of all who have none"
        seen.append(first[0])
    assert len(set(seen)) == 2


def test_processes_of_the_host_are_out_of_sight_and_reach(attacker: Attacker) -> None:
    agent = attacker.agent
    trace = numbers()["ptrace"]
    look = f"answer([sorted(os.listdir('/proc')), call({trace}, 16, {agent.pid()}, 0, 0)])"
    entries, traced = attacker.python(look)
    assert len([entry for entry in entries if entry.isdigit()]) == 2
    assert traced == "ESRCH"


def test_processes_of_the_host_can_be_seen_but_not_entered_with_host_pid(agent: AgentProcess, handler: str) -> None:
    config = with_python(like_kubelets("main"))
    config.linux.security_context.namespace_options.pid = cri_pb2.NODE
    attacker = Attacker.start(agent, handler, config)
    inside = init_pid(agent, attacker.container_id)
    monitor = int(Path(f"/proc/{inside}/stat").read_text().rpartition(")")[2].split()[1])
    trace = numbers()["ptrace"]
    for pid in (agent.pid(), monitor):
        look = f"answer([call({trace}, 16, {pid}, 0, 0)] + [attempt(os.readlink, '/proc/{pid}/' + name)"
        look += " for name in ('root', 'cwd', 'fd/0')])"
        assert attacker.python(look) == ["EPERM", "EACCES", "EACCES", "EACCES"]


def test_init_of_a_shared_pid_namespace_shows_nothing(agent: AgentProcess, handler: str) -> None:
    """It is the agent's own process, with more rights than the containers that share its namespace."""
    config = with_python(like_kubelets("main"))
    shared_pids(config)
    config.linux.security_context.capabilities.add_capabilities.append("SYS_PTRACE")
    attacker = Attacker.start(agent, handler, config)
    found = attacker.python("answer([attempt(os.readlink, '/proc/1/exe'), attempt(os.listdir, '/proc/1/root')])")
    assert found[0] in ("/catatonit", "EACCES")
    assert found[1] == "EACCES" or set(found[1]) == {"catatonit", "dev"}


def test_memory_of_other_pods_is_out_of_reach(attacker: Attacker) -> None:
    other = Attacker.start(attacker.agent, "", with_python(like_kubelets("main")))
    make = "answer(libc.shmget(0x706b, 4096, 0o1600))"
    get = "answer(attempt(libc.shmget, 0x706b, 4096, 0))"
    other.shell("echo secret > /dev/shm/secret")
    assert other.python(make) >= 0
    assert attacker.python("answer(os.listdir('/dev/shm'))") == []
    assert attacker.python(get) == -1


def test_descriptors_of_a_container_in_the_same_pod_are_closed_to_it(agent: AgentProcess, handler: str) -> None:
    """Containers of one pod that do not share processes see neither each other's processes nor files."""
    attacker = Attacker.start(agent, handler, like_kubelets("main"))
    attacker.beside(like_kubelets("other", "sleep", "2000"))
    assert "2000" not in attacker.shell("ps")


def test_entry_by_way_of_the_own_program_logs_nothing_of_the_host(agent: AgentProcess, handler: str) -> None:
    """A container whose first process is /proc/self/exe runs the runtime with nothing to work on."""
    config = with_python(like_kubelets("main", "sh", "-c", "echo ready; exec sleep 1000"))
    attacker = Attacker.start(agent, handler, config)
    wait_for_log(agent.client, attacker.container_id)
    assert json.dumps(log_lines(agent.client.status(attacker.container_id).log_path)) == '["ready"]'
    state = agent.client.exec(attacker.container_id, "/proc/self/exe", "--root", f"{agent.run}/oci/{handler}", "list")
    assert attacker.container_id.encode() not in state.stdout
