"""What plugins may make the agent keep and parse: one budget for all, and a look at messages before they are parsed."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from host.errors import InvalidArgumentError
from proto.nri.v1alpha1 import nri_pb2
from proto.ttrpc.v1 import ttrpc_pb2
from runtime.nri.answers.wire_check import check_wire
from runtime.nri.messages import split
from runtime.nri.plugins.budget import Budget, Share
from runtime.nri.plugins.decoding import LARGE_BYTES, Decoder

Adjustment, Response = nri_pb2.ContainerAdjustment, nri_pb2.CreateContainerResponse


class Plugins:
    """Shares of one budget, and why each was closed."""

    def __init__(self, most: int) -> None:
        self.budget = Budget(most)
        self.closed: dict[str, str] = {}

    def share(self, name: str) -> Share:
        def close(why: str) -> None:
            self.closed[name] = why

        return self.budget.share(close)


def test_a_budget_closes_the_oldest_that_keeps_its_part_of_it() -> None:
    plugins = Plugins(100)
    small, old, young = (plugins.share(name) for name in ("small", "old", "young"))
    small.add(1)
    old.add(50)
    young.add(40)
    assert plugins.closed == {}
    young.add(20)
    assert list(plugins.closed) == ["old"]
    assert "more than 100 bytes" in plugins.closed["old"]
    assert plugins.budget.kept == 61
    old.add(1000)  # which is closed
    old.drop(50)
    assert plugins.budget.kept == 61
    young.drop(60)
    small.end()
    assert plugins.budget.kept == 0


def test_a_message_that_is_sent_in_one_go_outlasts_many_that_are_kept_half() -> None:
    plugins = Plugins(64 << 20)
    halves = [plugins.share(str(number)) for number in range(60)]
    for share in halves:
        for _ in range(4):
            share.add((1 << 20) - 1)
    honest = plugins.share("honest")
    for _ in range(256):
        honest.add(16 << 10)
    assert "honest" not in plugins.closed
    assert plugins.budget.kept <= 64 << 20


def empty_messages(field: int, count: int) -> bytes:
    return bytes((field << 3 | 2, 0)) * count


@pytest.mark.parametrize(
    ("kind", "data", "why"),
    [
        (nri_pb2.UpdateContainersRequest, empty_messages(1, 5000), "too many updates at once: the limit is 4096"),
        (nri_pb2.UpdateContainersRequest, empty_messages(2, 5000), "too many updates at once: the limit is 4096"),
        (Adjustment, empty_messages(3, 2000), "too many entries of mounts: the limit is 1024"),
        (Adjustment, empty_messages(2, 2000), "too many entries of annotations: the limit is 1024"),
        (Adjustment, Adjustment(args=["x"] * 2000).SerializeToString(), "too many entries of args: the limit is 1024"),
        (Response, empty_messages(15, 70_000), "too many fields: the limit is 65536"),
        (ttrpc_pb2.Request, empty_messages(5, 2000), "too many entries of metadata: the limit is 1024"),
        (
            nri_pb2.LinuxScheduler,
            nri_pb2.LinuxScheduler(flags=[nri_pb2.SCHED_FLAG_RECLAIM] * 20_000).SerializeToString(),
            "too many entries of flags: the limit is 1024",
        ),
        (
            Response,
            Response(
                adjust=Adjustment(mounts=[nri_pb2.Mount(options=["ro"] * 60) for _ in range(1024)]),
                update=[nri_pb2.ContainerUpdate(container_id="x") for _ in range(4096)],
            ).SerializeToString(),
            "too many fields: the limit is 65536",
        ),
    ],
    ids=["updates", "evictions", "list", "map", "texts", "unknown", "envelope", "packed", "together"],
)
def test_a_message_of_too_many_parts_is_refused(kind: type[Message], data: bytes, why: str) -> None:
    with pytest.raises(InvalidArgumentError, match=why):
        check_wire(data, kind.DESCRIPTOR)  # type: ignore[arg-type]  # the stubs name its Python twin


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xff" * 11,
        b"\x0a\x7f",
        b"\x0a\x05\x0a\x7f\x00\x00\x00",
        b"\x0b\x0b\x0c",
        b"\x09\x00",
        Response(update=[nri_pb2.ContainerUpdate(container_id="x" * 64)] * 4096).SerializeToString(),
        Response(adjust=Adjustment(mounts=[nri_pb2.Mount(destination="/x" * 90)] * 1024)).SerializeToString(),
    ],
)
def test_what_is_no_message_or_within_the_limits_is_for_the_parser(data: bytes) -> None:
    check_wire(data, Response.DESCRIPTOR)  # type: ignore[arg-type]  # as above


async def test_large_messages_are_parsed_as_small_ones_are() -> None:
    given = Adjustment(annotations={"long": "x" * LARGE_BYTES}, args=["a"])
    assert await Decoder().decode(Adjustment, given.SerializeToString()) == given
    with pytest.raises(InvalidArgumentError, match="too many fields"):
        await Decoder().decode(Response, empty_messages(15, 2 << 20))


def test_a_container_too_large_for_a_message_does_not_hide_the_others() -> None:
    large = nri_pb2.Container(id="large", args=["x" * (4 << 20)])
    pods = [nri_pb2.PodSandbox(id="pod")]
    (request,) = split(pods, [nri_pb2.Container(id="a"), large, nri_pb2.Container(id="b")])
    assert ([pod.id for pod in request.pods], [one.id for one in request.containers]) == (["pod"], ["a", "b"])
    assert not request.more
