"""NRI plugins for the benchmark, in a separate process: ``python -m tests.bench.nri_plugins SOCKET COUNT``.

One plugin subscribes to every event and changes nothing. Several plugins subscribe to an event that the benchmark never
causes. The process prints a line when all are synchronised, and ends when its standard input is closed.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from manifests.nri import stub
from proto.nri.v1alpha1 import nri_pb2
from tests.support.nri import EVENTS


class Idle(stub.Plugin):
    """Subscribes to PostUpdatePodSandbox."""

    def __init__(self, name: str, index: str, path: str) -> None:
        super().__init__(name, index, path)
        self.synchronised = threading.Event()

    def Synchronize(self, request: nri_pb2.SynchronizeRequest) -> nri_pb2.SynchronizeResponse:
        self.synchronised.set()
        return nri_pb2.SynchronizeResponse(more=request.more)

    def PostUpdatePodSandbox(self, _request: Any) -> None:
        return


class Everything(Idle):
    """Subscribes to every event that the server supports."""

    def Configure(self, request: nri_pb2.ConfigureRequest) -> nri_pb2.ConfigureResponse:
        answer = super().Configure(request)
        if not request.NRI_version:  # older than 0.10, without events for updates of pods and without validators
            answer.events &= (1 << nri_pb2.REMOVE_CONTAINER) - 1
        return answer


for _event in EVENTS:
    setattr(Everything, _event, lambda _self, _request: None)


def main() -> None:
    """Connect the plugins and wait for the end of standard input."""
    path, count = sys.argv[1], int(sys.argv[2])
    kind = Everything if count == 1 else Idle
    plugins = [kind(f"bench{number}", f"{number:02}", path) for number in range(count)]
    for plugin in plugins:  # one after the other, because at most 32 may be unregistered at the same time
        threading.Thread(target=plugin.run, daemon=True).start()
        if not plugin.synchronised.wait(30):
            raise SystemExit("the agent did not take a plugin")
    print("synchronised", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
