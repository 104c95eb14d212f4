"""Podkeel's own service beside the CRI (proto/podkeel/v1/agent.proto)."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from cri.reload import Reloader
from cri.services.agent_images import ImageCalls
from cri.telemetry.diagnosis import diagnosis
from host.concurrency.threads import in_stats_thread
from host.errors import InvalidArgumentError, NotFoundError, printable
from host.stages import Operation, failed_operations
from images.oci.reference import parse
from proto.podkeel.v1 import agent_pb2
from runtime.agent import Agent
from runtime.state.sandbox import Sandbox


class AgentService(ImageCalls):
    """Calls on images, the comparison of store and node, reload, diagnosis, and the stages of pods."""

    def __init__(self, agent: Agent, reloader: Reloader) -> None:
        super().__init__(agent.images)
        self._agent = agent
        self._reloader = reloader

    async def check(self, request: agent_pb2.CheckRequest) -> agent_pb2.CheckResponse:
        """Differences between store and node, and which of them were repaired if the client requested it."""
        if request.repair:
            found, left = await self._agent.audit.repair()
        else:
            found = left = await self._agent.audit.check()
        return agent_pb2.CheckResponse(
            findings=[
                agent_pb2.Finding(
                    kind=finding.kind,
                    object=printable(finding.object),
                    problem=printable(finding.problem),
                    repaired=finding not in left,
                )
                for finding in (*found, *(finding for finding in left if finding not in found))
            ]
        )

    async def reload(self, _request: agent_pb2.ReloadRequest) -> agent_pb2.ReloadResponse:
        """Reload the configuration."""
        found = await self._reloader.reload()
        return agent_pb2.ReloadResponse(applied=found.applied, need_restart=found.need_restart)

    async def diagnose(self, _request: agent_pb2.DiagnoseRequest) -> agent_pb2.DiagnoseResponse:
        """Stacks, open stages, pools and descriptors of the agent."""
        return agent_pb2.DiagnoseResponse(text=await in_stats_thread(diagnosis, asyncio.get_running_loop()))

    async def force_remove_pod(self, request: agent_pb2.ForceRemovePodRequest) -> agent_pb2.ForceRemovePodResponse:
        """Remove a pod, even if CNI plugins do not release its network."""
        return agent_pb2.ForceRemovePodResponse(given_up=await self._agent.pod_removals.force_remove(request.id))

    async def image_from_checkpoint(
        self, request: agent_pb2.ImageFromCheckpointRequest
    ) -> agent_pb2.ImageFromCheckpointResponse:
        """Make an image of a checkpoint archive."""
        path = Path(request.path)
        if not path.is_absolute():
            raise InvalidArgumentError(f"checkpoint archive {request.path!r}: give an absolute path on the node")
        image, told = await self._agent.checkpoints.make_image(path, request.name)
        name = str(parse(request.name))
        return agent_pb2.ImageFromCheckpointResponse(id=image.id, name=name, container=told.name)

    async def explain(self, request: agent_pb2.ExplainRequest) -> agent_pb2.ExplainResponse:
        """The stages of a sandbox and its containers, or of one container.

        Objects that are being made or that failed are included. The answer also has what NRI plugins changed of the
        containers.
        """
        state = self._agent.state
        sandbox, container = state.sandboxes.find(request.id), state.containers.find(request.id)
        if sandbox is not None or container is None:
            wanted = _pod_name(sandbox) if sandbox is not None else request.id
            named = (
                (sandbox,) if sandbox is not None else (s for s in state.sandboxes if _is_named(_pod_name(s), wanted))
            )
            kept = [pair for found in named for pair in self._operations(found)]
            known = {id(operation) for _, operation in kept}
            lost = [operation for operation in failed_operations() if _is_named(operation.subject, wanted)]
            kept += [("", operation) for operation in lost if id(operation) not in known]
            kept.sort(key=lambda pair: pair[1].started)
            containers = list(state.containers_of(sandbox)) if sandbox is not None else []
        else:
            kept = [(container.id, operation) for operation in container.operations]
            containers = [container]
        changes = [
            agent_pb2.ChangeReport(container_id=changed.id, what=what, changed_by=plugin)
            for changed in containers
            for what, plugin in sorted(changed.record.changed_by.items())
        ]
        if not kept and not changes:
            raise NotFoundError(f"no sandbox or container {request.id!r}")
        return agent_pb2.ExplainResponse(operations=[_report(*pair) for pair in kept], changes=changes)

    def _operations(self, sandbox: Sandbox) -> list[tuple[str, Operation]]:
        kept = [(sandbox.id, operation) for operation in sandbox.operations]
        for member in self._agent.state.containers_of(sandbox):
            kept += [(member.id, operation) for operation in member.operations]
        return kept


def _pod_name(sandbox: Sandbox) -> str:
    return f"{sandbox.config.metadata.namespace}/{sandbox.config.metadata.name}"


def _is_named(subject: str, wanted: str) -> bool:
    """Whether ``wanted`` is one or more whole components of a name such as ``(default/web/main)``."""
    return bool(wanted) and re.search(rf"(?:^|[ (/]){re.escape(wanted)}(?:[/)]|$)", subject) is not None


def _report(object_id: str, operation: Operation) -> agent_pb2.OperationReport:
    return agent_pb2.OperationReport(
        object_id=object_id,
        name=operation.name,
        started=operation.started,
        stages=[
            agent_pb2.StageReport(
                name=stage.name,
                started=stage.started,
                seconds=-1.0 if stage.seconds is None else stage.seconds,
                failed=stage.failed,
            )
            for stage in operation.stages
        ],
    )
