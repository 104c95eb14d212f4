"""How long a refused request waits, and which proxy it uses."""

from __future__ import annotations

import email.utils
import time

import aiohttp
import pytest

from images.registry.http import back_off, proxy_for, reason_of


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr("images.registry.http.asyncio.sleep", sleep)
    return found


async def test_a_registry_is_asked_again_when_it_says_so(waits: list[float]) -> None:
    await back_off(1, "7")
    await back_off(1, email.utils.formatdate(time.time() + 12, usegmt=True))
    await back_off(1, "100000")
    await back_off(1, email.utils.formatdate(time.time() - 100, usegmt=True))
    assert waits[0] == 7
    assert 10 < waits[1] <= 12
    assert waits[2:] == [30, 0]


@pytest.mark.parametrize("said", ["", "soon", "\u00b2", "\u0661", "Fri, 31 Feb 99999 25:61:61 GMT", "-1"])
async def test_otherwise_later_each_time(waits: list[float], said: str) -> None:
    for failures in range(1, 6):
        await back_off(failures, said)
    assert all(0.1 * 2**failures <= wait <= 0.2 * 2**failures for failures, wait in enumerate(waits, start=1))


def test_proxies_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert proxy_for("https://reg.example/v2/") is None
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example,.local")
    assert proxy_for("https://reg.example/v2/") == "http://proxy.example:3128"
    assert proxy_for("http://reg.example/v2/") is None
    assert proxy_for("https://inside.example:5000/v2/") is None
    assert proxy_for("https://reg.local/v2/") is None
    assert proxy_for("https://127.0.0.1:5000/v2/") is None
    monkeypatch.setenv("all_proxy", "http://other.example")
    assert proxy_for("http://reg.example/v2/") == "http://other.example"


async def test_the_reason_of_a_refused_connection_shows_no_objects() -> None:
    async with aiohttp.ClientSession() as session:
        for address in ("http://127.0.0.1:1/v2", "https://127.0.0.1:1/v2"):
            with pytest.raises(aiohttp.ClientConnectorError) as raised:
                await session.get(address)
            reason = reason_of(raised.value)
            assert reason.startswith("Cannot connect to host 127.0.0.1:1 [")
            assert "ssl" not in reason
