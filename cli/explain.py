"""``podkeel explain``: how long each stage of a pod or container took, as a waterfall."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from datetime import datetime

from cli.connect import connect
from cli.lookup import find_container, find_pod, list_containers, list_pods
from cli.text import bar, duration, short
from host.errors import NotFoundError
from proto.podkeel.v1 import agent_pb2

_WIDTH = 40


def explain(options: argparse.Namespace) -> None:
    """Print the stages of each operation on the object."""
    with connect(options) as client:
        try:
            identifier = find_pod(client, options.object).id
        except NotFoundError:
            try:
                identifier = find_container(client, options.object).id
            except NotFoundError:
                identifier = options.object  # objects that are being made, or whose making failed, are in no list
        request = agent_pb2.ExplainRequest(id=identifier)
        answer = client.call(request, agent_pb2.ExplainResponse, f"explain {options.object}")
        names = {"": options.object}
        names |= {pod.id: pod.metadata.name for pod in list_pods(client)}
        names |= {item.id: item.metadata.name for item in list_containers(client)}
    if not answer.operations and not answer.changes:
        print(f"nothing is recorded of {options.object}")
        return
    now = time.time_ns()
    parts = [waterfall(item, now, names.get(item.object_id, "")) for item in answer.operations]
    containers = dict.fromkeys(change.container_id for change in answer.changes)
    parts += [_changes(answer.changes, container, names.get(container, "")) for container in containers]
    print("\n\n".join(parts))


def _changes(changes: Sequence[agent_pb2.ChangeReport], container: str, name: str) -> str:
    """What plugins changed of one container: a line for each thing."""
    own = [change for change in changes if change.container_id == container]
    width = max(len(change.what) for change in own)
    lines = [f"  {change.what:<{width}}  by {change.changed_by}" for change in own]
    return "\n".join([f"Changed by NRI plugins  {name} {short(container)}", *lines])


def waterfall(operation: agent_pb2.OperationReport, now: int, name: str = "") -> str:
    """One operation: a line for it, and one for each stage with its bar.

    ``now`` is in nanoseconds since the epoch, ``name`` is the name of the operation's object.
    """
    ends = [_end(stage, now) for stage in operation.stages]
    total = max((end - operation.started for end in ends), default=0) / 1e9
    moment = datetime.fromtimestamp(operation.started / 1e9).strftime("%H:%M:%S.%f")[:-3]
    subject = f"{name} {short(operation.object_id)}".strip()
    lines = [f"{operation.name}  {subject}  {moment}  {duration(max(total, 0))}"]
    width = max((len(stage.name) for stage in operation.stages), default=0)
    for stage, end in zip(operation.stages, ends, strict=True):
        scale = 1 / total if total > 0 else 0.0
        begin = (stage.started - operation.started) / 1e9
        drawn = bar(begin * scale, (end - operation.started) / 1e9 * scale, _WIDTH, least=1)
        note = "  running" if stage.seconds < 0 else "  failed" if stage.failed else ""
        lines.append(f"  {stage.name:<{width}}  {drawn}  {duration(max(end - stage.started, 0) / 1e9):>8}{note}")
    return "\n".join(lines)


def _end(stage: agent_pb2.StageReport, now: int) -> int:
    return now if stage.seconds < 0 else stage.started + round(stage.seconds * 1e9)
