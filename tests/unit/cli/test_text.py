from __future__ import annotations

import time

import pytest

from cli.explain import waterfall
from cli.node import as_text
from cli.text import age, duration, short, size, table
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2


def test_table_columns_are_as_wide_as_their_cells() -> None:
    assert table(("A", "LONG"), [("x" * 3, 1), ("", "y")]) == "A    LONG\nxxx  1\n     y"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1_034_000, "1010 KiB"),
        (4_420_000, "4.22 MiB"),
        (2**62, "4096 PiB"),
    ],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0093, "9.3 ms"), (0.9999, "1 s"), (42, "42 s"), (150, "2 min"), (7300, "2 h"), (200_000, "2 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ages() -> None:
    assert age(0) == "-"
    assert age(time.time_ns() - 90 * 10**9) == "90 s"


def test_short_ids() -> None:
    assert short("sha256:" + "ab" * 32) == short("ab" * 32) == "ababababababa"


def test_waterfall() -> None:
    begin = 1_700_000_000 * 10**9
    millisecond = 10**6
    operation = agent_pb2.OperationReport(
        object_id="ab" * 32,
        name="RunPodSandbox",
        started=begin,
        stages=[
            agent_pb2.StageReport(name="reserve", started=begin, seconds=0.002),
            agent_pb2.StageReport(name="network", started=begin + 2 * millisecond, seconds=0.006, failed=True),
            agent_pb2.StageReport(name="ready", started=begin + 8 * millisecond, seconds=-1),
        ],
    )
    first, *stages = waterfall(operation, begin + 10 * millisecond, "web").splitlines()
    assert first.startswith("RunPodSandbox  web ababababababa  ")
    assert first.endswith("  10 ms")
    assert stages[0] == "  reserve  " + "█" * 8 + " " * 32 + "      2 ms"
    assert stages[1] == "  network  " + " " * 8 + "█" * 24 + " " * 8 + "      6 ms  failed"
    assert stages[2] == "  ready    " + " " * 32 + "█" * 8 + "      2 ms  running"


def test_waterfall_of_an_operation_that_took_no_time() -> None:
    operation = agent_pb2.OperationReport(name="Stop", started=5, stages=[agent_pb2.StageReport(name="a", started=5)])
    assert "▏" in waterfall(operation, 5)


def test_events_name_what_is_gone() -> None:
    pod = cri_pb2.PodSandboxStatus(id="aa", metadata=cri_pb2.PodSandboxMetadata(name="shop"))
    web = cri_pb2.ContainerStatus(id="bb", metadata=cri_pb2.ContainerMetadata(name="web"))
    names: dict[str, str] = {}

    def told(kind: cri_pb2.ContainerEventType, identifier: str, *statuses: cri_pb2.ContainerStatus) -> str:
        event = cri_pb2.ContainerEventResponse(
            container_id=identifier,
            container_event_type=kind,
            created_at=10**18,
            pod_sandbox_status=pod,
            containers_statuses=statuses,
        )
        return as_text(event, names).split("  ", 1)[1]

    assert told(cri_pb2.CONTAINER_STARTED_EVENT, "aa") == "started   pod shop  aa"
    assert told(cri_pb2.CONTAINER_DELETED_EVENT, "bb") == "deleted   container shop/?  bb"
    assert told(cri_pb2.CONTAINER_STOPPED_EVENT, "bb", web) == "stopped   container shop/web  bb"
    assert told(cri_pb2.CONTAINER_DELETED_EVENT, "bb") == "deleted   container shop/web  bb"
