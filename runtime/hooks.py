"""The events of pods and containers for NRI plugins. ``runtime.nri.hooks`` sends them."""

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
    """The calls at each event of a pod or container.

    A hook that documents it raises PodkeelError if a plugin refuses. Errors of other hooks are logged, because their
    event has happened or cannot be prevented. ``operation`` gets a stage for each plugin.
    """

    def sync_blocked(self) -> AbstractAsyncContextManager[None]:
        """A context that delays the synchronisation of new plugins, around a hook and its operation.

        It is entered after the locks of sandboxes and containers are taken, and must not be nested. Inside it the agent
        waits only for calls of plugins, which have a time limit, and for commits.
        """
        return nullcontext()

    async def concurrently(self, work: Awaitable[None], notification: Coroutine[Any, Any, None]) -> None:
        """Await ``work`` and ``notification``, the call of a hook that raises nothing. They may run concurrently.

        Either may begin first. Returns when both have ended. Raises the error of ``work``.
        """
        try:
            await work
        finally:
            await notification

    async def reload_plugins(self) -> list[str]:
        """Read the plugins of the node and their configurations again; returns a sentence for each change."""
        return []

    def service(self) -> dict[str, object]:
        """Whether plugins are served, the path of the socket where they connect, and why there is no socket."""
        return {"enabled": False, "socket": "", "problem": ""}

    def report(self) -> list[dict[str, object]]:
        """The connected plugins by index, with their calls; then the disconnected ones, with the reason."""
        return []

    def calls(self) -> Iterable[tuple[tuple[str, str], int, float, int]]:
        """For each plugin and method.

        The number of calls since the agent started, their seconds, the number of errors.
        """
        return ()

    async def run_sandbox(self, sandbox: Sandbox, operation: Operation) -> None:
        """A sandbox is complete and is about to be listed. Raises PodkeelError when a plugin refuses."""

    async def undo_sandbox(self, sandbox: Sandbox) -> None:
        """A sandbox was not completed."""

    async def update_sandbox(self, sandbox: Sandbox, overhead: Resources | None, resources: Resources | None) -> None:
        """A pod's resources will change. Raises PodkeelError when a plugin refuses."""

    async def updated_sandbox(self, sandbox: Sandbox) -> None:
        """A pod's resources have changed."""

    async def stop_sandbox(self, sandbox: Sandbox, operation: Operation) -> None:
        """All containers of a sandbox have ended, and its network is removed next. Called once."""

    async def remove_sandbox(self, sandbox: Sandbox, operation: Operation) -> None:
        """A sandbox is about to be deleted. Called once."""

    def describe(self, container: Container, draft: Draft) -> None:
        """Prepare ``create_container`` of this draft. A thread may call this."""

    async def no_plugin_adjusts(self, container: Container) -> bool:
        """Whether ``create_container`` is not needed, because no plugin wants to adjust the container."""
        return True

    def drafted(self, container: Container, draft: Draft) -> bool:
        """The draft of a container that no plugin adjusts is ready. False if ``create_container`` is needed after all.

        A thread may call this.
        """
        return True

    async def create_container(self, container: Container, draft: Draft, operation: Operation) -> None:
        """Have plugins change the draft of a container's spec. Raises PodkeelError when one refuses."""

    async def created_container(self, container: Container, operation: Operation) -> None:
        """A container is created and is about to be listed."""

    async def undo_container(self, container: Container) -> None:
        """A container was not completed."""

    async def start_container(self, container: Container, operation: Operation) -> None:
        """A container will be started. Raises PodkeelError when a plugin refuses."""

    async def started_container(self, container: Container, operation: Operation) -> None:
        """A container was started."""

    async def update_container(self, container: Container, given: Resources, operation: Operation) -> LimitChange:
        """A container's resources will change. Returns ``given`` with the changes of plugins.

        Raises PodkeelError when one refuses.
        """
        return LimitChange(given)

    async def updated_container(self, container: Container, operation: Operation) -> None:
        """A container's resources have changed."""

    async def stopped_container(self, container: Container) -> None:
        """A container has ended. Called once."""

    async def remove_container(self, container: Container, operation: Operation) -> None:
        """A container is about to be deleted. Called once."""

    async def carry_out(self, container: Container) -> None:
        """Change other containers as plugins asked at the last events of this one. The caller must hold no locks."""

    def forget(self, object_id: str) -> None:
        """A sandbox or container is deleted."""
