"""Plugins of the node (NRI) as the agent has them. Their code is loaded only if they are enabled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cgroups.tree import CgroupTree
from runtime.hooks import Hooks
from runtime.nri.options import NriOptions
from runtime.oci.handlers import Handlers
from runtime.specgen.limits.extra_limits import LimitChange
from runtime.specgen.node_facts import NodeFacts
from runtime.state.container import Container
from runtime.state.state import State

if TYPE_CHECKING:
    from runtime.nri.hooks import NriHooks


class NodePlugins:
    """Plugins are served if ``options`` enables them; ``version`` of the agent is reported to them."""

    def __init__(self, options: NriOptions | None, version: str) -> None:
        self._options = options
        self._version = version
        self._hooks: NriHooks | None = None

    def make_hooks(
        self,
        *,
        state: State,
        handlers: Handlers,
        cgroups: CgroupTree,
        facts: NodeFacts,
        update: Callable[[Container, LimitChange], Awaitable[None]],
        end: Callable[[Container], Awaitable[None]],
    ) -> Hooks:
        """The hooks that call plugins; hooks that do nothing if no plugins are served.

        Plugins may ask for ``update``, which changes a container's limits, and for ``end``, which kills a container.
        """
        if self._options is None or not self._options.enabled:
            return Hooks()
        from runtime.nri.changes import Changing
        from runtime.nri.hooks import NriHooks

        if self._options.blockio_config_file or self._options.default_validator.enabled:
            import yaml  # noqa: F401  # it takes longer than the loop may be held later

        self._hooks = NriHooks(
            state=state,
            handlers=handlers,
            cgroups=cgroups,
            facts=facts,
            options=self._options,
            version=self._version,
            changing=Changing(update, end),
        )
        return self._hooks

    async def serve(self, stack: AsyncExitStack, record: Path) -> None:
        """Allow plugins to see and change what is made from now on, until the end of ``stack``.

        ``record`` is where the processes of started plugins are noted.
        """
        if self._hooks is None:
            return
        from runtime.nri.service import serving

        assert self._options is not None
        await stack.enter_async_context(serving(self._hooks, self._options, record))
