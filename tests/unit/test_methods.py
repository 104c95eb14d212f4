"""Which method of a service answers which call."""

from __future__ import annotations

from typing import Any

import pytest

from cri import methods
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2

CALLS = [method.name for method in cri_pb2.DESCRIPTOR.services_by_name["ImageService"].methods]


async def _answer(_self: Any, _request: Any) -> None:
    return None


def _service(calls: list[str]) -> object:
    return type("Images", (), {methods.snake_case(call): _answer for call in calls})()


def _handlers(calls: list[str]) -> list[Any]:
    return methods.service_handlers(cri_pb2.DESCRIPTOR, {"ImageService": _service(calls)}, ())


def test_every_call_has_its_method() -> None:
    assert len(_handlers(CALLS)) == 1


@pytest.mark.parametrize("call", CALLS)
def test_a_call_without_method_refuses_to_start(call: str) -> None:
    with pytest.raises(TypeError, match=f"{call} has no method '{methods.snake_case(call)}' in Images"):
        _handlers([other for other in CALLS if other != call] + [f"{call}s"])


def test_a_call_that_is_not_built_must_not_have_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "NOT_BUILT", frozenset({"PullImage"}))
    _handlers([call for call in CALLS if call != "PullImage"])
    with pytest.raises(TypeError, match="PullImage is declared as not built, but has the method 'pull_image'"):
        _handlers(CALLS)


def test_what_is_not_built_are_calls_of_the_cri() -> None:
    services = [*cri_pb2.DESCRIPTOR.services_by_name.values(), *agent_pb2.DESCRIPTOR.services_by_name.values()]
    assert {method.name for service in services for method in service.methods} >= methods.NOT_BUILT
