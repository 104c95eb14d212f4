"""Connections to the socket that conmon keeps beside a container."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from cri.streaming.attach_socket import AttachSocket
from host.errors import WrongStateError


async def test_clients_wait_until_conmon_accepts_them(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        server.bind(str(tmp_path / "attach"))
        server.listen(0)
        first = await AttachSocket.connect(tmp_path)
        stack.callback(first.close)
        second = asyncio.create_task(AttachSocket.connect(tmp_path))
        assert not (await asyncio.wait((second,), timeout=0.1))[0]
        server.accept()[0].close()
        (await second).close()


async def test_without_a_conmon_there_is_nothing_to_attach_to(tmp_path: Path) -> None:
    with pytest.raises(WrongStateError, match="nothing to attach to"):
        await AttachSocket.connect(tmp_path)
