"""The files that RestorePod takes from a checkpoint: a folder of the agent with a folder for each container."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from host.concurrency.threads import in_long_thread, in_thread
from images.image import Image
from runtime.checkpoint import documents
from runtime.checkpoint.long_work import stoppable
from runtime.checkpoint.pod import interrupted
from runtime.checkpoint.pod.document import PodDocument, SavedContainer
from runtime.checkpoint.pod.source import PodSource, highest_pid
from runtime.checkpoint.restore.restores import Source


class Staged:
    """The files of a checkpoint that is being restored, in ``folder``. ``take`` makes the folder."""

    def __init__(self, source: PodSource, document: PodDocument, folder: Path) -> None:
        self._source = source
        self._folder = folder
        self._saved = {each.name: each for each in document.containers}
        self.shared_memory: Path | None = None

    def saved(self, name: str) -> SavedContainer:
        """A container in the checkpoint's document."""
        return self._saved[name]

    def source(self, name: str, image: Image) -> Source:
        """The files for restoring a container."""
        return Source(image, layer=self._target(name))

    async def take(self) -> None:
        """Take all files. Raises InvalidArgumentError, LimitError and OSError."""
        await in_thread(partial(self._folder.mkdir, mode=0o700, parents=True))
        for name, saved in self._saved.items():
            await stoppable(partial(self._source.take, saved, self._target(name)))
        shared = self._folder / documents.SHARED_MEMORY
        if await stoppable(partial(self._source.take_shared_memory, shared)):
            self.shared_memory = shared

    def highest_pid(self) -> int:
        """The highest pid of all restored processes. Blocks."""
        return max(highest_pid(self._target(name)) for name in self._saved)

    async def remove(self) -> None:
        """Remove the folder. Restored containers have their own names for its files. A missing folder is no error."""
        await in_long_thread(interrupted.remove, self._folder)

    def _target(self, name: str) -> Path:
        return self._folder / self._saved[name].folder.replace("/", "-")
