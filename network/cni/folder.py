"""The configuration in the folder of CNI configurations, or the reason why there is none."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import NamedTuple

from host.concurrency import threads
from host.errors import InvalidArgumentError, PodkeelError
from network.cni.chain import PluginChain
from network.cni.configuration import Configuration, search_folder
from network.cni.plugin import PluginMissingError
from network.status import Condition

_log = logging.getLogger("podkeel.network")


class View(NamedTuple):
    """The content of the folder when it was last read. ``present``: it had a file, valid or not."""

    configuration: Configuration | None
    condition: Condition
    present: bool


class ConfigurationFolder:
    """Reads the folder of CNI configurations; ``read_at`` is the time of the last reading.

    ``parsed`` is the configuration that was read last, with the versions from its files. ``asking``: its plugins are
    being asked for their versions. ``broken`` has the errors of the files that were skipped.
    """

    def __init__(self, path: Path, chain: PluginChain) -> None:
        self.path = path
        self.parsed: Configuration | None = None
        self.broken: tuple[str, ...] = ()
        self.read_at = 0.0
        self.asking = False
        self._chain = chain

    async def look(self, before: View) -> View:
        """Read the folder. Plugins are asked for their versions only if the configuration has changed."""
        self.read_at = time.monotonic()
        try:
            found = await self._search()
        except PodkeelError as error:
            return View(None, Condition(False, "CniConfigurationInvalid", error.message), True)
        if found is None:
            message = f"no CNI configuration in {self.path}: install the cluster's network plugin"
            return View(None, Condition(False, "CniNotConfigured", message), False)
        if before.configuration is not None and found == self.parsed:
            return before
        self.parsed = found
        self.asking = True
        try:
            return View(await self._chain.choose_version(found), Condition(True), True)
        except PluginMissingError as error:
            return View(None, Condition(False, "CniPluginMissing", error.message), True)
        except PodkeelError as error:
            return View(None, Condition(False, "CniPluginFailed", error.message), True)
        finally:
            self.asking = False

    async def _search(self) -> Configuration | None:
        found, broken = await threads.in_network_thread(search_folder, self.path)
        for sentence in broken if broken != self.broken else ():
            _log.warning("CNI configuration: skipped: %s", sentence)
        self.broken = broken
        if found is None and broken:
            raise InvalidArgumentError(broken[0])
        return found
