"""``podkeel run``: makes a pod from a manifest as kubelet would, without restarting its containers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cli import lookup
from cli.client import Client
from cli.connect import connect
from cli.images.images import find_image, pull_image
from cli.log_file import tail_lines
from cli.manifest import pod_folder
from cli.manifest.manifest import ContainerPlan, PodPlan, read_manifest
from cli.pods import remove_pod
from cli.text import duration, note, short
from host.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, PodkeelError
from proto.runtime.v1 import cri_pb2

Report = Callable[[str], None]

_FIRST_POLL_SECONDS = 0.005
_MAX_POLL_SECONDS = 0.25
_SANDBOX_SECONDS = 240.0


@dataclass(slots=True)
class RunningPod:
    """A pod that ``run_pod`` made."""

    sandbox: cri_pb2.PodSandbox
    addresses: list[str]
    log_directory: Path
    container_ids: dict[str, str] = field(default_factory=dict)


def run(options: argparse.Namespace) -> None:
    """Run the pod of the manifest file."""
    try:
        text = sys.stdin.read() if options.file == "-" else Path(options.file).read_text(encoding="utf-8")
        plan = read_manifest(text, options.pod_dir)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InvalidArgumentError(f"manifest {options.file} cannot be read: {reason}") from error
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{options.file}: {error.message}") from error
    for warning in plan.warnings:
        note(f"{options.file}: {warning}")
    plan.runtime_handler = options.runtime_handler or plan.runtime_handler
    with connect(options) as client:
        pod = run_pod(client, plan, options.pod_dir, _ignore if options.quiet else print)
    if options.quiet:
        print(pod.sandbox.id)


def _ignore(_line: str) -> None:
    return


def run_pod(client: Client, plan: PodPlan, pod_dir: str | Path, report: Report) -> RunningPod:
    """Make the pod of ``plan``: images, volumes, sandbox, init containers to their ends, containers.

    ``report`` is called for each step. If any step fails, the pod is removed before the error is raised.
    """
    metadata = plan.config.metadata
    for other in lookup.list_pods(client):
        taken = (other.metadata.namespace, other.metadata.name) == (metadata.namespace, metadata.name)
        if taken and other.state == cri_pb2.SANDBOX_READY:
            raise AlreadyExistsError(
                f"pod {metadata.namespace}/{metadata.name} exists already; `podkeel rm {short(other.id)}` removes it"
            )
    for container in (*plan.init_containers, *plan.containers):
        _provide_image(client, container, plan, report)
    made: cri_pb2.PodSandbox | None = None
    try:
        for volume in plan.volumes:
            volume.prepare()
        Path(plan.config.log_directory).mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        made = _run_sandbox(client, plan)
        elapsed = duration(time.perf_counter() - begin)
        pod = _describe(client, made, plan)
        address = f"address {', '.join(pod.addresses)}" if pod.addresses else "on the host's network"
        report(f"{'sandbox':<12} {short(made.id)} up in {elapsed}, {address}")
        for container in plan.init_containers:
            run_it = _run_container if container.sidecar else _run_init_container
            run_it(client, pod, container, plan, report)
        for container in plan.containers:
            _run_container(client, pod, container, plan, report)
    except BaseException:
        if made is not None:
            remove_pod(client, made)
        pod_folder.remove(pod_dir, metadata)
        raise
    return pod


def _provide_image(client: Client, container: ContainerPlan, plan: PodPlan, report: Report) -> None:
    name = container.config.image.user_specified_image
    image = None if container.pull_policy == "Always" else find_image(client, name)
    if image is None and container.pull_policy == "Never":
        raise NotFoundError(f"image {name} is not on this node, and imagePullPolicy Never forbids to pull it")
    if image is None:
        begin = time.perf_counter()
        pull_image(client, name, sandbox_config=plan.config)
        image = find_image(client, name)
        report(f"{'image':<12} {name} pulled in {duration(time.perf_counter() - begin)}")
    if image is None:
        raise PodkeelError(f"image {name} was pulled but is missing; was it removed meanwhile?")
    container.config.image.image = image.id


def _run_sandbox(client: Client, plan: PodPlan) -> cri_pb2.PodSandbox:
    request = cri_pb2.RunPodSandboxRequest(config=plan.config, runtime_handler=plan.runtime_handler)
    what = f"run pod {plan.config.metadata.name}"
    answer = client.call(request, cri_pb2.RunPodSandboxResponse, what, timeout=_SANDBOX_SECONDS)
    return cri_pb2.PodSandbox(id=answer.pod_sandbox_id, metadata=plan.config.metadata)


def _describe(client: Client, made: cri_pb2.PodSandbox, plan: PodPlan) -> RunningPod:
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=made.id)
    network = client.call(request, cri_pb2.PodSandboxStatusResponse).status.network
    addresses = [address for address in (network.ip, *(item.ip for item in network.additional_ips)) if address]
    return RunningPod(made, addresses, Path(plan.config.log_directory))


def start_container(client: Client, pod: RunningPod, container: ContainerPlan, plan: PodPlan) -> str:
    """Create and start one container; returns its id."""
    name = container.config.metadata.name
    (pod.log_directory / name).mkdir(exist_ok=True)
    request = cri_pb2.CreateContainerRequest(
        pod_sandbox_id=pod.sandbox.id, config=container.config, sandbox_config=plan.config
    )
    answer = client.call(request, cri_pb2.CreateContainerResponse, f"create container {name}")
    pod.container_ids[name] = answer.container_id
    start = cri_pb2.StartContainerRequest(container_id=answer.container_id)
    client.call(start, cri_pb2.StartContainerResponse, f"start container {name}")
    return answer.container_id


def _run_container(client: Client, pod: RunningPod, container: ContainerPlan, plan: PodPlan, report: Report) -> None:
    begin = time.perf_counter()
    identifier = start_container(client, pod, container, plan)
    elapsed = duration(time.perf_counter() - begin)
    report(f"{container.config.metadata.name:<12} {short(identifier)} running after {elapsed}")


def _run_init_container(
    client: Client, pod: RunningPod, container: ContainerPlan, plan: PodPlan, report: Report
) -> None:
    name = container.config.metadata.name
    begin = time.perf_counter()
    status = wait_for_exit(client, start_container(client, pod, container, plan))
    if status.exit_code != 0:
        last = " | ".join(line.text for line in tail_lines(Path(status.log_path), 3))
        raise PodkeelError(
            f"init container {name} ended with exit code {status.exit_code}, saying: {last or 'nothing'}"
        )
    report(f"{name:<12} {short(status.id)} ended after {duration(time.perf_counter() - begin)}")


def wait_for_exit(client: Client, container_id: str) -> cri_pb2.ContainerStatus:
    """Wait until a container that was started has ended; returns its last status."""
    request = cri_pb2.ContainerStatusRequest(container_id=container_id)
    pause = _FIRST_POLL_SECONDS
    while True:
        status = client.call(request, cri_pb2.ContainerStatusResponse).status
        if status.state not in (cri_pb2.CONTAINER_CREATED, cri_pb2.CONTAINER_RUNNING):
            return status
        time.sleep(pause)
        pause = min(pause * 1.5, _MAX_POLL_SECONDS)
