"""An NRI plugin that is killed during an event: ``python -m tests.support.nri_victim SOCKET EVENT INDEX``.

It subscribes only to that event, and prints a line once it is synchronised.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from proto.nri.v1alpha1 import nri_pb2
from tests.support.nri import Recorder


class Victim(Recorder):
    """Kills its own process when it receives its event."""

    def __init__(self, path: Path, event: str, index: str) -> None:
        super().__init__(path, index, event)
        self._event = event

    def Configure(self, request: nri_pb2.ConfigureRequest) -> nri_pb2.ConfigureResponse:
        number = next(number for name, number in nri_pb2.Event.items() if name.replace("_", "") == self._event.upper())
        return nri_pb2.ConfigureResponse(events=1 << (number - 1))

    def Synchronize(self, request: nri_pb2.SynchronizeRequest) -> Any:
        print("synchronised", flush=True)
        return super().Synchronize(request)

    def take(self, event: str, request: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Victim(Path(sys.argv[1]), sys.argv[2], sys.argv[3]).run()
