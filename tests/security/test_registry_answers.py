"""Registries and token servers are not trusted: every answer has limits of size and time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import repeat

import pytest

from tests.integration.agent.refusals import refused
from tests.security.test_image_documents import forget_peak, peak_memory, pull
from tests.support.agent import AgentProcess
from tests.support.image_builder import OCI_MANIFEST
from tests.support.scripted_registry import Answer, Script, ScriptedRegistry, run_scripted_registry

ENDLESS = 20_000  # pieces of 64 KiB


@pytest.fixture
def scripted() -> Iterator[ScriptedRegistry]:
    with run_scripted_registry() as running:
        yield running


@pytest.fixture
def small(quiet_log: AgentProcess) -> Iterator[AgentProcess]:
    """The shared agent. Its memory must stay small during the test."""
    forget_peak(quiet_log)
    before = peak_memory(quiet_log)
    yield quiet_log
    assert peak_memory(quiet_log) - before < 64 << 20


def endless(status: int = 200, **headers: str) -> Script:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: Answer(repeat(b" " * 65536, ENDLESS), OCI_MANIFEST, status, named)


def challenge(registry: ScriptedRegistry) -> Answer:
    realm = f'Bearer realm="{registry.address}/token",service="reg"'
    return Answer(b"{}", status=401, headers={"WWW-Authenticate": realm})


def test_an_endless_token_is_refused(small: AgentProcess, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("private")
    scripted.answers["/v2/private/manifests/latest"] = challenge(scripted)
    scripted.answers["/token"] = endless()
    refused("PERMISSION_DENIED", "larger than 1048576 bytes", call=partial(pull, small, name))
    assert scripted.sent["/token"] < 64 << 20


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_an_endless_error_is_refused(small: AgentProcess, scripted: ScriptedRegistry, status: int) -> None:
    name = scripted.offer_image("private")
    scripted.answers["/v2/private/manifests/latest"] = endless(status)
    codes = {401: "PERMISSION_DENIED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND"}
    refused(codes.get(status, "UNKNOWN"), name, call=partial(pull, small, name))
    assert scripted.sent["/v2/private/manifests/latest"] < 64 << 20


def test_endless_headers_are_refused(small: AgentProcess, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("private")
    for headers in ({f"X-{number}": "x" * 1000 for number in range(100_000)}, {"X": "x" * (32 << 20)}):
        scripted.answers["/v2/private/manifests/latest"] = Answer(b"{}", headers=headers)
        refused("UNKNOWN", "RegistryUnavailable", call=partial(pull, small, name))


def test_endless_redirects_are_refused(small: AgentProcess, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("private")
    path = "/v2/private/manifests/latest"
    scripted.answers[path] = Answer(status=307, headers={"Location": path})
    refused("UNKNOWN", "RegistryUnavailable", "redirects", call=partial(pull, small, name))
    assert len(scripted.seen) < 100


def test_bodies_of_redirects_are_not_read(small: AgentProcess, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("private")
    path = "/v2/private/manifests/latest"
    scripted.answers["/there"] = scripted.answers[path]
    scripted.answers[path] = endless(307, Location="/there")
    pull(small, name)
    assert scripted.sent.get(path, 0) < 64 << 20


def test_a_token_that_would_end_the_header_is_refused(quiet_log: AgentProcess, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("private")
    scripted.answers["/v2/private/manifests/latest"] = challenge(scripted)
    for token in ("a\r\nX-Injected: yes", "a\nb", "\u00fc", "\x00"):
        scripted.answers["/token"] = Answer(json.dumps({"token": token}).encode())
        refused("PERMISSION_DENIED", "no header may have", call=partial(pull, quiet_log, name))
    assert not any("X-Injected" in request.headers for request in scripted.seen)


NESTED = b"[" * 3000 + b"]" * 3000


@pytest.mark.parametrize("body", [NESTED, b'{"errors": ' + NESTED + b"}", b'{"token": ' + NESTED + b"}", b"\xff\x00"])
def test_nested_answers_cause_no_internal_error(
    quiet_log: AgentProcess, scripted: ScriptedRegistry, body: bytes
) -> None:
    name = scripted.offer_image("private")
    for status, code in ((403, "PERMISSION_DENIED"), (404, "NOT_FOUND"), (400, "UNKNOWN")):
        scripted.answers["/v2/private/manifests/latest"] = Answer(body, status=status)
        refused(code, name, str(status), call=partial(pull, quiet_log, name))
    scripted.answers["/v2/private/manifests/latest"] = challenge(scripted)
    scripted.answers["/token"] = Answer(body)
    refused("PERMISSION_DENIED", "is not understood", call=partial(pull, quiet_log, name))


def test_credentials_go_to_no_other_host(quiet_log: AgentProcess, scripted: ScriptedRegistry) -> None:
    with run_scripted_registry() as thief:
        thief.answers["/token"] = Answer(b"{}")
        name = scripted.offer_image("private")
        scripted.answers["/v2/private/manifests/latest"] = challenge(scripted)
        scripted.answers["/token"] = Answer(status=302, headers={"Location": f"{thief.address}/token"})
        refused("PERMISSION_DENIED", call=partial(pull, quiet_log, name, "user", "secret"))
        assert [request.headers.get("Authorization") for request in thief.seen] == [None]
    assert scripted.requests("/token")[0].headers["Authorization"]
