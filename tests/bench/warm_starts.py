"""How soon a slow service answers: started cold, restored from its checkpoint, and restored by CRIU alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, build_busybox, running_agent, wait_for
from tests.support.checkpoints import abilities, checkpoint, image_of
from tests.support.pods import container_config, sandbox_config

FASTER = 5.0  # a warm start must be so many times faster than a cold one
OVER_CRIU = 1.3  # and may take so many times the duration of CRIU alone
_SECONDS = 600.0
_TRIES = 3
# A service with a slow start: it uses seconds of processor time, fills memory with random data, then answers.
_SERVICE = """
import os, socket, sys, time
mib, seconds = int(sys.argv[1]), float(sys.argv[2])
kept = [os.urandom(1 << 20) for _ in range(mib)]
while time.process_time() < seconds:
    exec(compile("class Some:\\n    def method(self): return 1\\n" * 20, "module", "exec"), {})
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[3])
server.listen()
while True:
    client, _ = server.accept()
    client.sendall(b"ready")
    client.close()
"""
SERVICES = {"Python service, 2 s of imports": (10, 2.0), "500 MiB of memory, 5 s of work": (500, 5.0)}


@dataclass(frozen=True, slots=True)
class WarmStart:
    """Seconds from CreateContainer until a service answers. ``criu`` is for the same program restored by CRIU alone."""

    name: str
    cold: float
    create: float
    warm: float
    criu: float


def measure(folder: Path) -> list[WarmStart]:
    """Measure with a new agent. Raises RuntimeError if crun cannot make checkpoints."""
    with running_agent(folder, build_busybox(folder)) as agent:
        why = abilities(agent).get("crun", "crun does not work here")
        if why != "able":
            raise RuntimeError(f"checkpoints cannot be made here: {why}")
        program = folder / "service"
        program.mkdir()
        (program / "service.py").write_text(_SERVICE)
        return [_measure(agent, folder, name, *service) for name, service in SERVICES.items()]


def _measure(agent: AgentProcess, folder: Path, name: str, mib: int, seconds: float) -> WarmStart:
    arguments = (str(mib), str(seconds), "/service/socket")
    place = folder / "service" / "socket"
    sandbox_id, container_id, cold, _ = _started(agent, _config(folder, *arguments), place)
    archive = folder / "service.tar"
    checkpoint(agent, container_id, archive, timeout=300)
    agent.client.remove_sandbox(sandbox_id)
    image = image_of(agent, archive, "localhost/bench/service:1")
    found = []
    for _ in range(_TRIES):
        sandbox_id, _, warm, create = _started(agent, _config(folder, image=image), place)
        agent.client.remove_sandbox(sandbox_id)
        found.append((warm, create))
    agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=image)))
    archive.unlink()
    warm, create = min(found)
    return WarmStart(name, cold, create, warm, _criu(folder, mib, seconds))


def _config(folder: Path, *arguments: str, image: str = "") -> cri_pb2.ContainerConfig:
    """A container of busybox with the node's Python."""
    places = {"/usr": "/usr", "/lib": "/lib", "/lib64": "/lib64", "/service": str(folder / "service")}
    mounts = [
        cri_pb2.Mount(container_path=place, host_path=os.path.realpath(source), readonly=place != "/service")
        for place, source in places.items()
    ]
    python = (os.path.realpath(sys.executable), "-S", "/service/service.py", *arguments)
    if image:
        return container_config("service", image=image, mounts=mounts)
    return container_config("service", *python, mounts=mounts)


def _started(agent: AgentProcess, config: cri_pb2.ContainerConfig, place: Path) -> tuple[str, str, float, float]:
    """Start a service in a new pod. Returns ids, seconds until it answers, and seconds of CreateContainer."""
    place.unlink(missing_ok=True)
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, "crun")
    begin = time.perf_counter()
    container_id = agent.client.create(sandbox_id, config, sandbox)
    create = time.perf_counter() - begin
    agent.client.start(container_id)
    _wait_for_answer(place)
    return sandbox_id, container_id, time.perf_counter() - begin, create


def _wait_for_answer(place: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(place))
            if client.recv(5) == b"ready":
                return
        time.sleep(0.002)
    raise RuntimeError(f"nothing answers at {place}")


def _criu(folder: Path, mib: int, seconds: float) -> float:
    """Seconds until the same program answers after CRIU alone has restored it."""
    place = folder / "service" / "alone"
    images = folder / "criu"
    images.mkdir()
    script = str(folder / "service" / "service.py")
    command = [os.path.realpath(sys.executable), "-S", script, str(mib), str(seconds), str(place)]
    log = (folder / "service.log").open("wb")
    with log, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True) as it:
        _wait_for_answer(place)
        words = ["criu", "dump", "--tree", str(it.pid), "--images-dir", str(images)]
        subprocess.run(words, check=True, capture_output=True)
        it.wait()
    try:
        return min(_bare_restores(images, place))
    finally:
        subprocess.run(["rm", "-r", str(images)], check=True)


def _bare_restores(images: Path, place: Path) -> Iterator[float]:
    for number in range(_TRIES):
        pid_file = images / f"pid-{number}"
        place.unlink(missing_ok=True)
        begin = time.perf_counter()
        words = ["criu", "restore", "--images-dir", str(images), "--restore-detached", "--pidfile", str(pid_file)]
        subprocess.run(words, check=True, capture_output=True)
        _wait_for_answer(place)
        yield time.perf_counter() - begin
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGKILL)
        wait_for(_gone(pid), what="its end")


def _gone(pid: int) -> Callable[[], bool]:
    def gone() -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return not Path(f"/proc/{pid}").exists()

    return gone


def as_text(starts: Sequence[WarmStart]) -> str:
    """The starts as a text table."""
    head = f"{'until it answers':32} {'cold':>9} {'warm':>9} {'create':>9} {'CRIU':>9} {'faster':>8} {'of CRIU':>8}"
    rows = [
        f"{it.name:32} {it.cold:>7.2f} s {it.warm:>7.2f} s {it.create:>7.2f} s {it.criu:>7.2f} s "
        f"{it.cold / it.warm:>6.1f} x {it.warm / it.criu:>6.2f} x"
        for it in starts
    ]
    goals = f"goals: at least {FASTER:g} times faster than cold, at most {OVER_CRIU:g} times of CRIU alone"
    return "\n".join((head, *rows, goals))
