"""Runs the Node Resource Interface of one agent: the plugins that it starts, and the socket for others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from runtime.nri.hooks import NriHooks
from runtime.nri.listener import Listener
from runtime.nri.options import NriOptions
from runtime.nri.started import StartedPlugins


@asynccontextmanager
async def serving(hooks: NriHooks, options: NriOptions, record: Path) -> AsyncIterator[None]:
    """Start plugins, wait until they are synchronised, and allow others to connect during the block.

    The processes of started plugins are recorded in the file ``record``. Raises UnavailableError if the agent cannot
    listen on a socket that is not the default one.
    """
    adaptation = hooks.adaptation
    async with AsyncExitStack() as stack:
        started = StartedPlugins(options, adaptation.new_trunk, adaptation.note_gone, record)
        stack.push_async_callback(started.close)
        stack.push_async_callback(hooks.close)
        await started.start()
        hooks.started = started
        await adaptation.settled()
        if options.external_connections:
            listener = Listener(options.socket, adaptation.new_trunk)
            stack.push_async_callback(listener.close)
            hooks.socket_problem = await listener.open()
            hooks.socket = "" if hooks.socket_problem else options.socket
        yield
