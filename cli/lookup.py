"""Find the pod or container that a user names by its name, its id or the beginning of its id."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cli.client import Client
from host.errors import InvalidArgumentError, NotFoundError
from proto.runtime.v1 import cri_pb2

T = TypeVar("T", cri_pb2.PodSandbox, cri_pb2.Container)


def list_pods(client: Client) -> list[cri_pb2.PodSandbox]:
    """Every pod, newest first."""
    request = cri_pb2.ListPodSandboxRequest()
    answer = client.call(request, cri_pb2.ListPodSandboxResponse, "list pods")
    return sorted(answer.items, key=lambda pod: -pod.created_at)


def list_containers(client: Client, pod_id: str = "") -> list[cri_pb2.Container]:
    """Every container (of the pod, if one is named), newest first."""
    request = cri_pb2.ListContainersRequest(filter=cri_pb2.ContainerFilter(pod_sandbox_id=pod_id))
    answer = client.call(request, cri_pb2.ListContainersResponse, "list containers")
    return sorted(answer.containers, key=lambda container: -container.created_at)


def find_pod(client: Client, wanted: str) -> cri_pb2.PodSandbox:
    """The pod named ``wanted`` (the newest of its attempts), ``namespace/name``, or with that id or prefix of one.

    Raises NotFoundError if there is none, InvalidArgumentError if there are several.
    """
    return _choose("pod", wanted, list_pods(client), pod_names, pod_names)


def find_container(client: Client, wanted: str) -> cri_pb2.Container:
    """The container named ``wanted`` (the newest of its attempts), ``pod/name``, or with that id or prefix of one.

    Raises NotFoundError if there is none, InvalidArgumentError if there are several.
    """
    pods = {pod.id: pod for pod in list_pods(client)}

    def names(container: cri_pb2.Container) -> list[str]:
        pod = pods.get(container.pod_sandbox_id)
        qualified = [f"{name}/{container.metadata.name}" for name in (pod_names(pod) if pod else ())]
        return [container.metadata.name, *qualified]

    def same(container: cri_pb2.Container) -> list[str]:
        return [container.pod_sandbox_id, container.metadata.name]

    return _choose("container", wanted, list_containers(client), names, same)


def pod_names(pod: cri_pb2.PodSandbox) -> list[str]:
    """The names that select a pod: its name, and its namespace and name."""
    return [pod.metadata.name, f"{pod.metadata.namespace}/{pod.metadata.name}"]


def _choose(
    kind: str,
    wanted: str,
    items: Sequence[T],
    names: Callable[[T], list[str]],
    identity: Callable[[T], list[str]],
) -> T:
    exact = [item for item in items if item.id == wanted]
    named = exact or [item for item in items if wanted in names(item)]
    found = named or [item for item in items if wanted and item.id.startswith(wanted)]
    if not found:
        raise NotFoundError(f"no {kind} is called {wanted!r} or has an id that begins with it")
    if len({tuple(identity(item)) for item in found}) > 1 or (not named and len(found) > 1):
        raise InvalidArgumentError(f"{wanted!r} may mean several {kind}s, use more of the id: {_listed(kind, found)}")
    return found[0]  # attempts of the same object: choose the newest


def _listed(kind: str, items: Iterable[cri_pb2.PodSandbox | cri_pb2.Container]) -> str:
    shown = [f"{item.metadata.name} {item.id[:13]}" for item in items]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
