"""The command line: measures a new Podkeel or the CRI server of ``--socket``, and another server for comparison."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from host import libc
from scripts.build_busybox_image import busybox_image
from tests.bench import network, nri, partial_pulls, phases, processes, pulls, report, servers, stats, streams
from tests.bench.bare import BareRuntime
from tests.bench.cgroups import own_cgroups
from tests.bench.client import Client
from tests.bench.goals import goals
from tests.bench.samples import Samples
from tests.bench.workload import Workload

_IMAGE = "localhost/bench/busybox:1"


def main() -> int:
    """Run the selected phases and report them. Returns 1 if ``--strict`` is given and a goal was missed."""
    options = _options()
    if os.geteuid() != 0:
        print("the benchmark makes containers without an agent, cgroups and mounts: run it as root", file=sys.stderr)
        return 2
    alone = (
        _checkpoints
        if options.checkpoint
        else _pulls
        if options.pull
        else _network
        if options.network
        else _nri
        if options.nri
        else None
    )
    if alone is not None:
        return alone(options)
    libc.set_child_subreaper()  # bare containers and monitors become children of this process when their parents end
    facts = {**report.machine(), "OCI runtime": options.runtime}
    bare_samples = Samples()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="podkeel-bench-")))
        cgroup_parent = f"/podkeel-bench-{os.getpid()}"
        stack.enter_context(own_cgroups(cgroup_parent))
        targets = [phases.Target(workload) for workload in _workloads(options, stack, folder, cgroup_parent)]
        bare = None if options.no_bare else _bare(targets[0], options.runtime, stack, folder, cgroup_parent)
        for target in targets:
            target.workload.version(target.samples, 200)
        phases.one_client(targets, bare, bare_samples, options.pods)
        for target in targets:
            if target.workload.client.knows("Explain"):
                phases.stages(target, max(options.pods // 4, 3))
        if options.parallel_pods:
            phases.in_parallel(targets, options.parallel_pods, options.clients)
        if options.containers:
            for target in targets:
                phases.many_containers(target, options.containers, options.running)
        if options.stats:
            for target in targets:
                target.measured.stats = stats.measure(target, options.stats, 2, options.poll_seconds)
        _streams(options, targets, bare, bare_samples)
    measured = [target.measured for target in targets]
    results = goals(measured[0], bare_samples)
    print(report.as_text(facts, measured, bare_samples, results))
    if options.markdown is not None:
        options.markdown.write_text(report.as_markdown(facts, measured, bare_samples, results))
    if options.json is not None:
        data = report.as_data(facts, _parameters(options), measured, bare_samples, results)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=1) + b"\n")
    return 1 if options.strict and not all(goal.met for goal in results) else 0


def _pulls(options: argparse.Namespace) -> int:
    """Run only the pull phase."""
    own_cidr, peer_cidr = (f"10.{second}.0.0/16" for second in random.sample(range(200, 208), 2))
    with tempfile.TemporaryDirectory(prefix="podkeel-bench-") as folder:
        costs = pulls.measure(
            Path(folder),
            options.runtime,
            (own_cidr, peer_cidr),
            peer=bool(options.peer),
            rounds=options.pulls,
            small_files=options.small_files,
        )
        layers = [pulls.layer(number) for number in range(pulls.LAYERS)]
        update = partial_pulls.measure(Path(folder) / "updates", layers, options.pulls)
    results = [*pulls.goals(costs), *partial_pulls.goals(update)]
    text = pulls.as_markdown(costs, results)
    print(text, end="")
    if options.markdown is not None:
        options.markdown.write_text(text)
    return 1 if options.strict and not all(goal.met for goal in results) else 0


def _network(options: argparse.Namespace) -> int:
    """Run only the network phase."""
    cidrs = [f"10.{second}.0.0/16" for second in random.sample(range(200, 208), 2)]
    counts = [int(count) for count in options.network_pods.split(",")]
    parent = f"/podkeel-bench-{os.getpid()}"
    with own_cgroups(parent), tempfile.TemporaryDirectory(prefix="podkeel-bench-") as folder:
        costs = network.measure(Path(folder), options.runtime, cidrs, counts, options.cni_pods, cgroup_parent=parent)
    results = network.goals(costs)
    text = network.as_markdown(costs, results)
    print(text, end="")
    if options.markdown is not None:
        options.markdown.write_text(text)
    return 1 if options.strict and not all(goal.met for goal in results) else 0


def _checkpoints(_options: argparse.Namespace) -> int:
    """Measure only checkpoints and restores."""
    from tests.bench import checkpoints, warm_starts

    with tempfile.TemporaryDirectory(prefix="podkeel-bench-") as folder:
        print(checkpoints.as_text(checkpoints.measure(Path(folder))), end="\n\n")
    with tempfile.TemporaryDirectory(prefix="podkeel-bench-") as folder:
        print(warm_starts.as_text(warm_starts.measure(Path(folder))))
    return 0


def _nri(options: argparse.Namespace) -> int:
    """Run only the NRI phase."""
    own_cidr, peer_cidr = (f"10.{second}.0.0/16" for second in random.sample(range(200, 208), 2))
    parent, load = f"/podkeel-bench-{os.getpid()}", os.getloadavg()[0]
    with own_cgroups(parent), tempfile.TemporaryDirectory(prefix="podkeel-bench-") as folder:
        found = nri.measure(
            Path(folder),
            (options.runtime, options.peer_runtime or options.runtime),
            (own_cidr, peer_cidr),
            options.nri_rounds,
            cgroup_parent=parent,
            peer=bool(options.peer),
        )
    results = nri.goals(found)
    text = nri.as_markdown(found, results)
    print(f"load before {load:.2f}, after {os.getloadavg()[0]:.2f}\n\n{text}", end="")
    if options.markdown is not None:
        options.markdown.write_text(text)
    return 1 if options.strict and not all(goal.met for goal in results) else 0


def _streams(
    options: argparse.Namespace, targets: Sequence[phases.Target], bare: BareRuntime | None, bare_samples: Samples
) -> None:
    """Run the streams phase if it was selected."""
    for target in targets if options.streams else ():
        cost = streams.measure(target, bare, bare_samples, options.streams, options.sessions)
        target.measured.streams = cost


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    add = parser.add_argument
    add("--socket", metavar="unix:///PATH", help="a running CRI server; without it a Podkeel is started and removed")
    add("--start", choices=["podkeel", "containerd"], default="podkeel", help="the server to start otherwise (podkeel)")
    add("--image", metavar="REF", default=_IMAGE, help="an image with /bin/busybox that this server has")
    add("--handler", metavar="NAME", default="", help="runtime handler of the pods (default: the server's)")
    add("--runtime", default="crun", help="OCI runtime called bare, and used by the servers started here (crun)")
    add("--peer", choices=["containerd"], default=os.environ.get("PEER") or None, help="measured beside it (or $PEER)")
    add("--peer-runtime", metavar="RUNTIME", help="the peer's OCI runtime (default: the same)")
    add("--pods", type=int, default=40, metavar="N", help="whole cycles by one client (40)")
    add("--parallel-pods", type=int, default=90, metavar="N", help="whole cycles by many clients; 0: none (90)")
    add("--clients", type=int, default=10, metavar="N", help="clients at once (10)")
    add("--containers", type=int, default=300, metavar="N", help="containers for ListContainers; 0: none (300)")
    add("--running", type=int, default=20, metavar="N", help="running containers for the monitors' memory (20)")
    add("--stats", type=int, default=100, metavar="N", help="pods of two containers for the statistics; 0: none (100)")
    add("--poll-seconds", type=int, default=30, metavar="N", help="how long they are polled as kubelet does (30)")
    add("--pull", action="store_true", help="measure pulls of a large image instead of calls")
    add("--network", action="store_true", help="measure the built-in network beside CNI's bridge plugin instead")
    add("--network-pods", default="1,200,500", metavar="N,…", help="pods that are there already (1,200,500)")
    add("--cni-pods", type=int, default=200, metavar="N", help="the most of them on the CNI network (200)")
    add("--nri", action="store_true", help="measure what plugins of the node (NRI) add to a pod's cycle instead")
    add("--checkpoint", action="store_true", help="measure checkpoints and restores of containers instead")
    add("--nri-rounds", type=int, default=16, metavar="N", help="rounds of five cycles with each set of plugins (16)")
    add("--pulls", type=int, default=3, metavar="N", help="pulls of each form of the image (3)")
    add("--streams", type=int, default=40, metavar="N", help="commands through exec streams; 0: none (40)")
    add("--sessions", type=int, default=100, metavar="N", help="commands at once for the server's memory (100)")
    add("--small-files", type=int, default=300_000, metavar="N", help="files in one layer to pull; 0: none (300000)")
    add("--no-bare", action="store_true", help="leave out the bare OCI runtime")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--markdown", type=Path, metavar="FILE", help="write the tables of docs/performance.md there")
    add("--strict", action="store_true", help="end with status 1 when a goal is missed")
    return parser.parse_args()


def _parameters(options: argparse.Namespace) -> dict[str, str | int | bool | None]:
    return {name: value for name, value in vars(options).items() if name not in ("socket", "json", "markdown")}


def _workloads(
    options: argparse.Namespace, stack: contextlib.ExitStack, folder: Path, cgroup_parent: str
) -> list[Workload]:
    """The servers, started if necessary, each with a workload that is removed when ``stack`` ends."""
    own_cidr, peer_cidr = (f"10.{second}.0.0/16" for second in random.sample(range(200, 208), 2))
    archive = folder / "busybox.tar"
    busybox_image().write_docker(archive, _IMAGE)
    clients: list[tuple[str, Client, str, str]] = []
    if options.socket:
        client = Client(options.socket)
        stack.callback(client.close)
        clients.append(("server", client, options.image, options.handler))
    elif options.start == "podkeel":
        own = servers.podkeel(folder / "podkeel", options.runtime, own_cidr, _IMAGE, archive)
        clients.append(("podkeel", stack.enter_context(own), _IMAGE, options.handler))
    if options.peer or (options.start == "containerd" and not options.socket):
        runtime = (options.peer_runtime if options.peer else None) or options.runtime
        peer = servers.containerd(folder / "containerd", runtime, peer_cidr, archive)
        clients.append(("containerd", stack.enter_context(peer), _IMAGE, ""))
    workloads = []
    for name, client, reference, handler in clients:
        logs = folder / f"{name}-logs"
        logs.mkdir()
        workload = Workload(client, name, image=reference, handler=handler, cgroup_parent=cgroup_parent, logs=logs)
        stack.callback(workload.close)
        workloads.append(workload)
    return workloads


def _bare(
    target: phases.Target, runtime: str, stack: contextlib.ExitStack, folder: Path, cgroup_parent: str
) -> BareRuntime:
    """A bare runtime that runs a copy of a container of ``target``. The container runs until ``stack`` ends."""
    pod, config = stack.enter_context(target.workload.pod(Samples()))
    container = target.workload.create(pod, config, Samples())
    stack.callback(target.workload.remove, container, Samples())
    target.workload.start(container, Samples())
    init = processes.container_inits({container})[container]
    return BareRuntime(runtime, processes.bundle_of(container, init), folder, cgroup_parent)


if __name__ == "__main__":
    raise SystemExit(main())
