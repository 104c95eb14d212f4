"""The names of pods and containers that are in use, and the calls that are making one."""

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
        """The name that is taken."""

    @property
    def title(self) -> str:
        """How errors name what is not made yet."""


class Named(Protocol):
    """A sandbox or container."""

    @property
    def title(self) -> str:
        """How errors name it."""

    @property
    def visible(self) -> bool:
        """Whether clients may see it."""


R = TypeVar("R", bound=Request)
T = TypeVar("T", bound=Named)


class Registrar(Generic[R, T]):
    """Gives each name to one pod or container, as the CRI's clients repeat their calls.

    ``request_of`` is the request that an object answers. ``usable`` says whether it can be the answer to an equal
    request; what cannot is described by ``over``. ``given_up`` is the message of the WrongStateError that callers get
    whose making is ended by ``cancel`` or ``drain``.
    """

    def __init__(self, *, request_of: Callable[[T], R], usable: Callable[[T], bool], over: str, given_up: str) -> None:
        self._request_of = request_of
        self._usable = usable
        self._over = over
        self._flights: SingleFlight[Identity, T] = SingleFlight(given_up)
        self._taken: dict[Identity, T] = {}

    def __len__(self) -> int:
        """How many are being made."""
        return len(self._flights)

    def adopt(self, item: T) -> None:
        """Give an object its name, unless clients do not see it: they could not remove it to free the name."""
        if item.visible:
            self._taken[self._request_of(item).identity] = item

    async def run(self, request: R, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Make what is asked for, and return it; it has the name until ``release``.

        An equal request joins a making, or gets the object that is there. The making is cancelled when all callers have
        left; it undoes what it did, and the next caller waits for that and then makes its own. Raises what ``make``
        raises, and AlreadyExistsError if the name is taken by another configuration, or by what is over.
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
        """Free the name of an object that is gone. Repeatable; the name of another object is left alone."""
        identity = self._request_of(item).identity
        if self._taken.get(identity) is item:
            del self._taken[identity]

    async def cancel(self, wanted: Callable[[Identity], bool]) -> None:
        """Cancel the makings of the identities that are ``wanted``, and wait until they are undone."""
        await self._flights.cancel(wanted)

    async def drain(self) -> None:
        """Cancel all makings, wait until they are undone, and begin none any more; for the agent's end."""
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
    """What RunPodSandbox asks for; ``handler`` as the client names it, empty for the default.

    ``restoring`` is the call of RestorePod that asks, so that its request equals no other.
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
        """How errors name the sandbox."""
        metadata = self.config.metadata
        return f"sandbox {metadata.namespace}/{metadata.name} attempt {metadata.attempt}"


@dataclass(frozen=True, slots=True)
class ContainerRequest:
    """What CreateContainer asks for."""

    sandbox: Sandbox = field(compare=False)
    config: cri_pb2.ContainerConfig

    @property
    def identity(self) -> tuple[str, str, int]:
        """Sandbox id, name and attempt."""
        return (self.sandbox.id, self.config.metadata.name, self.config.metadata.attempt)

    @property
    def title(self) -> str:
        """How errors name the container."""
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
