"""What comes on a console socket: with runc it is sent from inside the container, so it may be anything."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.errors import PodkeelError
from runtime.oci.console_socket import ConsoleSocket


@pytest.fixture
def console(tmp_path: Path) -> Iterator[ConsoleSocket]:
    with ConsoleSocket(tmp_path, "tty") as console:
        yield console


@pytest.fixture
def sender(console: ConsoleSocket, tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(str(tmp_path / "tty"))
        yield sender


def test_the_master_of_a_terminal_is_taken(console: ConsoleSocket, sender: socket.socket) -> None:
    master, slave = os.openpty()
    socket.send_fds(sender, [b"tty"], [master])
    taken = console.terminal()
    assert os.path.samestat(os.fstat(taken), os.fstat(master))
    for descriptor in (master, slave, taken):
        os.close(descriptor)


def test_silent_clients_are_not_waited_for(console: ConsoleSocket, sender: socket.socket) -> None:
    with pytest.raises(PodkeelError, match="not pass a terminal"):
        console.terminal()


def test_a_runtime_that_does_not_connect_is_an_error(console: ConsoleSocket) -> None:
    with pytest.raises(PodkeelError, match="not pass a terminal"):
        console.terminal()


def test_what_is_no_terminal_is_refused_and_closed(console: ConsoleSocket, sender: socket.socket) -> None:
    read, write = os.pipe()
    socket.send_fds(sender, [b"tty"], [write])
    with pytest.raises(PodkeelError, match="something other"):
        console.terminal()
    os.close(write)
    assert os.read(read, 1) == b""  # no copy of it is open any more
    os.close(read)
