"""The report on plugins for operators of the node."""

from __future__ import annotations

from collections.abc import Iterable

from proto.nri.v1alpha1 import nri_pb2
from runtime.nri.adaptation import Adaptation

EVENT_NUMBERS = tuple(number for number in nri_pb2.Event.values() if 0 < number < nri_pb2.LAST)


def plugins(adaptation: Adaptation) -> list[dict[str, object]]:
    """Name, events, calls and errors of each connected plugin; then the disconnected ones, each with the reason."""
    there = [
        {
            "plugin": plugin.title,
            "startedByAgent": plugin.started_by_agent,
            "connectedAt": plugin.admitted_at,
            "events": [nri_pb2.Event.Name(number) for number in EVENT_NUMBERS if plugin.wants(number)],
            "calls": {method: count.calls for method, count in plugin.calls.by_method.items()},
            "lastError": plugin.calls.last_error,
        }
        for plugin in adaptation.plugins
    ]
    gone = [{"plugin": lost.title, "goneAt": lost.at, "why": lost.why} for lost in adaptation.gone]
    return [*there, *gone]


def calls(adaptation: Adaptation) -> Iterable[tuple[tuple[str, str], int, float, int]]:
    """For each plugin and method: the number of calls since the agent started, their seconds, the number of errors."""
    return [((title, method), one.calls, one.seconds, one.errors) for title, method, one in adaptation.shared.totals]
