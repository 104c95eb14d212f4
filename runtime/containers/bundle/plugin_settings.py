"""Settings of NRI plugins that the OCI runtime ignores. The agent applies them before the start."""

from __future__ import annotations

import os

from host import scheduling
from host.concurrency.threads import in_thread
from host.errors import InvalidArgumentError
from runtime.cgroups.extra_files import write_extra_limits
from runtime.cgroups.tree import CgroupTree
from runtime.oci.oci_runtime import OciRuntime
from runtime.specgen import config
from runtime.specgen.limits.extra_limits import ExtraLimits
from runtime.state.container import Container


async def set_ignored_settings(
    container: Container, runtime: OciRuntime, process: config.Process, cgroups: CgroupTree
) -> None:
    """Set limits and scheduling of a container that is created and not started.

    Raises InvalidArgumentError for a value that the kernel refuses.
    """
    features, init = runtime.features, container.record.init
    scheduler = None if features.scheduler else process.scheduler
    io_priority = None if features.io_priority else process.io_priority
    has_limits = container.record.extra_limits != ExtraLimits()
    if init is not None and (scheduler is not None or io_priority is not None or has_limits):
        await in_thread(_set, container, cgroups, init.pid, scheduler, io_priority)


def _set(
    container: Container,
    cgroups: CgroupTree,
    pid: int,
    scheduler: config.Scheduler | None,
    io_priority: config.IOPriority | None,
) -> None:
    what = "limits"
    try:
        write_extra_limits(cgroups, container.record.cgroup, container.record.extra_limits)
        if io_priority is not None:
            what = "IoPriority"
            scheduling.set_io_priority(pid, scheduling.IO_CLASSES[io_priority.class_], io_priority.priority)
        if scheduler is not None:
            what = "LinuxSched"
            scheduling.set_scheduler(
                pid,
                scheduling.POLICIES[scheduler.policy],
                flags=sum(scheduling.FLAGS[flag] for flag in scheduler.flags),
                nice=scheduler.nice,
                priority=scheduler.priority,
                runtime=scheduler.runtime,
                deadline=scheduler.deadline,
                period=scheduler.period,
            )
    except OSError as error:
        changed_by = container.record.changed_by
        plugins = changed_by.get(what) or ", ".join(dict.fromkeys(changed_by.values()))
        reason = os.strerror(error.errno or 0)
        place = f" ({error.filename})" if isinstance(error.filename, str) and what == "limits" else ""
        raise InvalidArgumentError(
            f"{container.title}: NRI plugin {plugins}: {what}: the kernel refuses it: {reason}{place}"
        ) from error
