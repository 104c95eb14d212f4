"""What clients get told of errors."""

from __future__ import annotations

import grpc

from cri.errors import MESSAGE_LIMIT, status_of
from host.errors import LimitError


def test_a_message_can_be_sent_whatever_it_quotes() -> None:
    name = b"\xff.txt".decode(errors="surrogateescape")
    code, message = status_of(LimitError(f"layer: {name} is too large"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message.encode() == rb"layer: \udcff.txt is too large"
    assert len(status_of(LimitError("x" * 5000))[1]) == MESSAGE_LIMIT
