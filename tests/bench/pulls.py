"""The pull phase: each server in turn pulls one large image, gzip and zstd, from a registry on loopback."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import random
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import zstandard

from host.files import mounts
from proto.runtime.v1 import cri_pb2
from scripts.build_busybox_image import BuiltImage, busybox_image
from tests.bench import processes, servers
from tests.bench.client import Client
from tests.bench.goals import Goal
from tests.bench.samples import percentile
from tests.support.registry import Registry, run_registry

LAYERS = 10
FILES = 1500  # in each layer
MANY_FILES = "many files"
_BYTES = 17_000  # average uncompressed size of a file
_REFERENCE = "localhost/bench/busybox:1"
_DISK_BYTES = 16 << 30
_LIST_SECONDS = 0.01
_MEMORY_SECONDS = 0.1
_PULL_SECONDS = 600.0


class PullCost(msgspec.Struct):
    """The cost of one form of the image for one server: seconds, milliseconds and bytes."""

    server: str
    form: str
    seconds: list[float] = []
    processor_seconds: list[float] = []
    list_milliseconds: list[float] = []
    memory_over_idle: int = 0

    @property
    def best(self) -> float:
        """The fastest pull, which other work on the machine affected least."""
        return min(self.seconds, default=math.nan)


def measure(
    folder: Path, runtime: str, cidrs: tuple[str, str], *, peer: bool, rounds: int, small_files: int
) -> list[PullCost]:
    """Each server pulls ``rounds`` images of each form in changing order, and one layer of ``small_files``, if any.

    Every image has different layers, none is removed, and each server has a new file system. Otherwise the measurement
    would include ext4's search for new inodes, which skips those that were deleted a short time ago.
    """
    archive = folder / "busybox.tar"
    busybox_image().write_docker(archive, _REFERENCE)
    costs: dict[tuple[str, str], PullCost] = {}
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(run_registry())
        names = list(_push(registry, rounds))
        names += [(MANY_FILES, _push_small_files(registry, small_files))] if small_files else []
        own_disk = stack.enter_context(_disk(folder / "own"))
        own = servers.podkeel(own_disk / "podkeel", runtime, cidrs[0], _REFERENCE, archive)
        clients = [("podkeel", stack.enter_context(own))]
        if peer:
            peer_disk = stack.enter_context(_disk(folder / "peer"))
            other = servers.containerd(peer_disk / "containerd", runtime, cidrs[1], archive)
            clients.append(("containerd", stack.enter_context(other)))
        idle = {name: _tree_bytes(client) for name, client in clients}
        for number, (form, reference) in enumerate(names):
            for name, client in clients if number % 4 < 2 else reversed(clients):
                cost = costs.setdefault((name, form), PullCost(name, form))
                _pull(client, reference, cost, idle[name])
    return list(costs.values())


def goals(costs: list[PullCost]) -> list[Goal]:
    """The goals of pulls with the values of this run."""
    by_key = {(cost.server, cost.form): cost for cost in costs}
    found = []
    for form in _forms(costs):
        own, peer = by_key["podkeel", form], by_key.get(("containerd", form))
        ratio = own.best / peer.best if peer is not None else math.nan
        found += [
            Goal(f"pull {form} / containerd's", ratio, 0.5, "x"),
            Goal(f"pull {form}: memory over idle", own.memory_over_idle / 2**20, 150, "MiB"),
            Goal(f"pull {form}: ListContainers meanwhile, p99", percentile(own.list_milliseconds, 0.99), 20, "ms"),
        ]
    return found


def as_markdown(costs: list[PullCost], results: list[Goal]) -> str:
    """The tables of docs/performance.md."""
    lines = ["| pull | podkeel | containerd |", "|---|---|---|"]
    by_key = {(cost.server, cost.form): cost for cost in costs}

    def row(label: str, form: str, value: Callable[[PullCost], str]) -> None:
        cells = [value(cost) if (cost := by_key.get((name, form))) else "" for name in ("podkeel", "containerd")]
        lines.append(f"| {form}, {label} | {' | '.join(cells)} |")

    for form in _forms(costs):
        row("seconds", form, lambda cost: " / ".join(f"{seconds:.1f}" for seconds in sorted(cost.seconds)))
        row("processor seconds", form, lambda cost: f"{min(cost.processor_seconds, default=math.nan):.1f}")
        row("memory over idle", form, lambda cost: f"{cost.memory_over_idle / 2**20:.0f} MiB")
        row(
            "ListContainers p50 / p99",
            form,
            lambda cost: " / ".join(f"{percentile(cost.list_milliseconds, part):.1f}" for part in (0.5, 0.99)) + " ms",
        )
    lines += ["", "| goal | measured | limit | |", "|---|---|---|---|"]
    lines += [
        f"| {goal.name} | {goal.value:.2f} | at most {goal.limit:g} {goal.unit} | {'met' if goal.met else 'missed'} |"
        for goal in results
    ]
    return "\n".join(lines) + "\n"


def _push(registry: Registry, rounds: int) -> Iterator[tuple[str, str]]:
    """Push the images. Provides form and reference of each."""
    layers = [layer(number) for number in range(LAYERS)]
    compressor = zstandard.ZstdCompressor(3)
    forms: dict[str, Callable[[bytes], bytes]] = {
        "gzip": lambda data: gzip.compress(data, 6, mtime=0),
        "zstd": compressor.compress,
    }
    for number in range(rounds):
        for form, compress in forms.items():
            first = _member(f"usr/share/{form}-{number}", b"")  # makes every layer different
            image = BuiltImage([first + one for one in layers], {}, compress=compress, suffix=f"+{form}")
            yield form, registry.push(image, f"bench/{form}", str(number))


def _forms(costs: list[PullCost]) -> list[str]:
    return list(dict.fromkeys(cost.form for cost in costs))


def _push_small_files(registry: Registry, count: int) -> str:
    """Push an image of one layer with ``count`` small files, fifty in each folder. Returns its reference."""
    chance = random.Random(count)
    members = []
    for index in range(count):
        folder = f"srv/modules/package{index // 50}"
        if index % 50 == 0:
            members.append(_member(folder + "/", b"", tarfile.DIRTYPE))
        members.append(_member(f"{folder}/file{index}.js", b"line %d\n" % index * chance.randint(1, 100)))
    tar = b"".join((*members, bytes(2 * tarfile.BLOCKSIZE)))
    return registry.push(BuiltImage([tar], {}, compress=lambda data: gzip.compress(data, 6, mtime=0)), "bench/files")


def layer(number: int) -> bytes:
    """A layer with some dozen folders. Half of its data compresses well, the other half not at all."""
    chance = random.Random(number)
    words = [chance.randbytes(chance.randint(3, 9)) for _ in range(2000)]
    members = []
    for index in range(FILES):
        size = min(int(chance.expovariate(1 / _BYTES)), 40 * _BYTES)
        text = b" ".join(chance.choices(words, k=size // 12))
        members.append(
            _member(f"usr/share/layer{number}/folder{index % 40}/file{index}", text + chance.randbytes(size // 2))
        )
    return b"".join((*members, bytes(2 * tarfile.BLOCKSIZE)))


def _member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.mode = kind, len(content), 0o755 if kind == tarfile.DIRTYPE else 0o644
    return member.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """A new ext4 file system in a sparse file."""
    file = folder.with_suffix(".ext4")
    with file.open("wb") as sparse:
        sparse.truncate(_DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(file)], check=True)
    folder.mkdir()
    subprocess.run(["mount", "-o", "loop", str(file), str(folder)], check=True)
    try:
        yield folder
    finally:
        mounts.unmount(folder)
        file.unlink()


def _pull(client: Client, reference: str, cost: PullCost, idle: int) -> None:
    image = cri_pb2.ImageSpec(image=reference)
    os.sync()
    busy = _processor_seconds(client)
    with _watched(client, cost, idle):
        begin = time.perf_counter()
        client.call("PullImage", cri_pb2.PullImageRequest(image=image), _PULL_SECONDS)
        cost.seconds.append(time.perf_counter() - begin)
    cost.processor_seconds.append(_processor_seconds(client) - busy)


@contextlib.contextmanager
def _watched(client: Client, cost: PullCost, idle: int) -> Iterator[None]:
    """List containers and measure the server's memory during the block, each in a separate thread."""
    ended = threading.Event()

    def list_containers() -> None:
        while not ended.wait(_LIST_SECONDS):
            begin = time.perf_counter()
            client.call("ListContainers", cri_pb2.ListContainersRequest())
            cost.list_milliseconds.append((time.perf_counter() - begin) * 1e3)

    def look_at_memory() -> None:
        while not ended.wait(_MEMORY_SECONDS):
            cost.memory_over_idle = max(cost.memory_over_idle, _tree_bytes(client) - idle)

    threads = [threading.Thread(target=list_containers), threading.Thread(target=look_at_memory)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _processor_seconds(client: Client) -> float:
    """The processor time of the server and of its workers that have ended."""
    root = client.server_pid()
    return processes.all_processor_seconds(root) if root is not None else math.nan


def _tree_bytes(client: Client) -> int:
    """The PSS of the server and of all processes below it.

    A child that shares the server's memory until it executes its program (vfork) is left out: the kernel would report
    all of that memory for it again.
    """
    root = client.server_pid()
    if root is None:
        return 0
    total = 0
    server = processes.arguments(root)
    pending = [root]
    while pending:
        pid = pending.pop()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if pid == root or processes.arguments(pid) != server:  # read before the size: it may execute in between
                total += processes.proportional_bytes(pid)
            for thread in Path(f"/proc/{pid}/task").iterdir():
                pending += map(int, (thread / "children").read_text().split())
    return total
