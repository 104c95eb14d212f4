"""What RestorePod takes from a checkpoint: a folder of the agent's with a folder for each container."""

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
    """The files of a checkpoint that is being restored, in ``folder``, which ``take`` makes."""

    def __init__(self, source: PodSource, document: PodDocument, folder: Path) -> None:
        self._source = source
        self._folder = folder
        self._saved = {each.name: each for each in document.containers}
        self.shared_memory: Path | None = None

    def saved(self, name: str) -> SavedContainer:
        """What the checkpoint says of a container of it."""
        return self._saved[name]

    def source(self, name: str, image: Image) -> Source:
        """What a container is restored from."""
        return Source(image, layer=self._target(name))

    async def take(self) -> None:
        """Take everything. Raises InvalidArgumentError, LimitError and OSError."""
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
        """Remove the folder: what is restored has its own names of the files. A missing one is no error."""
        await in_long_thread(interrupted.remove, self._folder)

    def _target(self, name: str) -> Path:
        return self._folder / self._saved[name].folder.replace("/", "-")
