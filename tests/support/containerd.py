"""Debian's containerd for as long as a test needs it, everything of it below one folder."""

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
    """A running one, asked through ``ctr``."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ctr(self, *words: str) -> str:
        """What a command of ``ctr`` prints."""
        command = ("ctr", "--address", self._address, *words)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    @contextlib.contextmanager
    def mounted(self, archive: Path, reference: str, target: Path) -> Iterator[Path]:
        """The image of an archive, unpacked and mounted at ``target``."""
        target.mkdir()
        self.ctr("images", "import", str(archive))
        self.ctr("images", "mount", reference, str(target))
        try:
            yield target
        finally:
            self.ctr("images", "unmount", str(target))


@contextlib.contextmanager
def run_containerd(folder: Path) -> Iterator[Containerd]:
    """Start one with images and snapshots only, with all its files in ``folder``, which is made."""
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
                pass  # it would wait for a reader of its log
            process.wait()
