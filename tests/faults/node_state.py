"""Compares an agent's store with the kernel's and the disk's state, without using the agent."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc

from host.files import mounts
from host.files.procfs import all_pids, command_line
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for

_HIERARCHIES = [Path(e.target) for e in mounts.mount_table() if e.filesystem in ("cgroup", "cgroup2")]


def differences(agent: AgentProcess) -> list[str]:
    """The differences between the store and the node; empty if there are none."""
    expected, found = set(_expected(agent)), set(_found(agent))
    missing = [f"missing: {item}" for item in sorted(expected - found)]
    return missing + [f"left over: {item}" for item in sorted(found - expected)]


def assert_whole(agent: AgentProcess) -> None:
    """Assert that neither the agent's own check nor this module finds a difference."""
    left: list[str] = []

    def whole() -> bool:
        try:
            left[:] = differences(agent)
        except OSError as error:  # a file disappeared during the comparison
            left[:] = [str(error)]
        return not left

    with contextlib.suppress(AssertionError):  # the kernel removes links in the background
        wait_for(whole, 15)
    assert not left, "\n".join(left)
    assert agent.client.findings() == []


def rows(agent: AgentProcess, query: str) -> list[tuple[object, ...]]:
    """The result of a query of the store."""
    with contextlib.closing(sqlite3.connect(f"file:{agent.data}/podkeel.db?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def _expected(agent: AgentProcess) -> Iterator[str]:
    client = agent.client
    yield "mount mask"
    for (sandbox_id,) in rows(agent, "SELECT id FROM sandboxes"):
        try:
            status = client.sandbox_status(str(sandbox_id))
        except grpc.RpcError:
            yield f"sandbox {sandbox_id}, which is in the store, for clients"
            continue
        if status.state == cri_pb2.SANDBOX_READY:
            yield from _expected_of_sandbox(agent, status)
    for (container_id,) in rows(agent, "SELECT id FROM containers"):
        try:
            state = client.status(str(container_id)).state
        except grpc.RpcError:
            yield f"container {container_id}, which is in the store, for clients"
            continue
        yield f"data folder {container_id}"
        if state != cri_pb2.CONTAINER_EXITED:
            yield f"mount containers/{container_id}/rootfs"
            yield f"conmon {container_id}"
            yield f"in the OCI runtime {container_id}"
            yield f"cgroup of container {container_id}"
            yield f"processes of {container_id}"
    for (number,) in rows(agent, "SELECT number FROM layers"):
        yield f"layer {number}"
    yield "layer 0"


def _expected_of_sandbox(agent: AgentProcess, status: cri_pb2.PodSandboxStatus) -> Iterator[str]:
    yield f"sandbox folder {status.id}"
    options = status.linux.namespaces.options
    if options.network != cri_pb2.NODE:
        yield f"mount sandboxes/{status.id}/ns/net"
        yield f"mount sandboxes/{status.id}/ns/uts"
        yield f"address {status.network.ip} of {status.id}"
        yield f"attachment {status.id}"
        yield f"nftables {status.network.ip}"
        yield f"link with {status.network.ip}"
    yield f"mount sandboxes/{status.id}/files"
    if options.ipc != cri_pb2.NODE:
        yield f"mount sandboxes/{status.id}/ns/ipc"
        yield f"mount sandboxes/{status.id}/shm"
    if (agent.run / "sandboxes" / status.id / "init").exists():
        yield f"mount sandboxes/{status.id}/ns/pid"
        yield f"init {status.id}"


def _found(agent: AgentProcess) -> Iterator[str]:
    run = agent.run
    yield from (f"sandbox folder {path.name}" for path in (run / "sandboxes").iterdir())
    known = {row[0] for row in rows(agent, "SELECT id FROM containers")}
    for folder in (run / "containers", run / "exits"):
        yield from (str(path) for path in folder.iterdir() if path.name not in known)
    for root in (run / "oci").iterdir():
        yield from (f"in the OCI runtime {path.name}" for path in root.iterdir())
    yield from (f"mount {os.path.relpath(target, run)}" for target in mounts.mounts_below(run))
    yield from (f"data folder {path.name}" for path in (agent.data / "containers").iterdir())
    yield from (f"layer {path.name}" for path in (agent.data / "layers").iterdir())
    yield from (f"blob being received {path.name}" for path in (agent.data / "content" / "incoming").iterdir())
    yield from (f"trash {path.name}" for path in (agent.data / "trash").iterdir())
    yield from _found_in_network(agent)
    yield from _found_in_cgroups(agent)
    yield from _found_processes(agent)


def _found_in_network(agent: AgentProcess) -> Iterator[str]:
    for address, sandbox_id in rows(
        agent, "SELECT address, sandbox_id FROM network_addresses WHERE released_at IS NULL"
    ):
        yield f"address {address} of {sandbox_id}"
    yield from (f"attachment {row[0]}" for row in rows(agent, "SELECT sandbox_id FROM network_attachments"))
    listing = subprocess.run(
        ["nft", "-j", "list", "table", "bridge", agent.bridge], capture_output=True, text=True, check=True
    ).stdout
    identities = {}
    for item in json.loads(listing)["nftables"]:
        if item.get("set", {}).get("name") == "pods4":
            for element in item["set"].get("elem", ()):
                link, _, address = element["concat"]
                identities[link] = address
                yield f"nftables {address}"
    for port in Path(f"/sys/class/net/{agent.bridge}/brif").iterdir():
        yield f"link with {identities.get(port.name, f'no identity: {port.name}')}"


def _found_in_cgroups(agent: AgentProcess) -> Iterator[str]:
    pods = {path.name for path in (agent.run / "sandboxes").iterdir()}  # made with the first container, then kept
    for sandbox_id, sandbox in _pod_cgroups(agent.cgroup_parent.strip("/")):
        if sandbox_id not in pods:
            yield f"cgroup of sandbox {sandbox_id}"
        for container in sandbox.iterdir():
            if container.is_dir():
                name = container.name.removeprefix("podkeel-").removesuffix(".scope")
                yield f"cgroup of container {name}"
                if any(file.read_text() for file in container.rglob("cgroup.procs")):
                    yield f"processes of {name}"


def _pod_cgroups(base: str) -> Iterator[tuple[str, Path]]:
    """The cgroups of pods without a configured parent, for either driver, in every hierarchy."""
    for hierarchy in _HIERARCHIES:
        for folder in hierarchy.glob(f"{base}/*"):
            if folder.is_dir():
                yield folder.name, folder
        for folder in hierarchy.glob(f"*.slice/*.slice/{base}.slice/{base}-*.slice"):
            yield folder.name.removeprefix(f"{base}-").removesuffix(".slice"), folder


def _found_processes(agent: AgentProcess) -> Iterator[str]:
    """Processes with this agent's run folder in their command line, and the init processes of its pods."""
    pods = {path.name for path in (agent.run / "sandboxes").iterdir()}
    own = agent.pid()
    for pid in all_pids():
        if pid == own:
            continue
        words = [word.decode(errors="replace") for word in command_line(pid)]
        if "conmon" in words[0] and f"{agent.run}/containers" in " ".join(words):
            yield f"conmon {words[words.index('-c') + 1]}"
        elif words[0].startswith("podkeel-pod-init-") and words[0].removeprefix("podkeel-pod-init-") in pods:
            yield f"init {words[0].removeprefix('podkeel-pod-init-')}"
        elif str(agent.run) in " ".join(words[1:]) and Path(words[0]).name in ("crun", "runc"):
            with contextlib.suppress(OSError):  # it has ended in the meantime
                if (
                    agent.cgroup_parent not in Path(f"/proc/{pid}/cgroup").read_text()
                ):  # not the init of a created container
                    yield f"process {' '.join(words)}"
