"""Which agent a client command talks to."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from host.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cli.client import Client


def connect(options: argparse.Namespace) -> Client:
    """A client of the socket given by ``--socket``, else $PODKEEL_SOCKET, else the configuration of this host.

    Raises InvalidArgumentError if that is no unix socket.
    """
    from cli.client import Client

    named = options.socket or os.environ.get("PODKEEL_SOCKET")
    if named and not named.startswith("unix:///"):
        where = "--socket" if options.socket else "$PODKEEL_SOCKET"
        raise InvalidArgumentError(
            f'{where}: expected a unix socket such as "unix:///run/podkeel/podkeel.sock", got "{named}"'
        )
    return Client(named or _configured_socket())


def _configured_socket() -> str:
    from cli.agent.config import load_for

    return load_for(argparse.Namespace()).configuration.server.socket
