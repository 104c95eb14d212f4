"""Runs Debian's containerd for a test, with all its files below one folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]

[grpc]
address = "{folder}/socket"

[ttrpc]
address = "{folder}/socket.ttrpc"
"""


class Containerd:
    """A running containerd, used through ``ctr``."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ctr(self, *words: str) -> str:
        """The output of a ``ctr`` command."""
        command = ("ctr", "--address", self._address, *words)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    @contextlib.contextmanager
    def mounted(self, archive: Path, reference: str, target: Path) -> Iterator[Path]:
        """Unpack the image of an archive and mount it at ``target``."""
        target.mkdir()
        self.ctr("images", "import", str(archive))
        self.ctr("images", "mount", reference, str(target))
        try:
            yield target
        finally:
            self.ctr("images", "unmount", str(target))


@contextlib.contextmanager
def run_containerd(folder: Path) -> Iterator[Containerd]:
    """Start a containerd with images and snapshots only. All its files are in ``folder``, which is created."""
    folder.mkdir()
    config = folder / "config.toml"
    config.write_text(_CONFIG.format(folder=folder))
    process = subprocess.Popen(
        ["containerd", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(folder)},
    )
    assert process.stderr is not None
    with process.stderr as log:
        try:
            lines: list[str] = []
            for line in log:
                lines.append(line)
                if "successfully booted" in line:
                    break
            else:
                raise AssertionError(f"containerd ended: {''.join(lines)}")
            yield Containerd(f"{folder}/socket")
        finally:
            process.terminate()
            for _ in log:
                pass  # containerd would wait for a reader of its log
            process.wait()
