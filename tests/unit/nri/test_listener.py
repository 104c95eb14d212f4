"""The socket of plugins where another process has it already."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import pytest

from host.errors import UnavailableError
from runtime.nri import listener
from runtime.nri.listener import Listener
from runtime.nri.plugins.trunk import Trunk


def trunk() -> Trunk:
    return Trunk(lambda _trunk: None, lambda _why: None)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "nri/nri.sock")


async def test_a_default_socket_that_is_taken_is_a_warning_with_a_remedy(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "DEFAULT_SOCKET", path)
    first, second = Listener(path, trunk), Listener(path, trunk)
    assert await first.open() == ""
    assert "another process serves it" in await second.open()
    assert "set nri.socket to another path, or nri.external_connections to false" in caplog.text
    assert [record.levelno for record in caplog.records if "cannot connect" in record.message] == [logging.WARNING]
    await second.close()
    with socket.socket(socket.AF_UNIX) as client:  # the first still has it
        client.connect(path)
    await first.close()
    assert not Path(path).exists()


async def test_another_socket_that_is_taken_is_an_error(path: str) -> None:
    first, second = Listener(path, trunk), Listener(path, trunk)
    await first.open()
    with pytest.raises(UnavailableError, match=r"another process serves it.*: set nri.socket to another path"):
        await second.open()
    await first.close()


async def test_a_socket_that_a_dead_agent_left_is_replaced(path: str) -> None:
    Path(path).parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    found = Listener(path, trunk)
    assert await found.open() == ""
    assert Path(path).stat().st_mode & 0o777 == 0o600
    await asyncio.sleep(0)
    await found.close()
