"""The errors that clients get."""

from __future__ import annotations

from urllib.parse import quote

import grpc

from cri.errors import MESSAGE_LIMIT, status_of
from host.errors import LimitError


def test_a_message_can_be_sent_with_any_quoted_bytes() -> None:
    name = b"\xff.txt".decode(errors="surrogateescape")
    code, message = status_of(LimitError(f"layer: {name} is too large"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message.encode() == rb"layer: \udcff.txt is too large"
    assert MESSAGE_LIMIT - 10 < len(status_of(LimitError("x" * 5000))[1]) < MESSAGE_LIMIT
    assert len(status_of(LimitError("x" * MESSAGE_LIMIT))[1]) < MESSAGE_LIMIT
    fits = "x" * (MESSAGE_LIMIT - 9)
    assert status_of(LimitError(fits))[1] == fits


def test_a_message_stays_below_what_clients_take_as_it_is_encoded() -> None:
    code, message = status_of(LimitError("container c: user '" + "é" * 5000 + "'"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(quote(message, safe=" :'")) <= MESSAGE_LIMIT
    assert message.startswith("container c: user 'é")
    assert message.endswith("é…")
    short = "é" * (MESSAGE_LIMIT // 6 - 2)
    assert status_of(LimitError(short))[1] == short
