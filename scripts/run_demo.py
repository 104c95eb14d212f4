"""``make run``: starts an agent, runs the sample pod, shows that it works, and serves until Ctrl-C.

With RUN_ONCE=1 it stops and removes everything at once. Its arguments are passed to ``podkeel serve``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from cli import lookup
from cli.agent.config import load_for
from cli.arguments.parser import build_parser
from cli.client import Client
from cli.images.images import import_image
from cli.log_file import LogLine, tail_lines
from cli.manifest import pod_folder
from cli.manifest.manifest import read_manifest
from cli.pods import remove_pod
from cli.run import RunningPod, run_pod
from cli.text import duration, short
from cri.config.options import ServerOptions
from host.errors import PodkeelError, UnavailableError, WrongStateError
from proto.runtime.v1 import cri_pb2

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "localhost/podkeel/busybox:latest"
MANIFEST = ROOT / "manifests/samples/hello.yaml"
PORT = 8080
_START_SECONDS = 30.0
_STOP_SECONDS = 30.0
_ANSWER_SECONDS = 20.0
_POLL_SECONDS = 0.05


def main() -> int:
    """Run the demo and return the exit status."""
    options = build_parser().parse_args(["serve", *sys.argv[1:]])
    once = os.environ.get("RUN_ONCE", "") not in ("", "0")
    try:
        demonstrate(options, once=once)
    except PodkeelError as error:
        print(f"podkeel: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def demonstrate(options: argparse.Namespace, *, once: bool) -> None:
    """Run the whole demo. Everything that it started is stopped in any case."""
    if os.geteuid() != 0:
        raise WrongStateError("running pods needs root: sudo make run")
    configuration = load_for(options).configuration
    socket = configuration.server.socket
    data_dir = Path(configuration.runtime.data_dir)
    fresh = not data_dir.exists()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="podkeel-demo-")))
        if once and fresh:
            stack.callback(reset)
        begin = time.perf_counter()
        agent = stack.enter_context(running_agent(scratch / "agent.log"))
        # Connecting before the socket exists would delay the client's next attempt by a second.
        listening = Path(socket.removeprefix("unix://"))
        wait_for(lambda: listening.is_socket() or None, "the agent's socket", _START_SECONDS, agent)
        client = stack.enter_context(Client(socket))
        version = wait_for(lambda: answering(client, agent), "the agent's first answer", _START_SECONDS, agent)
        show("agent", f"{version} on {socket}, up in {duration(time.perf_counter() - begin)}")
        provide_image(client, scratch)
        stack.callback(remove_leftovers, client, scratch)
        pod = start_pod(client, scratch)
        show_pod(client, pod, agent)
        if once:
            return
        with contextlib.suppress(KeyboardInterrupt):
            serve(agent, socket, pod)
        print(
            "\n  images stay for the next time; `.venv/bin/podkeel reset --yes` with the same flags removes everything"
        )


def serve(agent: subprocess.Popen[bytes], socket: str, pod: RunningPod) -> None:
    """Print commands to try, and wait until the agent ends."""
    print(f"\nServing on {socket} until Ctrl-C. In another terminal:")
    flag = "" if socket == ServerOptions().socket else f" --socket {socket}"
    for command in ("ps", "logs -f client", "exec web ps", "explain hello"):
        name, _, rest = command.partition(" ")
        print(f"  .venv/bin/podkeel {name}{flag} {rest}".rstrip())
    print(f"  curl {pod.addresses[0]}:{PORT}", flush=True)
    agent.wait()
    raise WrongStateError("the agent ended unexpectedly")


def show(subject: str, text: str) -> None:
    """Print one aligned line."""
    print(f"  {subject:<12} {text}", flush=True)


@contextlib.contextmanager
def running_agent(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``podkeel serve`` with these arguments, in a new session, so that Ctrl-C reaches only this script."""
    command = [sys.executable, "-m", "cli.main", "serve", *sys.argv[1:]]
    with log.open("wb") as output:
        agent = subprocess.Popen(command, cwd=ROOT, stderr=output, stdout=output, start_new_session=True)
    try:
        yield agent
    except Exception:
        print(f"\nLast lines of the agent:\n{log_tail(log)}", file=sys.stderr)
        raise
    finally:
        if agent.poll() is None:
            agent.send_signal(signal.SIGTERM)
        try:
            status = agent.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()
            raise WrongStateError(f"the agent did not stop within {_STOP_SECONDS:.0f} s and was killed") from None
    if status != 0:
        raise WrongStateError(f"the agent ended with status {status}:\n{log_tail(log)}")
    show("agent", "stopped")


def log_tail(log: Path) -> str:
    """The last lines of the agent's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def answering(client: Client, agent: subprocess.Popen[bytes]) -> str | None:
    """The agent's name and version once it answers."""
    try:
        answer = client.call(cri_pb2.VersionRequest(), cri_pb2.VersionResponse, timeout=5)
    except UnavailableError:
        return None
    # If another agent listens on the socket, this one has ended and the other one answers.
    return f"{answer.runtime_name} {answer.runtime_version}" if agent.poll() is None else None


def wait_for(attempt: Callable[[], T | None], what: str, seconds: float, agent: subprocess.Popen[bytes]) -> T:
    """The first result of ``attempt`` that is not None. Raises WrongStateError if it takes too long."""
    deadline = time.monotonic() + seconds
    while True:
        result = attempt()
        if result is not None:
            return result
        if agent.poll() is not None:
            raise WrongStateError("the agent ended unexpectedly")
        if time.monotonic() > deadline:
            raise WrongStateError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(_POLL_SECONDS)


def provide_image(client: Client, scratch: Path) -> None:
    """Build the image from this machine's busybox and import it."""
    archive = scratch / "busybox.tar"
    run_script("build_busybox_image.py", str(archive), "--reference", IMAGE)
    begin = time.perf_counter()
    (image,) = import_image(client, archive, IMAGE)
    show(
        "image", f"{', '.join(image.references)} {short(image.id)} imported in {duration(time.perf_counter() - begin)}"
    )


def run_script(name: str, *arguments: str) -> None:
    """Run a script of this folder. Raises WrongStateError with its output."""
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise WrongStateError(f"{name} failed: {result.stderr.strip() or result.stdout.strip()}")


def start_pod(client: Client, scratch: Path) -> RunningPod:
    """Run the sample pod. Removes the pod of an earlier run first."""
    remove_leftovers(client, scratch)
    plan = read_manifest(MANIFEST.read_text(), scratch / "pods")
    return run_pod(client, plan, scratch / "pods", lambda line: print(f"  {line}", flush=True))


def remove_leftovers(client: Client, scratch: Path) -> None:
    """Remove every pod with the sample's name."""
    for pod in lookup.list_pods(client):
        if (pod.metadata.namespace, pod.metadata.name) == ("default", "hello"):
            begin = time.perf_counter()
            remove_pod(client, pod)
            pod_folder.remove(scratch / "pods", pod.metadata)
            show("pod", f"{short(pod.id)} removed in {duration(time.perf_counter() - begin)}")


def show_pod(client: Client, pod: RunningPod, agent: subprocess.Popen[bytes]) -> None:
    """Show log lines of the containers, an exec, and a request from the host."""
    for name in ("client", "web"):
        path = pod.log_directory / name / "0.log"
        lines = wait_for(partial(log_lines, path), f"a log line of {name}", _ANSWER_SECONDS, agent)
        show(f"log {name}", lines[-1].text)
    command = ["sh", "-c", "hostname; id -u"]
    request = cri_pb2.ExecSyncRequest(container_id=pod.container_ids["web"], cmd=command, timeout=10)
    answer = client.call(request, cri_pb2.ExecSyncResponse, "run a command in web")
    show("exec web", f"hostname; id -u → {', '.join(answer.stdout.decode().split())}, exit code {answer.exit_code}")
    url = f"http://{pod.addresses[0]}:{PORT}/"
    begin = time.perf_counter()
    body = fetch(url)
    show("fetch", f"{url} → {body!r} in {duration(time.perf_counter() - begin)}")


def log_lines(path: Path) -> Sequence[LogLine] | None:
    """The last line of the log; None if it is empty."""
    return tail_lines(path, 1) or None


def fetch(url: str) -> str:
    """The pod's answer to an HTTP request, without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as response:
            return str(response.read().decode().strip())
    except urllib.error.URLError as error:
        raise WrongStateError(f"{url} cannot be fetched from the host: {error.reason}") from error


def reset() -> None:
    """Remove everything that the agent left. Only called if this run created it."""
    command = [sys.executable, "-m", "cli.main", "reset", "--yes", *sys.argv[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise WrongStateError(f"reset failed: {result.stderr.strip()}")
    show("host", "all files removed")


if __name__ == "__main__":
    sys.exit(main())
