#!/usr/bin/env python3
"""A plugin that writes one line for each event of a pod or container to standard error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from stub import Plugin, nri_pb2  # noqa: E402  # both are found by the line above


class Logger(Plugin):
    """Handles every event of the interface."""

    def Synchronize(self, request: nri_pb2.SynchronizeRequest) -> nri_pb2.SynchronizeResponse:
        """Print the number of pods and containers that existed when the plugin connected."""
        self.say("Synchronize", f"{len(request.pods)} pods, {len(request.containers)} containers")
        return nri_pb2.SynchronizeResponse(more=request.more)

    def say(self, event: str, words: str) -> None:
        """Print one line."""
        print(f"{self.index}-{self.name}: {event}: {words}", file=sys.stderr, flush=True)

    def log(self, event: str, request: Any) -> None:
        """Print the pod's name, and the container's if the event is about a container."""
        pod = f"{request.pod.namespace}/{request.pod.name}"
        container = getattr(request, "container", None)
        self.say(event, pod if container is None else f"{pod}/{container.name} {container.id[:13]}")


def _logging(event: str) -> Any:
    return lambda plugin, request: plugin.log(event, request)


for method in nri_pb2.DESCRIPTOR.services_by_name["Plugin"].methods:
    if not hasattr(Plugin, method.name) and method.name != "StateChange":
        setattr(Logger, method.name, _logging(method.name))

if __name__ == "__main__":
    Logger("logger", "90").run()
