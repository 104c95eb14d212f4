"""Lowers the limits of a checkpoint's processes to those of the new container. Blocks."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping
from pathlib import Path

from host.errors import InvalidArgumentError
from proto.criu.v1 import images_pb2
from runtime.checkpoint.restore import criu_images
from runtime.specgen import config

NAME = re.compile(r"core-\d+\.img")

_NUMBERS = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
_NO_LIMIT = (1 << 64) - 1
_MAX_LIMITS = 16  # RLIM_NLIMITS
_MAGIC = 8


def write_again(layer: Path, target: Path, process: config.Process) -> None:
    """Write the images of the processes of ``layer`` to the folder ``target``, with the limits of ``process``.

    Each resource limit becomes the lower one of checkpoint and configuration. The first process, and processes with the
    same oom_score_adj, get the value of the configuration. Others keep theirs if it is higher.
    """
    first = next(criu_images.entries(layer / "pstree.img", images_pb2.Process), None)
    if first is None:
        raise InvalidArgumentError("the checkpoint has no processes")
    paths = sorted(path for path in layer.iterdir() if NAME.fullmatch(path.name))
    cores = {path: list(criu_images.entries(path, images_pb2.Core)) for path in paths}
    leader = cores.get(layer / f"core-{first.pid}.img")
    if not leader:
        raise InvalidArgumentError("the checkpoint does not have its first process")
    old, new = leader[0].tc.oom_score_adj, process.oom_score_adj or 0
    limits = _limits(process)
    for path, entries in cores.items():
        for core in entries:
            if core.HasField("tc"):
                task = core.tc
                task.oom_score_adj = new if task.oom_score_adj == old else max(new, task.oom_score_adj)
                task.ClearField("loginuid")
                _limit(task.rlimits, limits)
        with path.open("rb") as file:
            begin = file.read(_MAGIC)
        criu_images.write(target / path.name, begin, *entries)


def _limits(process: config.Process) -> Mapping[int, tuple[int, int]]:
    """Soft and hard limits by number: those of the configuration, and the agent's own for others."""
    own = {number: resource.getrlimit(number) for number in _NUMBERS.values()}
    given = {_NUMBERS[limit.type]: (limit.soft, limit.hard) for limit in process.rlimits if limit.type in _NUMBERS}
    return {number: (_unsigned(soft), _unsigned(hard)) for number, (soft, hard) in {**own, **given}.items()}


def _unsigned(limit: int) -> int:
    return limit & _NO_LIMIT  # Python has -1 for no limit


def _limit(rlimits: images_pb2.ResourceLimits, limits: Mapping[int, tuple[int, int]]) -> None:
    del rlimits.rlimits[_MAX_LIMITS:]
    for number, entry in enumerate(rlimits.rlimits):
        soft, hard = limits.get(number, (_NO_LIMIT, _NO_LIMIT))
        if entry.max > hard:
            entry.max, entry.cur = hard, min(entry.cur, soft)
        entry.cur = min(entry.cur, entry.max)
    for number in range(len(rlimits.rlimits), _MAX_LIMITS):
        soft, hard = limits.get(number, (_NO_LIMIT, _NO_LIMIT))
        rlimits.rlimits.add(cur=soft, max=hard)
