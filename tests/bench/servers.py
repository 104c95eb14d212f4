"""Starts the servers of the benchmark: a Podkeel and Debian's containerd. Both leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from google.protobuf.descriptor import FileDescriptor

from host import libc
from host import processes as host_processes
from host.errors import PodkeelError
from host.files import mounts
from scripts.build_busybox_image import BuiltImage, busybox_layer
from tests.bench.client import Client
from tests.bench.processes import all_pids, arguments, terminate
from tests.bench.workload import SLEEP_COMMAND

START_SECONDS = 60.0
_PAUSE = "localhost/bench/pause:1"

_CONTAINERD_CONFIG = """\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "{folder}/state/containerd.sock"
[ttrpc]
  address = "{folder}/state/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "bench"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.bench]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.bench.options]
        BinaryName = "{runtime}"
        Root = "{folder}/state/oci"
        SystemdCgroup = false
"""
_CONTAINERD_NRI = """\
[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "{socket}"
  plugin_path = "{folder}/nri-plugins"
  plugin_config_path = "{folder}/nri-conf.d"
"""


@contextlib.contextmanager
def podkeel(
    folder: Path, runtime: str, cidr: str, reference: str, archive: Path, *, settings: str = ""
) -> Iterator[Client]:
    """Run a Podkeel of this source tree with the image imported. Reset and removed after the block.

    ``settings`` is its configuration file.
    """
    from proto.podkeel.v1 import agent_pb2

    program = Path(sys.executable).with_name("podkeel")
    folder.mkdir()
    (folder / "config.toml").write_text(settings)
    with _tmpfs(folder / "run") as run:
        flags = [
            *("--config", str(folder / "config.toml"), "--data-dir", str(folder / "data"), "--run-dir", str(run)),
            *("--socket", f"unix://{run}/podkeel.sock", "--bridge", f"pktbench{os.getpid() % 10000}"),
            *("--pod-cidr", cidr, "--default-runtime", runtime),
        ]
        serve = [str(program), "serve", *flags, "--stream-address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"]
        try:
            with _server(serve, folder / "podkeel.log", f"unix://{run}/podkeel.sock", agent_pb2.DESCRIPTOR) as client:
                client.call("ImportImage", agent_pb2.ImportImageRequest(path=str(archive), reference=reference))
                client.metrics_url = re.findall(r"http://\S+/metrics", (folder / "podkeel.log").read_text())[-1]
                yield client
        finally:
            reset = [str(program), "reset", "--yes", *flags]
            done = subprocess.run(reset, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise PodkeelError(f"podkeel reset left something behind: {done.stderr or done.stdout}")


@contextlib.contextmanager
def containerd(folder: Path, runtime: str, cidr: str, archive: Path, *, nri: Path | None = None) -> Iterator[Client]:
    """Run Debian's containerd with CNI's bridge plugin and all its files below ``folder``. Removed after the block.

    ``nri`` is the socket for NRI plugins, which only containerd 1.7 and later have.
    """
    bridge = f"pktb{os.getpid() % 100000}"
    runtime_path = shutil.which(runtime)
    if runtime_path is None or shutil.which("containerd") is None:
        raise FileNotFoundError(f"containerd and {runtime} must be on the PATH to be measured")
    folder.mkdir()
    (folder / "cni").mkdir()
    (folder / "cni" / "10-bench.conflist").write_text(json.dumps(_bridge_configuration(bridge, cidr, folder)))
    configuration = _CONTAINERD_CONFIG.format(folder=folder, pause=_PAUSE, runtime=runtime_path)
    if nri is not None:
        configuration += _CONTAINERD_NRI.format(folder=folder, socket=nri)
    (folder / "config.toml").write_text(configuration)
    pause = BuiltImage((busybox_layer(),), {"Entrypoint": list(SLEEP_COMMAND)})
    pause.write_docker(folder / "pause.tar", _PAUSE)
    with _without_new(Path("/run/containerd"), Path("/var/lib/cni")), _tmpfs(folder / "state") as state:
        address = f"{state}/containerd.sock"
        command = ["containerd", "--config", str(folder / "config.toml")]
        try:
            with _server(command, folder / "containerd.log", f"unix://{address}") as client:
                for tar in (folder / "pause.tar", archive):
                    ctr = ["ctr", "--address", address, "--namespace", "k8s.io", "images", "import", str(tar)]
                    subprocess.run(ctr, check=True, stdout=subprocess.DEVNULL)
                yield client
        finally:
            _end_shims(address)
            subprocess.run(["ip", "link", "delete", bridge], check=False, stderr=subprocess.DEVNULL)
            for target in mounts.mounts_below(folder / "root"):
                mounts.unmount(target)


def _bridge_configuration(bridge: str, cidr: str, folder: Path) -> dict[str, object]:
    # Without masquerading and port mapping, which would add several iptables runs per pod.
    ranges = [[{"subnet": cidr}]]
    return {
        "cniVersion": "1.0.0",
        "name": "bench",
        "plugins": [
            {
                "type": "bridge",
                "bridge": bridge,
                "isGateway": True,
                "ipMasq": False,
                "ipam": {
                    "type": "host-local",
                    "ranges": ranges,
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": str(folder / "addresses"),
                },
            }
        ],
    }


@contextlib.contextmanager
def _server(command: Sequence[str], log: Path, address: str, *descriptors: FileDescriptor) -> Iterator[Client]:
    """Run a server during the block. Raises PodkeelError with the end of its log if it does not start."""
    with open(log, "ab") as output:
        pid = host_processes.spawn(command, descriptors={1: output.fileno(), 2: output.fileno()})
    pidfd = os.pidfd_open(pid)
    try:
        client = Client(address, *descriptors)
        try:
            client.wait_ready(START_SECONDS)
            yield client
        except grpc.FutureTimeoutError as error:
            ending = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise PodkeelError(
                f"{command[0]} did not listen on {address} within {START_SECONDS:g} s:\n{ending}"
            ) from error
        finally:
            client.close()
    finally:
        terminate(pidfd, 20.0)


@contextlib.contextmanager
def _without_new(*folders: Path) -> Iterator[None]:
    """Remove those of ``folders`` that were created during the block: containerd's paths that cannot be configured."""
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    finally:
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _tmpfs(folder: Path) -> Iterator[Path]:
    # Run folders are on tmpfs on a real node. Here every server gets a separate tmpfs.
    folder.mkdir()
    libc.mount("tmpfs", str(folder), "tmpfs", 0, "mode=0755")
    try:
        yield folder
    finally:
        for target in mounts.mounts_below(folder):
            mounts.unmount(target)


def _end_shims(address: str) -> None:
    """Kill the remaining shims of this containerd, and the processes below them."""
    for pid in list(all_pids()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = arguments(pid)
            if words and words[0].endswith("containerd-shim-runc-v2") and address in words:
                os.kill(pid, signal.SIGKILL)
