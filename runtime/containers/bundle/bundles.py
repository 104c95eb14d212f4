"""Makes the bundles of containers, in separate threads: volumes may be on a file server that does not answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from host.concurrency.abandonable import AbandonableThreads, OneThread, Permission
from host.stages import Operation
from proto.runtime.v1 import cri_pb2
from runtime.containers.bundle.confinement import needs_verifying, verify
from runtime.containers.bundle.idmapped_mounts import bind_all
from runtime.containers.bundle.log_path import resolve_log_path
from runtime.hooks import Hooks
from runtime.namespaces.user import root_of
from runtime.oci import private_devices
from runtime.oci.oci_runtime import OciRuntime
from runtime.options import RuntimeOptions
from runtime.specgen.builder import ContainerSpec, complete
from runtime.specgen.draft import Draft, SpecRequest, draft
from runtime.specgen.mounts.image_volumes import make_volumes
from runtime.specgen.mounts.volume_content import CopyLimits
from runtime.specgen.namespaces import user_mappings
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox

_MAX_HANGING = 256  # threads that wait for volumes of containers whose creation was cancelled

T = TypeVar("T")


class Bundles:
    """Does all work for a new container that may wait for a volume for hours."""

    def __init__(self, hooks: Hooks, options: RuntimeOptions) -> None:
        self._hooks = hooks
        self._options = options
        self._threads = AbandonableThreads(_MAX_HANGING)

    async def log_path(self, sandbox: Sandbox, config: cri_pb2.ContainerConfig) -> Path | None:
        """The path of the log, None for no log. Raises InvalidArgumentError."""
        if not config.log_path:
            return None
        work = partial(resolve_log_path, sandbox.config.log_directory, config.log_path)
        return await self._threads.run(f"container {config.metadata.name!r} of {sandbox.title}", lambda _: work())

    async def make_spec(self, container: Container, request: SpecRequest, operation: Operation) -> ContainerSpec:
        """Make the spec, have NRI plugins adjust it, and write it with its files to the bundle.

        The decisions in it are recorded in the container's record. Raises PodkeelError.
        """
        with OneThread() as thread:
            spec = await self._make_spec(container, request, operation, thread)
        _apply_spec(container, spec)
        return spec

    async def _make_spec(
        self, container: Container, request: SpecRequest, operation: Operation, thread: OneThread
    ) -> ContainerSpec:
        hooks, write = self._hooks, partial(self._write_spec, container)

        async def in_the_thread(work: Callable[[Permission], T]) -> T:
            async with operation.stage("spec"):
                return await self._threads.run(operation.subject, work, thread.begin)

        if await hooks.no_plugin_adjusts(container):

            def draft_and_write(permission: Permission) -> Draft | ContainerSpec:
                drafted = draft(request)
                return write(drafted, permission) if hooks.drafted(container, drafted) else drafted

            made = await in_the_thread(draft_and_write)
        else:

            def draft_and_describe(permission: Permission) -> Draft:
                drafted = draft(request)
                with permission.step():
                    hooks.describe(container, drafted)
                return drafted

            made = await in_the_thread(draft_and_describe)
        if not isinstance(made, Draft):
            return made
        await hooks.create_container(container, made, operation)
        return await in_the_thread(partial(write, made))

    def _write_spec(self, container: Container, drafted: Draft, permission: Permission) -> ContainerSpec:
        spec, request = complete(drafted, permission.check), drafted.request
        mappings = user_mappings(container.sandbox.namespace_options)
        owner = root_of(mappings) if mappings else (0, 0)
        limits = CopyLimits(self._options.max_volume_copy_bytes, self._options.max_volume_copy_entries)
        with permission.step():
            make_volumes(spec.volumes, request.rootfs, owner, limits=limits, check=permission.check)
        bind_all(spec.mapped_volumes, request.namespaces.user, mappings, permission.step)
        if spec.private_devices is not None:
            with permission.step():
                private_devices.make(spec.private_devices)
        with permission.step():
            container.folder.spec.write_bytes(spec.config_json)
        return spec

    async def verify(self, container: Container, runtime: OciRuntime, spec: ContainerSpec) -> None:
        """Check again what other processes may have changed in volumes. Raises InvalidArgumentError."""
        init = container.record.init
        if init is not None and needs_verifying(spec, refuses_outside=runtime.directories.refuses_outside):
            await self._threads.run(container.title, lambda _: verify(init, spec))


def _apply_spec(container: Container, spec: ContainerSpec) -> None:
    record = container.record
    record.user = (spec.user.uid, spec.user.gid, tuple(spec.user.supplemental_groups))
    record.stop_signal = spec.stop_signal.number
    kinds = {namespace.type: namespace.path for namespace in spec.spec.linux.namespaces}
    record.private_pid_namespace = kinds.get("pid") == ""
