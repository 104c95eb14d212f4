"""Which agent a client command talks to."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cli.client import Client


def connect(options: argparse.Namespace) -> Client:
    """A client of the socket given by ``--socket``, else $PODKEEL_SOCKET, else the configuration of this host."""
    from cli.client import Client

    return Client(options.socket or os.environ.get("PODKEEL_SOCKET") or _configured_socket())


def _configured_socket() -> str:
    from cli.config import load_for

    return load_for(argparse.Namespace()).configuration.server.socket
