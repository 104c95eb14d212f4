"""The runtime handlers of the node, and which of them is the default."""

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
    """Every configured handler that works on this host, and how many of their calls may run at once.

    ``slots`` are for calls that make and start containers: more than ``parallelism`` at once finish no sooner, and
    every other call waits behind them for a processor. ``failed_actions`` counts what OCI runtimes and monitors failed
    at, by program and action. ``failures`` says why a configured handler does not work.
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
        """Try every handler. Raises PodkeelError if the default was named and does not work; with no working handler
        the node runs without one (``default`` is None) and reports that in its status."""
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
        """Take over other handlers, default and umask: try handlers that are new, changed or did not work.

        A changed handler also serves the containers that it made before. One that is configured no more serves those
        it has, and no new pod. Raises PodkeelError, with nothing changed, if the named default does not work.
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
        """Know every handler whose program is installed, without trying it: enough to remove what one has made."""
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
            # Named like a container's or pod's, so that what a killed agent left of it is found at the next start.
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
        """The handler of that name; the default for an empty one. Raises NotFoundError."""
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
        """The same, without handlers that only serve the containers that they have. Raises NotFoundError."""
        if name in self._retired:
            raise NotFoundError(f"runtime handler {name!r} is not configured on this node any more")
        return self.get(name)

    def state_folder(self, name: str, container_id: str) -> Path:
        """Where an OCI runtime, maybe one that is no handler any more, keeps what it knows of a container."""
        runtime = self._working.get(name)
        return (runtime.root if runtime is not None else self._layout.runtime_root(name)) / container_id

    def find(self, name: str) -> OciRuntime | None:
        """The handler of that name if it works now; None also for one of earlier that is configured no more."""
        return self._working.get(name)

    def working(self) -> list[OciRuntime]:
        """All that work and serve new pods."""
        return [runtime for name, runtime in self._working.items() if name not in self._retired]


def with_umask(umask: str) -> list[str]:
    """A prefix for a command, so that it runs with ``umask``; empty if that is the agent's.

    runc sets it for the first process of a container; processes executed later have the umask that runc was started
    with.
    """
    own = re.search(rb"^Umask:\s+([0-7]+)$", Path("/proc/self/status").read_bytes(), re.MULTILINE)
    if own is not None and int(own[1], 8) == int(umask, 8):
        return []
    return ["/bin/sh", "-c", 'umask "$0" && exec "$@"', umask]
