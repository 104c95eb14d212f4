"""The runtime handlers of the node, and the default one."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import Counter
from pathlib import Path

from host.errors import InvalidArgumentError, NotFoundError, PodkeelError
from runtime.cgroups.tree import CgroupTree
from runtime.layout import Layout
from runtime.oci.oci_runtime import OciRuntime
from runtime.options import HandlerOptions, RuntimeOptions
from runtime.state.truncindex import new_id

_log = logging.getLogger("podkeel.handlers")


class Handlers:
    """The configured handlers that work on this host, and the number of their calls that may run at the same time.

    ``slots`` limit the calls that create and start containers to ``parallelism``: more at once would not finish sooner,
    and every other call would wait for a processor. ``failed_actions`` counts the failures of OCI runtimes and conmon
    by program and action. ``failures`` has the reason for each configured handler that does not work.
    """

    def __init__(self, options: RuntimeOptions, layout: Layout, cgroups: CgroupTree, agent_id: str) -> None:
        self._options = options
        self._layout = layout
        self._cgroups = cgroups
        self._agent_id = agent_id
        self._working: dict[str, OciRuntime] = {}
        self._retired: set[str] = set()
        self.failures: dict[str, str] = {}
        self.failed_actions: Counter[tuple[str, str]] = Counter()
        self.parallelism = options.container_start_parallelism or max(2, os.cpu_count() or 1)
        self.slots = asyncio.Semaphore(self.parallelism)
        self.default: OciRuntime | None = None

    async def probe(self) -> None:
        """Probe every handler. Raises PodkeelError if the configured default does not work.

        If no handler works, the node runs without one (``default`` is None) and reports that in its status.
        """
        options = self._options
        if options.default_runtime and options.default_runtime not in options.handlers:
            raise InvalidArgumentError(
                f"default_runtime {options.default_runtime!r} is not among the handlers: {', '.join(options.handlers)}"
            )
        tried = await asyncio.gather(
            *(self._try(name, handler, options.umask) for name, handler in options.handlers.items())
        )
        for name, outcome in zip(options.handlers, tried, strict=True):
            if isinstance(outcome, PodkeelError):
                self.failures[name] = outcome.message
                if name == options.default_runtime:
                    raise PodkeelError(f"runtime handler {name!r} does not work here: {outcome.message}") from outcome
                _log.warning("runtime handler %s: does not work: %s", name, outcome.message)
                continue
            self._working[name] = outcome
            _log.info("runtime handler %s: works: %s", name, outcome.features.version)
            if not (outcome.directories.refuses_outside or outcome.directories.enters_descriptors):
                _log.warning("runtime handler %s: links can lead it out of containers: see podkeel check", name)
        named = options.default_runtime
        self.default = self._working[named] if named else next(iter(self._working.values()), None)

    async def change(self, options: RuntimeOptions) -> None:
        """Use other handlers, another default and umask. Handlers that are new, changed or did not work are probed.

        A changed handler also serves the containers that it created before. A removed one serves its containers, but no
        new pod. Raises PodkeelError, with nothing changed, if the configured default does not work.
        """
        same = options.umask == self._options.umask
        wanted = [
            name
            for name, handler in options.handlers.items()
            if not same or name not in self._working or handler != self._options.handlers.get(name)
        ]
        outcomes = await asyncio.gather(*(self._try(name, options.handlers[name], options.umask) for name in wanted))
        tried = dict(zip(wanted, outcomes, strict=True))
        default = tried.get(options.default_runtime)
        if isinstance(default, PodkeelError):
            raise PodkeelError(f"runtime handler {options.default_runtime!r} does not work here: {default.message}")
        for name, outcome in tried.items():
            if isinstance(outcome, PodkeelError):
                self.failures[name] = outcome.message
                _log.warning("runtime handler %s: does not work: %s", name, outcome.message)
            else:
                self.failures.pop(name, None)
                self._working[name] = outcome
                _log.info("runtime handler %s: works: %s", name, outcome.features.version)
        self._retired = self._working.keys() - options.handlers.keys() | (tried.keys() & self.failures.keys())
        self.failures = {name: why for name, why in self.failures.items() if name in options.handlers}
        serving = {runtime.name: runtime for runtime in self.working()}
        first = next((serving[name] for name in options.handlers if name in serving), None)
        self.default = serving[options.default_runtime] if options.default_runtime else first

    async def identify(self) -> None:
        """Find every handler whose program is installed, without probing it: enough to remove its containers."""
        for name, handler in self._options.handlers.items():
            runtime = self._runtime(name, handler)
            try:
                await runtime.identify()
            except PodkeelError as error:
                self.failures[name] = error.message
            else:
                self._working[name] = runtime

    def _runtime(self, name: str, handler: HandlerOptions) -> OciRuntime:
        root, link = self._layout.runtime_root(name), self._layout.runtime_program(name)
        systemd = self._cgroups.driver == "systemd"
        return OciRuntime(name, handler, root, program_link=link, systemd_cgroup=systemd)

    async def _try(self, name: str, handler: HandlerOptions, umask: str) -> OciRuntime | PodkeelError:
        options = self._options
        runtime = self._runtime(name, handler)
        parent = "system.slice" if runtime.systemd_cgroup else options.cgroup_parent
        try:
            # Named like a container or pod, so that the next start finds it if the agent is killed now.
            cgroup = self._cgroups.runtime_path(parent, new_id(self._agent_id))
            await runtime.probe(options.catatonit_path, cgroup, self._layout.run)
        except PodkeelError as error:
            return error
        except OSError as error:
            return PodkeelError(f"it cannot be tried: {error}")
        if not runtime.features.is_crun:
            runtime.exec_prefix = with_umask(umask)
        return runtime

    def get(self, name: str) -> OciRuntime:
        """The handler of that name; the default one for an empty name. Raises NotFoundError."""
        runtime = self._working.get(name) if name else self.default
        if runtime is not None:
            return runtime
        if name in self.failures:
            raise NotFoundError(f"runtime handler {name!r} does not work on this node: {self.failures[name]}")
        if not name:
            raise NotFoundError("no runtime handler works on this node: `podkeel check` says what is missing")
        known = ", ".join(self._working) or "none"
        raise NotFoundError(f"runtime handler {name!r} is not configured on this node (there are: {known})")

    def for_new_pods(self, name: str) -> OciRuntime:
        """As ``get``, without handlers that only serve their existing containers. Raises NotFoundError."""
        if name in self._retired:
            raise NotFoundError(f"runtime handler {name!r} is no longer configured on this node")
        return self.get(name)

    def state_folder(self, name: str, container_id: str) -> Path:
        """The folder with an OCI runtime's state of a container, also for a handler that no longer exists."""
        runtime = self._working.get(name)
        return (runtime.root if runtime is not None else self._layout.runtime_root(name)) / container_id

    def find(self, name: str) -> OciRuntime | None:
        """The handler of that name if it works now; None also for one that is no longer configured."""
        return self._working.get(name)

    def working(self) -> list[OciRuntime]:
        """All handlers that work and serve new pods."""
        return [runtime for name, runtime in self._working.items() if name not in self._retired]


def with_umask(umask: str) -> list[str]:
    """A prefix for a command, so that it runs with ``umask``. Empty if the agent has the same umask.

    runc sets it for the first process of a container. Processes that are executed later get runc's own umask.
    """
    own = re.search(rb"^Umask:\s+([0-7]+)$", Path("/proc/self/status").read_bytes(), re.MULTILINE)
    if own is not None and int(own[1], 8) == int(umask, 8):
        return []
    return ["/bin/sh", "-c", 'umask "$0" && exec "$@"', umask]
