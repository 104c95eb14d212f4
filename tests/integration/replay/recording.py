"""The requests of a kubelet to another node agent, with the names of this machine instead of the recorded ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "data/recordings"
IMAGE = "registry.local:5000/docker/library/busybox:1"
IMAGE_ID = "sha256:4bd097c5800a089ad68984358ad025adb53b40fabb837cd9d51b163d52780550"
IMAGE_DIGEST = "sha256:9c393193b71cedd97361e62bd015966418c51638b4382b06d9e9991095e01c1c"
HOST_PORTS = (18099, 18100, 18101)

Json = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One call, or one item of the event stream; ``response`` is what the recorded agent answered, if it is kept."""

    number: int
    method: str
    request: Json
    response: Json | None
    code: str
    item: Json | None


def entries(name: str) -> Iterator[Entry]:
    """The entries of ``kubelet-NAME.jsonl`` in their order."""
    for number, line in enumerate((FOLDER / f"kubelet-{name}.jsonl").read_text().splitlines(), start=1):
        entry = json.loads(line)
        yield Entry(
            number,
            entry["method"],
            entry.get("request", {}),
            entry.get("response"),
            entry.get("code", ""),
            entry.get("item"),
        )


class Names:
    """Recorded names and their replacements here; ids are learnt when objects are made."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = dict(names)

    def learn(self, recorded: str, ours: str) -> None:
        self._names[recorded] = ours

    def known(self, recorded: str) -> str:
        return self._names[recorded]

    def put(self, value: Json) -> Json:
        text = json.dumps(value)
        for recorded, ours in self._names.items():
            text = text.replace(recorded, ours)
        result: Json = json.loads(text)
        return result


def ended_alone(name: str) -> set[str]:
    """Recorded ids of the containers that were seen exited before anything stopped them."""
    stopped: set[str] = set()
    alone: set[str] = set()
    for entry in entries(name):
        if entry.method == "StopContainer":
            stopped.add(entry.request["container_id"])
        status = (entry.response or {}).get("status", {})
        if status.get("state") == "CONTAINER_EXITED" and status["id"] not in stopped:
            alone.add(status["id"])
    return alone
