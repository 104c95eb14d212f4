"""Commands on pods and containers: listing, stopping, starting, removing, inspecting."""

from __future__ import annotations

import argparse
import json
import sys

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cli import lookup
from cli.client import CALL_SECONDS, Client
from cli.connect import connect
from cli.manifest import pod_folder
from cli.text import age, short, table
from host.errors import NotFoundError
from proto.runtime.v1 import cri_pb2

_FORCE_SECONDS = 600.0  # each CNI plugin may use its whole timeout, twice


def list_pods(options: argparse.Namespace) -> None:
    """``podkeel pods``."""
    with connect(options) as client:
        pods = lookup.list_pods(client)
        if options.quiet:
            print(*(pod.id for pod in pods), sep="\n", end="\n" if pods else "")
            return
        rows = [
            (
                short(pod.id),
                pod.metadata.namespace,
                pod.metadata.name,
                "ready" if pod.state == cri_pb2.SANDBOX_READY else "not ready",
                _address(client, pod),
                age(pod.created_at),
                pod.runtime_handler or "-",
            )
            for pod in pods
        ]
    print(table(("POD", "NAMESPACE", "NAME", "STATE", "ADDRESS", "AGE", "RUNTIME"), rows))


def _address(client: Client, pod: cri_pb2.PodSandbox) -> str:
    if pod.state != cri_pb2.SANDBOX_READY:
        return "-"
    try:
        answer = client.call(cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod.id), cri_pb2.PodSandboxStatusResponse)
    except NotFoundError:  # removed since it was listed
        return "-"
    network = answer.status.network
    return ",".join([network.ip, *(address.ip for address in network.additional_ips)]).strip(",") or "-"


def list_containers(options: argparse.Namespace) -> None:
    """``podkeel ps``."""
    with connect(options) as client:
        pod_id = lookup.find_pod(client, options.pod).id if options.pod else ""
        containers = lookup.list_containers(client, pod_id)
        pods = {pod.id: pod.metadata.name for pod in lookup.list_pods(client)}
    if not options.all:
        containers = [item for item in containers if item.state == cri_pb2.CONTAINER_RUNNING]
    if options.quiet:
        print(*(item.id for item in containers), sep="\n", end="\n" if containers else "")
        return
    rows = [
        (
            short(item.id),
            item.metadata.name,
            pods.get(item.pod_sandbox_id, short(item.pod_sandbox_id)),
            state_name(item.state),
            item.image.user_specified_image or item.image.image,
            age(item.created_at),
            item.metadata.attempt,
        )
        for item in containers
    ]
    print(table(("CONTAINER", "NAME", "POD", "STATE", "IMAGE", "AGE", "ATTEMPT"), rows))


def state_name(state: cri_pb2.ContainerState) -> str:
    """``running`` for CONTAINER_RUNNING."""
    return cri_pb2.ContainerState.Name(state).removeprefix("CONTAINER_").lower()


def remove(options: argparse.Namespace) -> None:
    """``podkeel rm``."""
    with connect(options) as client:
        for wanted in options.pods:
            try:
                pod = lookup.find_pod(client, wanted)
            except NotFoundError:
                if not options.force:
                    raise
                # No list has a pod whose making was interrupted, but `podkeel check` prints its id.
                _force_remove(client, wanted)
                print(f"{wanted} removed")
                continue
            if options.force:
                _force_remove(client, pod.id)
            else:
                remove_pod(client, pod)
            pod_folder.remove(options.pod_dir, pod.metadata)
            print(f"{pod.metadata.name} removed")


def remove_pod(client: Client, pod: cri_pb2.PodSandbox) -> None:
    """Stop a pod and remove it with its containers."""
    name = pod.metadata.name
    stop_pod(client, pod)
    removal = cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
    client.call(removal, cri_pb2.RemovePodSandboxResponse, f"remove pod {name}")


def _force_remove(client: Client, pod_id: str) -> None:
    """Have the agent remove a pod.

    If CNI plugins do not release its network, the agent continues and reports it.
    """
    from proto.podkeel.v1 import agent_pb2

    request = agent_pb2.ForceRemovePodRequest(id=pod_id)
    what = f"remove pod {pod_id[:13]}"
    answer = client.call(request, agent_pb2.ForceRemovePodResponse, what, timeout=_FORCE_SECONDS)
    for sentence in answer.given_up:
        print(f"given up: {sentence}", file=sys.stderr)


def stop_pod(client: Client, pod: cri_pb2.PodSandbox) -> None:
    """Stop a pod's sandbox, which ends its containers."""
    request = cri_pb2.StopPodSandboxRequest(pod_sandbox_id=pod.id)
    client.call(request, cri_pb2.StopPodSandboxResponse, f"stop pod {pod.metadata.name}")


def stop(options: argparse.Namespace) -> None:
    """``podkeel stop``: containers are preferred, since a pod may have its container's name."""
    with connect(options) as client:
        for wanted in options.objects:
            try:
                container = lookup.find_container(client, wanted)
            except NotFoundError:
                stop_whole_pod(client, wanted, options.timeout)
                continue
            stop_container(client, container, options.timeout)
            print(f"{container.metadata.name} stopped")


def stop_whole_pod(client: Client, wanted: str, grace: int) -> None:
    """Stop each container of the pod with the grace period, then stop the sandbox."""
    try:
        pod = lookup.find_pod(client, wanted)
    except NotFoundError as error:
        raise NotFoundError(f"no container or pod is called {wanted!r} or has an id that begins with it") from error
    for container in lookup.list_containers(client, pod.id):
        if container.state == cri_pb2.CONTAINER_RUNNING:
            stop_container(client, container, grace)
    stop_pod(client, pod)
    print(f"pod {pod.metadata.name} stopped")


def stop_container(client: Client, container: cri_pb2.Container, grace: int) -> None:
    """Stop signal, then SIGKILL after ``grace`` seconds."""
    request = cri_pb2.StopContainerRequest(container_id=container.id, timeout=grace)
    what = f"stop container {container.metadata.name}"
    client.call(request, cri_pb2.StopContainerResponse, what, timeout=grace + CALL_SECONDS)


def start(options: argparse.Namespace) -> None:
    """``podkeel start``."""
    with connect(options) as client:
        for wanted in options.containers:
            container = lookup.find_container(client, wanted)
            request = cri_pb2.StartContainerRequest(container_id=container.id)
            client.call(request, cri_pb2.StartContainerResponse, f"start container {container.metadata.name}")
            print(f"{container.metadata.name} started")


def inspect(options: argparse.Namespace) -> None:
    """``podkeel inspect``: a container by preference, then a pod, then an image."""
    with connect(options) as client:
        try:
            container = lookup.find_container(client, options.object)
        except NotFoundError:
            pass
        else:
            request = cri_pb2.ContainerStatusRequest(container_id=container.id, verbose=True)
            print(verbose_json(client.call(request, cri_pb2.ContainerStatusResponse, "inspect container")))
            return
        try:
            pod = lookup.find_pod(client, options.object)
        except NotFoundError:
            pass
        else:
            status = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
            print(verbose_json(client.call(status, cri_pb2.PodSandboxStatusResponse, "inspect pod")))
            return
        image = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=options.object), verbose=True)
        answer = client.call(image, cri_pb2.ImageStatusResponse, "inspect image")
    if not answer.HasField("image"):
        raise NotFoundError(f"no container, pod or image is called {options.object!r} or has an id that begins with it")
    print(verbose_json(answer))


def verbose_json(answer: Message) -> str:
    """A status answer as JSON, with the JSON that the agent put into ``info`` unfolded."""
    fields = MessageToDict(answer, preserving_proto_field_name=True)
    fields["info"] = {key: _unfolded(text) for key, text in fields.get("info", {}).items()}
    return json.dumps(fields, indent=2, ensure_ascii=False)


def _unfolded(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
