"""The names of pods and containers in use, and the calls that create one."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from host.concurrency.tasks import SingleFlight
from host.errors import AlreadyExistsError
from proto.runtime.v1 import cri_pb2
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox, SandboxState

Identity = tuple[Any, ...]


class Request(Protocol):
    """A client's request for an object. Equal requests ask for the same object."""

    @property
    def identity(self) -> Identity:
        """The name that the object would have."""

    @property
    def title(self) -> str:
        """The name in errors of the object that is not created yet."""


class Named(Protocol):
    """A sandbox or container."""

    @property
    def title(self) -> str:
        """Its name in errors."""

    @property
    def visible(self) -> bool:
        """Whether clients may see it."""


R = TypeVar("R", bound=Request)
T = TypeVar("T", bound=Named)


class Registrar(Generic[R, T]):
    """Gives each name to one pod or container, because clients of the CRI repeat their calls.

    ``request_of`` returns the request that created an object. ``usable``: whether the object can be returned for an
    equal request; ``over`` describes one that cannot. ``given_up`` is the message of the WrongStateError that callers
    get if ``cancel`` or ``drain`` ends the creation.
    """

    def __init__(self, *, request_of: Callable[[T], R], usable: Callable[[T], bool], over: str, given_up: str) -> None:
        self._request_of = request_of
        self._usable = usable
        self._over = over
        self._flights: SingleFlight[Identity, T] = SingleFlight(given_up)
        self._taken: dict[Identity, T] = {}

    def __len__(self) -> int:
        """The number of objects that are being created."""
        return len(self._flights)

    def adopt(self, item: T) -> None:
        """Reserve an object's name, unless clients do not see it: they could not remove it to free the name."""
        if item.visible:
            self._taken[self._request_of(item).identity] = item

    async def run(self, request: R, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Create the requested object and return it. It has the name until ``release``.

        An equal request joins the creation, or gets the existing object. The creation is cancelled when all callers
        have left. It undoes its steps; the next caller waits for that and begins again. Raises the errors of ``make``,
        and AlreadyExistsError if an object with another configuration, or one that cannot be used, has the name.
        """
        pending = await self._flights.request_of(request.identity)
        if pending is None:
            existing = self._taken.get(request.identity)
            if existing is not None and existing.visible:
                return self._same(existing, request)
        elif pending != request:
            raise AlreadyExistsError(f"{request.title} is being made with another configuration: raise the attempt")
        return await self._flights.run(request.identity, lambda: self._make(make), request)

    def release(self, item: T) -> None:
        """Free the name of a removed object. May be repeated. The name of another object does not change."""
        identity = self._request_of(item).identity
        if self._taken.get(identity) is item:
            del self._taken[identity]

    async def cancel(self, wanted: Callable[[Identity], bool]) -> None:
        """Cancel the creations of the identities that are ``wanted``, and wait until they are undone."""
        await self._flights.cancel(wanted)

    async def drain(self) -> None:
        """Cancel all creations, wait until they are undone, and refuse new ones, when the agent stops."""
        await self._flights.close()

    async def _make(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        item = await make()
        self.adopt(item)
        return item

    def _same(self, existing: T, request: R) -> T:
        usable = self._usable(existing)
        if usable and self._request_of(existing) == request:
            return existing
        why = "is there with another configuration" if usable else self._over
        raise AlreadyExistsError(f"{existing.title} {why}: raise metadata.attempt, or remove it first")


@dataclass(frozen=True, slots=True)
class PodRequest:
    """The request of RunPodSandbox. ``handler`` is the name in the request, empty for the default.

    ``restoring`` is the call of RestorePod, so that its request equals no other.
    """

    config: cri_pb2.PodSandboxConfig
    handler: str
    restoring: str = ""

    @property
    def identity(self) -> tuple[str, str, str, int]:
        """Name, namespace, uid and attempt."""
        metadata = self.config.metadata
        return (metadata.name, metadata.namespace, metadata.uid, metadata.attempt)

    @property
    def title(self) -> str:
        """The sandbox's name in errors."""
        metadata = self.config.metadata
        return f"sandbox {metadata.namespace}/{metadata.name} attempt {metadata.attempt}"


@dataclass(frozen=True, slots=True)
class ContainerRequest:
    """The request of CreateContainer."""

    sandbox: Sandbox = field(compare=False)
    config: cri_pb2.ContainerConfig

    @property
    def identity(self) -> tuple[str, str, int]:
        """Sandbox id, name and attempt."""
        return (self.sandbox.id, self.config.metadata.name, self.config.metadata.attempt)

    @property
    def title(self) -> str:
        """The container's name in errors."""
        metadata = self.config.metadata
        return f"container {metadata.name!r} attempt {metadata.attempt} of {self.sandbox.title}"


PodRegistrar = Registrar[PodRequest, Sandbox]
ContainerRegistrar = Registrar[ContainerRequest, Container]


def pod_registrar() -> PodRegistrar:
    """The registrar of an agent's pods."""
    return Registrar(
        request_of=lambda sandbox: PodRequest(sandbox.config, sandbox.record.requested_handler),
        usable=lambda sandbox: sandbox.record.state is SandboxState.READY and not sandbox.closing,
        over="was stopped and not removed",
        given_up="its making was ended: the agent is stopping",
    )


def container_registrar() -> ContainerRegistrar:
    """The registrar of an agent's containers."""
    return Registrar(
        request_of=lambda container: ContainerRequest(container.sandbox, container.config),
        usable=lambda container: container.record.state in (ContainerState.CREATED, ContainerState.RUNNING),
        over="has exited",
        given_up="its making was ended: its pod or the agent is stopping",
    )
