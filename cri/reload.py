"""Reloads the configuration while the agent serves: some keys change at once, the others need a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec.structs import force_setattr

from cri.config.configuration import Configuration
from cri.service_reports import status_line
from cri.telemetry.logs import LogLevel, configure_logging
from host.concurrency.threads import in_thread
from host.errors import PodkeelError
from host.systemd import ServiceManager
from runtime.agent import Agent

# Keys that are read at each use, or that ``Reloader`` applies. All others need a restart.
_LIVE = {
    "log": ("level", "format"),
    "metrics": ("address", "tls_certificate", "tls_key", "tls_client_ca"),
    "images": (
        *("registry_config_dir", "insecure_registries", "credentials_file", "credential_helper_seconds"),
        *("connect_seconds", "stall_seconds", "attempts", "slowest_bytes_per_second", "slow_seconds"),
        *("max_layer_bytes", "max_layer_entries", "max_layer_seconds", "max_image_bytes", "max_archive_bytes"),
        *("verifier_dir", "verifier_seconds", "pinned", "keep_blobs", "min_free", "partial_pulls"),
        *("signature_policy", "registries_dir", "accept_unnamed_signatures"),
    ),
    "runtime": (
        *("handlers", "default_runtime", "default_sysctls", "seccomp_profile", "shm_size", "io_weight", "umask"),
        *("pids_limit", "hooks_dirs", "max_volume_copy_bytes", "max_volume_copy_entries"),
    ),
    "network": ("cni_bin_dirs", "cni_timeout_seconds"),
    "nri": ("plugin_dir", "config_dir", "registration_seconds", "request_seconds"),
    "checkpoint": ("failure_log_dir",),
}

_log = logging.getLogger("podkeel.configuration")


@dataclass
class Reloaded:
    """The keys that changed: those that are in force now, and those that need a restart."""

    applied: list[str] = field(default_factory=list)
    need_restart: list[str] = field(default_factory=list)


class Reloader:
    """Applies changes of the configuration. ``read`` reads the files again; it blocks.

    The parts of the agent share the options of ``current``, which only this class changes. ``serve_metrics`` serves
    metrics with other options, or raises and leaves all as it is.
    """

    def __init__(
        self,
        current: Configuration,
        read: Callable[[], Configuration],
        *,
        agent: Agent,
        manager: ServiceManager,
        log_level: LogLevel,
        serve_metrics: Callable[[Any], Awaitable[None]],
    ) -> None:
        self._current = current
        self._read = read
        self._agent = agent
        self._manager = manager
        self._log_level = log_level
        self._serve_metrics = serve_metrics
        self._lock = asyncio.Lock()

    async def on_signal(self) -> None:
        """Reload after a signal: writes to the log what changed, or why nothing did."""
        try:
            await self.reload()
        except PodkeelError as error:
            _log.error("configuration: not read again: the old one stays in force: %s", error.message)
        except Exception:
            _log.exception("configuration: not read again")

    async def reload(self) -> Reloaded:
        """Read the configuration again, and apply the keys that need no restart.

        Raises InvalidArgumentError for a wrong file, and PodkeelError if a value cannot be used. Then nothing changes.
        """
        async with self._lock:
            self._manager.reloading()
            try:
                found = await in_thread(self._read)
                result = self._compare(found)
                await self._apply(found, result.applied)
                result.applied += [f"nri {sentence}" for sentence in await self._agent.hooks.reload_plugins()]
            finally:
                self._manager.ready(status_line(self._agent))
        _log.info(
            "configuration: read again: changed: %s; a restart is needed for: %s",
            ", ".join(result.applied) or "nothing",
            ", ".join(result.need_restart) or "nothing",
        )
        return result

    def _compare(self, found: Configuration) -> Reloaded:
        result = Reloaded()
        for table in msgspec.structs.fields(Configuration):
            old, new = getattr(self._current, table.name), getattr(found, table.name)
            for option in msgspec.structs.fields(type(old)):
                if getattr(old, option.name) != getattr(new, option.name):
                    live = option.name in _LIVE.get(table.name, ())
                    (result.applied if live else result.need_restart).append(f"{table.name}.{option.name}")
        return result

    async def _apply(self, found: Configuration, keys: list[str]) -> None:
        """Apply the changes of ``keys``. Steps that can fail come first, and are undone if a later one fails."""
        async with AsyncExitStack() as undo:
            if any(key.startswith("metrics.") for key in keys):
                await self._serve_metrics(found.metrics)
                undo.push_async_callback(self._serve_metrics, self._current.metrics)
            if {"runtime.handlers", "runtime.default_runtime", "runtime.umask"} & set(keys):
                await self._agent.handlers.change(found.runtime)
            undo.pop_all()
        for key in keys:
            table, _, name = key.partition(".")
            force_setattr(getattr(self._current, table), name, getattr(getattr(found, table), name))
        agent, current = self._agent, self._current
        agent.hooks_dir.folders = current.runtime.hooks_dirs
        agent.network.cni.runner.configure(current.network.cni_bin_dirs, current.network.cni_timeout_seconds)
        agent.images.store.publish_again()
        if any(key.startswith("log.") for key in keys):
            configure_logging(current.log)
            self._log_level.configured = current.log.level
