"""Container logs."""

from __future__ import annotations

import os
import re
import subprocess
from datetime import datetime
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, Pod, log_text, refused
from tests.support.agent import wait_for
from tests.support.pods import container_config

LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9})(Z|\+00:00) (stdout|stderr) ([FP]) (.*)")


def test_each_line_has_time_stream_and_tag(pod: Pod) -> None:
    status = pod.finished(
        container_config("main", "sh", "-c", "echo one; sleep 0.1; echo two >&2; sleep 0.1; echo; printf end")
    )
    found = [LINE.fullmatch(line) for line in Path(status.log_path).read_text().splitlines()]
    assert all(found)
    matches = [match for match in found if match]
    assert [match.group(3, 4, 5) for match in matches[:2]] == [("stdout", "F", "one"), ("stderr", "F", "two")]
    assert [match[5] for match in matches if match[3] == "stdout"] == ["one", "", "end"]
    times = [datetime.fromisoformat(match[1][:26] + "+00:00").timestamp() for match in matches]
    assert times == sorted(times)
    assert status.started_at / 1e9 - 1 < times[0] < status.finished_at / 1e9 + 1


def test_long_lines_come_in_parts(pod: Pod) -> None:
    script = "head -c 100000 /dev/zero | tr '\\0' x; echo; echo next"
    status = pod.finished(container_config("main", "sh", "-c", script))
    lines = Path(status.log_path).read_text().splitlines()
    assert log_text(status.log_path) == "x" * 100000 + "\nnext\n"
    assert len(lines) > 2
    assert all(len(line) < 17000 for line in lines)
    tags = [line.split(" ", 3)[2] for line in lines]
    assert tags == ["P"] * (len(lines) - 2) + ["F", "F"]


def test_nothing_is_lost_and_order_is_kept(pod: Pod) -> None:
    script = "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done"
    assert pod.printed(container_config("main", "sh", "-c", script)) == "".join(f"line {i}\n" for i in range(5000))
    big = pod.printed(container_config("big", "sh", "-c", "head -c 2000000 /dev/zero | tr '\\0' y"))
    assert big.rstrip("\n") == "y" * 2000000


def test_bytes_that_are_no_text_stay_as_they_are(pod: Pod) -> None:
    status = pod.finished(container_config("main", "printf", "\\001\\377\\033[1m\\n"))
    assert Path(status.log_path).read_bytes().endswith(b" stdout F \x01\xff\x1b[1m\n")


def test_reopen_after_a_rename(pod: Pod) -> None:
    client = pod.agent.client
    container_id = pod.start(container_config("main", "sh", "-c", "i=0; while :; do echo $((i=i+1)); sleep 0.02; done"))
    path = Path(client.status(container_id).log_path)
    rotated = path.with_suffix(".1")
    wait_for(lambda: path.stat().st_size > 0, what="a line")
    path.rename(rotated)
    reopen(pod, container_id)
    assert path.exists()
    wait_for(lambda: path.stat().st_size > 0, what="a line in the new file")
    client.stop(container_id)
    numbers = [int(word) for word in (log_text(str(rotated)) + log_text(str(path))).split()]
    assert numbers == list(range(1, len(numbers) + 1))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "exited"):
        reopen(pod, container_id)


COUNT = ("sh", "-c", "i=0; while :; do echo $((i=i+1)); sleep 0.01; done")


def numbers_in(*paths: Path) -> list[int]:
    return [int(word) for path in paths for word in log_text(str(path)).split()]


def test_reopening_twice_or_without_a_rename_loses_nothing(pod: Pod) -> None:
    client = pod.agent.client
    container_id = pod.start(container_config("main", *COUNT))
    path = Path(client.status(container_id).log_path)
    rotated = path.with_suffix(".1")
    for renamed in (False, False, True, False, False):
        wait_for(lambda: path.stat().st_size > 300, what="some lines")
        if renamed:
            path.rename(rotated)
        reopen(pod, container_id)
        reopen(pod, container_id)
    wait_for(lambda: path.stat().st_size > 300, what="some lines")
    client.stop(container_id)
    numbers = numbers_in(rotated, path)
    assert numbers == list(range(1, len(numbers) + 1))
    assert sorted(file.name for file in path.parent.iterdir()) == ["0.1", "0.log"]


def test_a_log_truncated_by_others_continues_at_its_new_end(pod: Pod) -> None:
    client = pod.agent.client
    container_id = pod.start(container_config("main", *COUNT))
    path = Path(client.status(container_id).log_path)
    wait_for(lambda: path.stat().st_size > 0, what="a line")
    path.rename(path.with_suffix(".1"))
    reopen(pod, container_id)
    wait_for(lambda: path.stat().st_size > 500, what="some lines")
    os.truncate(path, 0)  # logrotate's copytruncate
    wait_for(lambda: path.stat().st_size > 0, what="a line")
    client.stop(container_id)
    assert b"\0" not in path.read_bytes()


def test_another_file_in_the_place_of_the_log_is_not_overwritten(pod: Pod) -> None:
    client = pod.agent.client
    container_id = pod.start(container_config("main", *COUNT))
    path = Path(client.status(container_id).log_path)
    wait_for(lambda: path.stat().st_size > 0, what="a line")
    rotated = path.rename(path.with_suffix(".1"))
    path.write_text("not ours\n")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "another file now, with 9 bytes"):
        reopen(pod, container_id)
    size = rotated.stat().st_size
    wait_for(lambda: rotated.stat().st_size > size, what="further lines in the old log")
    assert path.read_text() == "not ours\n"
    path.unlink()
    reopen(pod, container_id)
    wait_for(lambda: path.stat().st_size > 0, what="a line in the new file")


@pytest.mark.parametrize("obstacle", ["folder", "fifo", "no inode", "link"])
def test_a_log_that_cannot_be_reopened_continues_in_the_old_file(pod: Pod, tmp_path: Path, obstacle: str) -> None:
    client = pod.agent.client
    container_id = pod.start(container_config("main", *COUNT))
    path = Path(client.status(container_id).log_path)
    wait_for(lambda: path.stat().st_size > 0, what="a line")
    rotated = path.rename(path.with_suffix(".1"))
    code = grpc.StatusCode.INVALID_ARGUMENT
    if obstacle == "folder":
        path.mkdir()
    elif obstacle == "fifo":
        os.mkfifo(path)
    elif obstacle == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        moved = rotated.rename(tmp_path / "moved")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "tmpfs", path.parent], check=True)
        rotated, code = moved, grpc.StatusCode.RESOURCE_EXHAUSTED
    try:
        with refused(code, str(path)):
            reopen(pod, container_id)
    finally:
        if obstacle == "no inode":
            subprocess.run(["umount", path.parent], check=True)
    size = rotated.stat().st_size
    wait_for(lambda: rotated.stat().st_size > size, what="further lines in the old log")
    if obstacle == "folder":
        path.rmdir()
    elif obstacle != "no inode":
        path.unlink()
    reopen(pod, container_id)
    wait_for(lambda: path.stat().st_size > 0, what="a line in the new file")
    client.stop(container_id)
    numbers = numbers_in(rotated, path)
    assert numbers == list(range(1, len(numbers) + 1))
    assert client.status(container_id).exit_code == 137
    assert not (tmp_path / "elsewhere").exists()


def test_the_last_line_of_each_stream_is_ended(pod: Pod) -> None:
    script = "echo one; printf two >&2; sleep 0.1; printf thr; sleep 0.1; printf ee"
    status = pod.finished(container_config("main", "sh", "-c", script))
    records = [line.split(" ", 3)[1:] for line in Path(status.log_path).read_text().splitlines()]
    assert [record for record in records if record[0] == "stderr"] == [["stderr", "F", "two"]]
    assert [record[1:] for record in records if record[0] == "stdout"] == [["F", "one"], ["P", "thr"], ["F", "ee"]]


def test_reopen_that_fails_makes_no_file(pod: Pod) -> None:
    client = pod.agent.client
    created = pod.create(container_config("created", *SLEEP))
    path = Path(client.status(created).log_path)
    path.unlink(missing_ok=True)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "created"):
        reopen(pod, created)
    assert not path.exists()
    with refused(grpc.StatusCode.NOT_FOUND):
        reopen(pod, "f" * 64)


def test_without_log_path_output_is_discarded(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "echo lost; head -c 300000 /dev/zero")
    config.log_path = ""
    status = pod.finished(config)
    assert (status.exit_code, status.log_path) == (0, "")
    assert not list(Path(pod.config.log_directory).rglob("*.log"))


def test_terminal_output_is_one_stream(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "tty; echo out; echo err >&2", tty=True, stdin=True)
    config.log_path = "main.log"
    status = pod.finished(config)
    text = Path(status.log_path).read_bytes().decode()
    assert " stderr " not in text
    assert re.sub("\r", "", log_text(status.log_path)) == "/dev/pts/0\nout\nerr\n"


def reopen(pod: Pod, container_id: str) -> None:
    pod.agent.client.call("ReopenContainerLog", cri_pb2.ReopenContainerLogRequest(container_id=container_id))
