"""A real agent in a separate process, with its own folders, bridge, subnet and cgroup parent."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.cri import CriClient
from tests.support.resets import Resets

# PATIENCE multiplies time limits. RUNTIME_OPTIONS are lines added to [runtime] of every agent. Slow machines and other
# setups, such as those of tests/vm, set them.
PATIENCE = float(os.environ.get("PODKEEL_TEST_PATIENCE", "1"))
RUNTIME_OPTIONS = os.environ.get("PODKEEL_TEST_RUNTIME_OPTIONS", "")
START_SECONDS = 30.0 * PATIENCE
# Enough for everything that works; a fault makes an event much later, or it never happens.
SOON = 30.0 * PATIENCE
BUSYBOX = "docker.io/library/busybox:latest"

RESETS = Resets()

_SCRIPTS = Path(__file__).parents[2] / "scripts"


# Agents of one run never share a subnet, because the node could not distinguish their pods.
_subnets = itertools.count(secrets.randbelow(96))
_subnets_in_use: set[str] = set()


def _next_subnet() -> str:
    # An agent that serves for a whole run keeps its subnet while the counter wraps around.
    return next(subnet for number in _subnets if (subnet := _subnet(number % 96)) not in _subnets_in_use)


def _subnet(block: int) -> str:
    return f"10.{200 + block // 16}.{block % 16 * 16}.0/20"


class AgentProcess:
    """Starts, kills and restarts one agent with the same folders. ``client`` is connected to the running one."""

    def __init__(self, folder: Path, *, options: str = "", runtime: str = "") -> None:
        token = secrets.token_hex(3)
        self.folder = folder
        self.data = folder / "data"
        self.run = Path(f"/run/podkeel-test-{token}")
        self.logs = folder / "logs"
        self.bridge = f"pkt{token}"
        self.subnet = _next_subnet()
        self.cgroup_parent = f"/podkeel-test-{token}"
        self.address = f"unix://{self.run}/podkeel.sock"
        self.nri_socket = self.run / "nri.sock"
        self.log = folder / "agent.log"
        self.umask = -1  # the test process's
        self.program = Path(sys.executable).with_name("podkeel")
        self.working_folder: Path | None = None  # None: the test process's
        self.process: subprocess.Popen[bytes] | None = None
        self._client: CriClient | None = None
        self._runtime = runtime
        if "[metrics]" not in options:
            options += '\n[metrics]\naddress = ""'  # only one agent at a time could have the default address
        if "[nri]" not in options:  # or the default socket
            options += f'\n[nri]\nsocket = "{self.nri_socket}"'
            options += f'\nplugin_dir = "{folder}/nri-plugins"\nconfig_dir = "{folder}/nri-conf.d"'
        if "[network]" not in options:
            options += '\n[network]\nmode = "built-in"'  # whether this machine has a CNI configuration or not
        (folder / "config.toml").write_text(
            f'[runtime]\ncgroup_parent = "{self.cgroup_parent}"\n{RUNTIME_OPTIONS}\n{options}\n'
        )

    @property
    def client(self) -> CriClient:
        """The connection to the running agent."""
        assert self._client is not None, "the agent does not run"
        return self._client

    @property
    def flags(self) -> list[str]:
        """The flags with this agent's configuration."""
        flags = ["--config", str(self.folder / "config.toml"), "--data-dir", str(self.data), "--run-dir", str(self.run)]
        flags += ["--socket", self.address, "--bridge", self.bridge, "--pod-cidr", self.subnet]
        return [*flags, "--default-runtime", self._runtime] if self._runtime else flags

    def command(self, *words: str) -> list[str]:
        """A ``podkeel`` command line."""
        return [str(self.program), *words]

    def launch(self, faults: str = "") -> None:
        """Start the process without waiting for it, with ``faults`` (tests/support/faults.py)."""
        _subnets_in_use.add(self.subnet)
        command = self.command("serve", *self.flags)
        if faults:
            command[:1] = [sys.executable, "-m", "tests.support.faults", faults]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, umask=self.umask, cwd=self.working_folder
            )

    def start(self, faults: str = "") -> None:
        """Start the agent and wait until it serves. ``faults`` are as in ``launch``."""
        self.launch(faults)
        try:
            self.connect()
        except (TimeoutError, grpc.RpcError):
            self.kill()
            raise AssertionError(f"the agent did not start:\n{self.tail()}") from None

    def connect(self) -> None:
        """Wait until the agent serves, whichever process started it."""
        if self._client is not None:
            self._client.close()
        self._client = CriClient(self.address)
        self._client.wait_ready(START_SECONDS, lambda: self.process is None or self.process.poll() is None)

    def kill(self) -> None:
        """Send SIGKILL, to simulate a crash."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Send SIGTERM, as systemd does. The exit status must be 0."""
        status = self._end(signal.SIGTERM)
        assert status == 0, f"the agent ended with status {status}:\n{self.tail()}"

    def wait_dead(self, seconds: float = SOON) -> None:
        """Wait until a fault has killed the agent."""
        assert self.process is not None
        self.process.wait(timeout=seconds)
        self._end(signal.SIGKILL)

    def restart(self, faults: str = "") -> None:
        """Kill the agent and start it again."""
        self.kill()
        self.start(faults)

    def _end(self, number: signal.Signals) -> int:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=SOON)
        self.process = None
        return status

    def tail(self) -> str:
        """The end of the agent's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def tracebacks(self, since: int = 0) -> list[str]:
        """The unhandled errors in the log, after its first ``since`` bytes."""
        with self.log.open("rb") as log:
            log.seek(since)
            text = log.read().decode(errors="replace")
        signs = ("Traceback (most recent call last)", "never retrieved", "was never awaited", "Fatal error")
        found = [match.start() for match in re.finditer("|".join(map(re.escape, signs)), text)]
        return [text[max(0, index - 300) : index + 1500] for index in found]

    def reset(self) -> None:
        """End the agent if it runs, and remove everything it made."""
        self._end(signal.SIGKILL)
        _subnets_in_use.discard(self.subnet)
        if Path("/run/systemd/system").is_dir():  # slices made for the tests' pods, which an agent does not remove
            slice_name = f"{self.cgroup_parent.strip('/')}.slice"
            # First processes of containers ignore SIGTERM, and systemd would wait 90 s for them.
            subprocess.run(["systemctl", "kill", "--signal=KILL", slice_name], capture_output=True, check=False)
            subprocess.run(["systemctl", "stop", slice_name], check=True)
        done = RESETS.run("reset", "--yes", *self.flags)
        assert done.status == 0, done.output + self.tail()
        assert not self.data.exists()
        assert not self.run.exists()

    @property
    def cgroup_driver(self) -> str:
        """The cgroup driver that the agent uses: cgroupfs or systemd."""
        answer = self.client.call("RuntimeConfig", cri_pb2.RuntimeConfigRequest())
        return "systemd" if answer.linux.cgroup_driver == cri_pb2.SYSTEMD else "cgroupfs"

    def parent_for_pods(self, name: str) -> str:
        """A cgroup parent below the agent's own, in the form of its cgroup driver."""
        if self.cgroup_driver == "systemd":
            return f"{self.cgroup_parent.strip('/')}-{name}.slice"
        return f"{self.cgroup_parent}/{name}"

    def import_busybox(self, archive: Path) -> None:
        """Import the busybox image into the agent."""
        self.client.call("ImportImage", agent_pb2.ImportImageRequest(path=str(archive), reference=BUSYBOX))

    def pid(self) -> int:
        """The agent's pid."""
        assert self.process is not None
        return self.process.pid


@contextlib.contextmanager
def running_agent(folder: Path, archive: Path, *, options: str = "", runtime: str = "") -> Iterator[AgentProcess]:
    """An agent that serves and has the busybox image. After the block, everything it made is removed."""
    agent = AgentProcess(folder, options=options, runtime=runtime)
    try:
        agent.start()
        agent.import_busybox(archive)
        yield agent
    finally:
        agent.reset()


def build_busybox(folder: Path) -> Path:
    """Write the busybox image to an archive and return its path."""
    archive = folder / "busybox.tar"
    command = [sys.executable, str(_SCRIPTS / "build_busybox_image.py"), str(archive), "--reference", BUSYBOX]
    subprocess.run(command, check=True)
    return archive


def wait_for(condition: object, seconds: float = 10.0, what: str = "condition") -> None:
    """Wait until the callable ``condition`` returns true. Fails the test if that takes too long."""
    assert callable(condition)
    deadline = time.monotonic() + seconds * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds:g} s"
        time.sleep(0.01)


def remove_tree(folder: Path) -> None:
    """Delete a test's folder."""
    shutil.rmtree(folder)
