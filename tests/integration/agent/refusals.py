"""How tests ask for what must be refused."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest


def refused(code: str, *words: str, call: Callable[[], object]) -> str:
    """Make a call that must fail with ``code`` and a message that holds all ``words``; returns the message."""
    with pytest.raises(grpc.RpcError) as failed:
        call()
    message = str(failed.value.details())
    assert failed.value.code().name == code, message
    assert "Traceback" not in message
    for word in words:
        assert word in message, message
    return message
