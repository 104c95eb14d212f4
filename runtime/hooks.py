"""The events of pods and containers for plugins of the node; ``runtime.nri.hooks`` sends them."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from host.stages import Operation
from proto.runtime.v1 import cri_pb2
from runtime.specgen.limits.extra_limits import LimitChange
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox

if TYPE_CHECKING:
    from runtime.specgen.draft import Draft

Resources = cri_pb2.LinuxContainerResources


class Hooks:
    """What managers call at each event of a pod or container.

    A hook that says so raises PodkeelError if a plugin refuses. Errors of other hooks are logged, as their event has
    happened or must continue. ``operation`` gets a stage for each plugin.
    """

    def sync_blocked(self) -> AbstractAsyncContextManager[None]:
        """Delays the synchronisation of new plugins, for ``async with``: around a hook and its operation.

        It is taken after the locks of sandboxes and containers, and never inside another one. Inside it the agent waits
        only for calls of plugins, which have a time limit, and for commits.
        """
        return nullcontext()

    async def concurrently(self, work: Awaitable[None], notification: Coroutine[Any, Any, None]) -> None:
        """Await ``work``, and ``notification``, the call of a hook that raises nothing, while it runs or after it.

        ``notification`` begins once ``work`` waits for something. Raises what ``work`` does; both are over then.
        """
        try:
            await work
        finally:
            await notification

    async def reload_plugins(self) -> list[str]:
        """Read the plugins of the node and their configurations again; returns a sentence for each change."""
        return []

    def service(self) -> dict[str, object]:
        """Whether plugins are served, the path of the socket where they connect, and why there is none."""
        return {"enabled": False, "socket": "", "problem": ""}

    def report(self) -> list[dict[str, object]]:
        """The plugins that are connected, by index, and what they were asked; then those that are gone, and why."""
        return []

    def calls(self) -> Iterable[tuple[tuple[str, str], int, float, int]]:
        """Plugin and method, with the number of calls since the agent's start, their seconds, and how many failed."""
        return ()

    async def run_sandbox(self, sandbox: Sandbox, operation: Operation) -> None:
        """A sandbox is whole and will be seen next. Raises PodkeelError when a plugin refuses."""

    async def undo_sandbox(self, sandbox: Sandbox) -> None:
        """It was not completed."""

    async def update_sandbox(self, sandbox: Sandbox, overhead: Resources | None, resources: Resources | None) -> None:
        """A pod's resources will change. Raises PodkeelError when a plugin refuses."""

    async def updated_sandbox(self, sandbox: Sandbox) -> None:
        """They did."""

    async def stop_sandbox(self, sandbox: Sandbox, operation: Operation) -> None:
        """All containers of a sandbox have ended; its network is removed next. Called once."""

    async def remove_sandbox(self, sandbox: Sandbox, operation: Operation) -> None:
        """A sandbox is about to be forgotten. Called once."""

    async def no_plugin_adjusts(self, container: Container) -> bool:
        """Whether ``create_container`` has nothing to do: no plugin wants to change the container."""
        return True

    def drafted(self, container: Container, draft: Draft) -> bool:
        """The draft of a container that no plugin adjusts is ready; False if ``create_container`` is needed after all.

        This may be called from a thread.
        """
        return True

    async def create_container(self, container: Container, draft: Draft, operation: Operation) -> None:
        """Have plugins change the draft of a container's spec. Raises PodkeelError when one refuses."""

    async def created_container(self, container: Container, operation: Operation) -> None:
        """A container is created and will be seen next."""

    async def undo_container(self, container: Container) -> None:
        """It was not completed."""

    async def start_container(self, container: Container, operation: Operation) -> None:
        """A container will be started. Raises PodkeelError when a plugin refuses."""

    async def started_container(self, container: Container, operation: Operation) -> None:
        """It was started."""

    async def update_container(self, container: Container, given: Resources, operation: Operation) -> LimitChange:
        """A container's resources will change; returns what plugins make of ``given``.

        Raises PodkeelError when one refuses.
        """
        return LimitChange(given)

    async def updated_container(self, container: Container, operation: Operation) -> None:
        """They did."""

    async def stopped_container(self, container: Container) -> None:
        """A container has ended. Called once."""

    async def remove_container(self, container: Container, operation: Operation) -> None:
        """A container is about to be forgotten. Called once."""

    async def carry_out(self, container: Container) -> None:
        """Change other containers as plugins asked at the last events of this one. Call it without locks."""

    def forget(self, object_id: str) -> None:
        """A sandbox or container is gone."""
