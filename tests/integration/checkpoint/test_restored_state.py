"""What of a container's processes is there after a restore, with the confinement that kubelet gives."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.manifest.manifest import MASKED_PATHS, READONLY_PATHS
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.checkpoints import checkpoint, image_of, lines_of, run_with, wait_for_lines, why_no_sockets
from tests.support.pods import container_config, sandbox_config, wait_for_log

# Has one of each thing that a restore must bring back, and reports their state in a line of its log, again and again.
PROGRAM = """
import ctypes, fcntl, json, mmap, os, select, signal, socket, threading, time

os.chdir("/tmp/state"); os.umask(0o027)
token = os.urandom(16).hex()
shared = mmap.mmap(-1, 4096)
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
deleted = open("/tmp/state/gone", "w+"); deleted.write("kept" + token); deleted.flush(); os.unlink("/tmp/state/gone")
locked = open("/tmp/state/locked", "w"); fcntl.flock(locked, fcntl.LOCK_EX)
fifo_read, fifo_write = os.pipe()
os.write(fifo_write, token.encode())
back_read, back_write = os.pipe()
child = os.fork()
if child == 0:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in range(10 ** 9):
        shared[:8] = number.to_bytes(8, "little")
        os.write(back_write, b"x")
        time.sleep(0.02)
import sys
server = socket.create_server(("", 8080)) if sys.argv[1] == "tcp" else None
path = socket.socket(socket.AF_UNIX); path.bind("/tmp/state/socket"); path.listen()
left, right = socket.socketpair(); left.sendall(b"in flight")
events = ctypes.CDLL(None).eventfd(7, 0)
poll = select.epoll(); poll.register(back_read, select.EPOLLIN)
memory = os.memfd_create("it"); os.write(memory, b"memfd")
count = 0
def work():
    global count
    while True:
        count += 1
        time.sleep(0.01)
if server: poll.register(server, select.EPOLLIN)
threading.Thread(target=work, daemon=True).start()
received = 0
answered = 0
while True:
    for fd, _ in poll.poll(0.05):
        if fd == back_read:
            received += len(os.read(back_read, 4096))
        else:
            client, _ = server.accept(); client.sendall(token.encode()); client.close(); answered += 1
    deleted.seek(0)
    with open("/tmp/state/locked") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB); held = False
        except OSError:
            held = True
    print(json.dumps({
        "token": token, "cwd": os.getcwd(), "deleted": deleted.read() == "kept" + token, "held": held,
        "umask": open("/proc/self/status").read().split("Umask:")[1].split()[0], "received": received,
        "ticks": ticks, "shared": int.from_bytes(shared[:8], "little"), "child": child, "count": count,
        "threads": threading.active_count(), "pipe": bool(select.select([fifo_read], [], [], 0)[0]),
        "socketpair": right.recv(9, socket.MSG_PEEK).decode(), "memfd": os.pread(memory, 5, 0).decode(),
        "answered": answered, "host": socket.gethostname(), "uid": os.getuid(),
    }), flush=True)
"""
COUNTERS = ("ticks", "received", "shared", "count")


def user() -> int:
    """CRIU saves processes of other users than its own only with CAP_SYS_RESOURCE (24)."""
    status = Path("/proc/self/status").read_text()
    return 1000 if int(status.split("CapEff:")[1].split()[0], 16) >> 24 & 1 else 0


def as_kubelet() -> cri_pb2.LinuxContainerConfig:
    """What kubelet sends for a container under the restricted pod security standard."""
    linux = cri_pb2.LinuxContainerConfig()
    context = linux.security_context
    context.namespace_options.pid = cri_pb2.CONTAINER
    context.run_as_user.value = context.run_as_group.value = user()
    context.supplemental_groups.append(2000)
    context.no_new_privs = context.readonly_rootfs = True
    context.capabilities.drop_capabilities.append("ALL")
    context.seccomp.profile_type = cri_pb2.SecurityProfile.RuntimeDefault
    context.masked_paths.extend(MASKED_PATHS)
    context.readonly_paths.extend(READONLY_PATHS)
    linux.resources.memory_limit_in_bytes = 256 << 20
    linux.resources.cpu_quota = 80_000
    linux.resources.oom_score_adj = 900
    return linux


def mounts(folder: Path) -> list[cri_pb2.Mount]:
    """The node's Python, and a folder to work in as an emptyDir is one."""
    folder.mkdir(exist_ok=True)
    os.chown(folder, user(), user())
    places = {"/usr": "/usr", "/lib": "/lib", "/lib64": "/lib64"}
    read = [
        cri_pb2.Mount(container_path=place, host_path=os.path.realpath(source), readonly=True)
        for place, source in places.items()
    ]
    return [*read, cri_pb2.Mount(container_path="/tmp/state", host_path=str(folder))]


def state(agent: AgentProcess, container_id: str) -> dict[str, Any]:
    """The newest line of its log."""
    told: dict[str, Any] = json.loads(wait_for_lines(agent, container_id, 2)[-1])
    return told


@pytest.mark.parametrize("tcp", [False, True], ids=["", "tcp"])
def test_the_whole_state_of_a_container_is_restored(
    agent: AgentProcess, crun: str, tmp_path: Path, *, tcp: bool
) -> None:
    if tcp and (why := why_no_sockets(agent)):
        pytest.skip(why)
    python = os.path.realpath(sys.executable)
    work = tmp_path / "work"
    sandbox_id, first = run_with(
        agent, crun, python, "-S", "-c", PROGRAM, "tcp" if tcp else "", mounts=mounts(work), linux=as_kubelet()
    )
    wait_for(lambda: len(lines_of(agent, first)) > 20, what="its log", seconds=30)
    checkpoint(agent, first, tmp_path / "it.tar")
    before = state(agent, first)
    agent.client.stop_sandbox(sandbox_id)
    old_log = Path(agent.client.status(first).log_path)
    image = image_of(agent, tmp_path / "it.tar")
    length = old_log.stat().st_size

    sandbox = sandbox_config(agent)
    pod = agent.client.run_sandbox(sandbox, crun)
    config = container_config("main", image=image, mounts=mounts(work), linux=as_kubelet())
    config.log_path = "elsewhere/7.log"
    second = agent.client.create(pod, config, sandbox)
    agent.client.start(second)
    at_first = json.loads(wait_for_lines(agent, second, 1)[0])
    later = state(agent, second)

    for name in ("token", "cwd", "umask", "child", "threads", "socketpair", "memfd", "uid"):
        assert later[name] == before[name], name
    assert (later["cwd"], later["umask"], later["socketpair"], later["memfd"]) == (
        "/tmp/state",
        "0027",
        "in flight",
        "memfd",
    )
    assert later["deleted"] and later["held"] and later["pipe"]
    for name in COUNTERS:
        assert 0 < at_first[name] <= before[name] + 50, name  # it continues from its checkpoint, which is older
    wait_for(lambda: all(state(agent, second)[name] > later[name] for name in COUNTERS), what="all of it to go on")
    if tcp:
        assert agent.client.output(second, "nc", "127.0.0.1", "8080") == before["token"]
    for kind in ("net", "ipc", "uts"):
        shown = agent.client.output(second, "readlink", f"/proc/1/ns/{kind}").strip()
        assert shown == f"{kind}:[{(agent.run / 'sandboxes' / pod / 'ns' / kind).stat().st_ino}]"
    assert later["host"] == sandbox.hostname
    assert agent.client.output(second, "hostname") == f"{sandbox.hostname}\n"
    limits = agent.client.output(second, "cat", "/proc/1/status")
    assert "CapBnd:\t0000000000000000" in limits
    assert "NoNewPrivs:\t1" in limits
    assert "Seccomp:\t2" in limits
    assert limits.split("Groups:")[1].splitlines()[0].split()[-1] == "2000"
    assert agent.client.output(second, "cat", "/proc/1/oom_score_adj") == "900\n"
    status = agent.client.status(second)
    assert status.log_path.endswith("elsewhere/7.log")
    assert old_log.stat().st_size == length  # the new one is its own


def test_two_restores_at_once_do_not_disturb_each_other(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    begin = "t=$(cat /proc/sys/kernel/random/uuid); echo ready; echo $t; i=0"
    script = f"{begin}; while :; do i=$((i+1)); echo $t $i; sleep 0.05; done"
    _, first = run_with(agent, crun, "sh", "-c", script)
    wait_for_log(agent.client, first)
    wait_for_lines(agent, first, 3)
    checkpoint(agent, first, tmp_path / "it.tar")
    token = lines_of(agent, first)[1]
    image = image_of(agent, tmp_path / "it.tar")
    sandboxes = [sandbox_config(agent) for _ in range(3)]
    pods = [agent.client.run_sandbox(sandbox, crun) for sandbox in sandboxes]
    made = [
        agent.client.create(pod, container_config("main", image=image), sandbox)
        for pod, sandbox in zip(pods, sandboxes, strict=True)
    ]
    calls = [
        agent.client.future("StartContainer", cri_pb2.StartContainerRequest(container_id=container_id))
        for container_id in made
    ]
    for call in calls:
        call.result()
    for container_id in made:
        numbers = [line.split() for line in wait_for_lines(agent, container_id, 3)]
        assert {words[0] for words in numbers} == {token}
        found = [int(words[1]) for words in numbers]
        assert found == list(range(found[0], found[0] + len(found)))
