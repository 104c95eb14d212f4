"""Commands on the agent itself: its version, status and events."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from importlib.metadata import version as installed_version

from google.protobuf.json_format import MessageToDict

from cli.connect import connect
from cli.pods import verbose_json
from cli.text import short
from host.errors import UnavailableError
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2


def version(options: argparse.Namespace) -> None:
    """``podkeel version``: prints both versions, or why no agent answers."""
    print(f"podkeel command  {installed_version('podkeel')}")
    with connect(options) as client:
        try:
            answer = client.call(cri_pb2.VersionRequest(), cri_pb2.VersionResponse, "ask for the version")
        except UnavailableError as error:
            print(f"agent            none ({error.message})")
            return
    print(f"agent            {answer.runtime_name} {answer.runtime_version}, CRI {answer.runtime_api_version}")


def info(options: argparse.Namespace) -> None:
    """``podkeel info``."""
    with connect(options) as client:
        answer = client.call(cri_pb2.StatusRequest(verbose=True), cri_pb2.StatusResponse, "ask for the status")
    print(verbose_json(answer))


def reload(options: argparse.Namespace) -> None:
    """``podkeel reload``."""
    with connect(options) as client:
        answer = client.call(agent_pb2.ReloadRequest(), agent_pb2.ReloadResponse, "read the configuration again")
    for key in answer.applied:
        print(f"changed: {key}")
    for key in answer.need_restart:
        print(f"needs a restart: {key}")
    if not answer.applied and not answer.need_restart:
        print("nothing changed")


def events(options: argparse.Namespace) -> None:
    """``podkeel events``: until Ctrl-C."""
    names: dict[str, str] = {}
    with connect(options) as client:
        for event in client.stream(cri_pb2.GetEventsRequest(), cri_pb2.ContainerEventResponse, "follow events"):
            line = _as_json(event) if options.format == "json" else as_text(event, names)
            print(line, flush=True)


def _as_json(event: cri_pb2.ContainerEventResponse) -> str:
    return json.dumps(MessageToDict(event, preserving_proto_field_name=True), ensure_ascii=False)


def as_text(event: cri_pb2.ContainerEventResponse, names: dict[str, str]) -> str:
    """One line of text. ``names`` keeps the names of containers by id, as a removed container has no status."""
    kind = cri_pb2.ContainerEventType.Name(event.container_event_type)
    what = kind.removeprefix("CONTAINER_").removesuffix("_EVENT").lower()
    pod = event.pod_sandbox_status
    names |= {status.id: status.metadata.name for status in event.containers_statuses}
    subject = f"pod {pod.metadata.name}"
    if event.container_id != pod.id:
        subject = f"container {pod.metadata.name}/{names.get(event.container_id, '?')}"
    moment = datetime.fromtimestamp(event.created_at / 1e9).strftime("%H:%M:%S.%f")[:-3]
    return f"{moment}  {what:<8}  {subject}  {short(event.container_id)}"
