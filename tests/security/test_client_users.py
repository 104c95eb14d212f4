"""A user with many processes connected to the CRI's socket does not take the connections of other users."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from cri.connections import make_room

NOBODY = 65534
_CONNECT = """
import os, socket, sys, time
for _ in range(int(sys.argv[2])):
    if os.fork() == 0:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(sys.argv[1])
        connection.recv(1)
        os._exit(0)
"""


def test_connections_of_one_user_with_many_processes_are_closed_first(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = str(tmp_path / "s")
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(path)
        os.chmod(path, 0o666)  # noqa: PTH101 - beside others by this path
        server.listen(32)
        folder = os.open(tmp_path, os.O_PATH)
        stack.callback(os.close, folder)
        ours = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        for connection in ours:
            connection.connect(path)
        command = [sys.executable, "-c", _CONNECT, f"/proc/self/fd/{folder}/s", "8"]
        subprocess.run(command, user=NOBODY, pass_fds=(folder,), check=True)
        accepted = [stack.enter_context(server.accept()[0]) for _ in range(11)]
        closed = make_room(path, 7)
        assert sum(count for count, _ in closed.values()) == 4
        assert os.getpid() not in closed
        for connection, accept in zip(ours, accepted, strict=False):
            accept.sendall(b"x")
            assert connection.recv(1) == b"x"
        assert len(closed) == 4, "one of each process"
