"""A program executed from sealed memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.oci.sealed_program import SealedProgram


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return _script(tmp_path / "program", "first")


@pytest.fixture
def sealed(original: Path, tmp_path: Path) -> Iterator[SealedProgram]:
    program = SealedProgram(original, tmp_path / "programs" / "copy")
    yield program
    program.close()


def _script(path: Path, word: str) -> Path:
    new = path.with_name("new")
    new.write_text(f"#!/bin/sh\necho {word} $1\n")
    new.chmod(0o755)
    new.rename(path)
    return path


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _output(path: str) -> str:
    return subprocess.run([path, "word"], capture_output=True, text=True, check=True).stdout


def test_it_runs_from_memory(sealed: SealedProgram, tmp_path: Path) -> None:
    path = sealed.path()
    assert path == str(tmp_path / "programs" / "copy")
    assert os.path.realpath(path).startswith("/memfd:program")
    assert _output(path) == "first word\n"


def test_no_process_can_write_to_the_copy(sealed: SealedProgram) -> None:
    with pytest.raises(OSError, match="not permitted"), open(sealed.path(), "r+b") as copy:
        copy.write(b"x")
    with open(sealed.path(), "rb") as copy:
        seals = fcntl.fcntl(copy, fcntl.F_GET_SEALS)
    # Exactly these four are what crun looks for.
    assert seals == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def test_a_copy_that_is_open_for_writing_is_not_executed_and_this_is_reported(sealed: SealedProgram) -> None:
    with open(sealed.path(), "r+b"), pytest.raises(OSError, match="Text file busy"):
        sealed.path()
    assert _output(sealed.path()) == "first word\n"


def test_a_replaced_original_is_copied_again(sealed: SealedProgram, original: Path) -> None:
    assert _output(sealed.path()) == "first word\n"
    descriptors = _descriptors()
    _script(original, "second")
    assert _output(sealed.path()) == "second word\n"
    assert _descriptors() == descriptors


def test_a_missing_original_is_an_error(sealed: SealedProgram, original: Path) -> None:
    sealed.path()
    original.unlink()
    with pytest.raises(FileNotFoundError):
        sealed.path()


def test_the_copy_is_used_while_the_file_system_of_the_original_does_not_answer(
    sealed: SealedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, answers, asked = sealed.path(), threading.Event(), threading.Event()
    stat = Path.stat

    def wait(path: Path) -> os.stat_result:
        asked.set()
        answers.wait()
        return stat(path)

    monkeypatch.setattr(Path, "stat", wait)
    hanging = threading.Thread(target=sealed.path)
    hanging.start()
    try:
        asked.wait()
        assert sealed.path() == path
        assert hanging.is_alive()
    finally:
        answers.set()
        hanging.join()
    assert _output(sealed.path()) == "first word\n"


def test_a_new_process_takes_over_the_path_of_an_old_one(original: Path, tmp_path: Path) -> None:
    link = tmp_path / "programs" / "copy"
    link.parent.mkdir()
    link.symlink_to("/proc/1/fd/9999")
    sealed = SealedProgram(original, link)
    assert _output(sealed.path()) == "first word\n"
    sealed.close()


def test_a_copy_whose_link_cannot_be_made_is_closed(original: Path, tmp_path: Path) -> None:
    (tmp_path / "programs").touch()
    sealed = SealedProgram(original, tmp_path / "programs" / "copy")
    descriptors = _descriptors()
    for _ in range(3):
        with pytest.raises(OSError, match="programs"):
            sealed.path()
    assert _descriptors() == descriptors


_ASK_FOR_A_SECOND = """
import sys, time
from pathlib import Path
from runtime.oci.sealed_program import SealedProgram
sealed = SealedProgram(Path(sys.argv[1]), Path(sys.argv[2]))
print(sealed.path(), flush=True)
end = time.monotonic() + 1
while time.monotonic() < end:
    try:
        sealed.path()
    except OSError:
        pass
"""


def test_opening_it_for_writing_over_and_over_does_not_end_the_agent(original: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ASK_FOR_A_SECOND, str(original), str(tmp_path / "programs" / "copy")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        copy = asking.stdout.readline().strip()
        give_up = time.monotonic() + 30
        while asking.poll() is None and time.monotonic() < give_up:
            with contextlib.suppress(OSError):
                os.close(os.open(copy, os.O_RDWR))
        asking.kill()
    assert asking.returncode == 0
