"""Command, environment, working directory, HOME, terminal, stdin and image VOLUMEs."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.conftest import MakeImage
from tests.integration.conformance.support import SLEEP, Pod, refused
from tests.support.agent import BUSYBOX
from tests.support.pods import container_config

ENTRYPOINT = {"Entrypoint": ["echo", "entry"], "Cmd": ["cmd"]}


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ([], [], "entry cmd\n"),
        ([], ["given"], "entry given\n"),
        (["echo", "own"], [], "own\n"),
        (["echo", "own"], ["given"], "own given\n"),
    ],
)
def test_command_and_args(pod: Pod, image: MakeImage, command: list[str], args: list[str], expected: str) -> None:
    config = container_config("main", *command, image=image("entrypoint", ENTRYPOINT), args=args)
    assert pod.printed(config) == expected


def test_image_without_command_is_refused_with_the_remedy(pod: Pod, image: MakeImage) -> None:
    reference = image("nothing", {"Cmd": None})
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "command or args"):
        pod.create(container_config("main", image=reference))
    assert pod.printed(container_config("main", args=["echo", "args"], image=reference)) == "args\n"


def test_environment(pod: Pod, image: MakeImage) -> None:
    reference = image("env", {"Env": ["PATH=/bin:/odd", "FROM_IMAGE=image", "BOTH=image"]})
    config = container_config("main", "env", image=reference)
    config.envs.add(key="BOTH", value=b"config")
    config.envs.add(key="ODD", value="a=b 'c' \"d\" $e ünï\nnew line".encode())
    config.envs.add(key="EMPTY", value=b"")
    for number in range(200):
        config.envs.add(key=f"MANY_{number}", value=b"x" * 100)
    output = pod.printed(config)
    lines = output.splitlines()
    for line in ("PATH=/bin:/odd", "FROM_IMAGE=image", "BOTH=config", "EMPTY=", "HOME=/root", "new line"):
        assert line in lines
    assert "ODD=a=b 'c' \"d\" $e ünï" in lines
    assert f"HOSTNAME={pod.config.hostname}" in lines
    assert sum(line.startswith("MANY_") for line in lines) == 200
    assert not any(line.startswith(("NOTIFY_SOCKET", "_OCI", "PODKEEL")) for line in lines)


def test_home_comes_from_passwd_where_unset(pod: Pod) -> None:
    for uid, home in ((0, "/root"), (1000, "/home/user"), (4321, "/")):
        config = container_config(f"u{uid}", "sh", "-c", "echo $HOME")
        config.linux.security_context.run_as_user.value = uid
        assert pod.printed(config) == f"{home}\n"
    config = container_config("given", "sh", "-c", "echo $HOME")
    config.envs.add(key="HOME", value=b"/mine")
    assert pod.printed(config) == "/mine\n"


def test_working_directory(pod: Pod, image: MakeImage) -> None:
    reference = image("workdir", {"WorkingDir": "/var/www"})
    assert pod.printed(container_config("default", "pwd")) == "/\n"
    assert pod.printed(container_config("image", "pwd", image=reference)) == "/var/www\n"
    assert pod.printed(container_config("config", "pwd", image=reference, working_dir="/tmp")) == "/tmp\n"
    assert pod.printed(container_config("made", "pwd", working_dir="/not/there/yet")) == "/not/there/yet\n"


def test_terminal(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "tty && echo $TERM && test -t 0 && test -t 1 && test -t 2", tty=True)
    config.stdin = True
    assert pod.printed(config).replace("\r", "") == "/dev/pts/0\nxterm\n"


def test_without_stdin_there_is_an_end_of_file(pod: Pod) -> None:
    assert pod.printed(container_config("main", "sh", "-c", "cat; echo end")) == "end\n"


def test_stdin_stays_open(pod: Pod) -> None:
    container_id = pod.start(container_config("main", "cat", stdin=True))
    assert pod.agent.client.output(container_id, "readlink", "/proc/1/fd/0").startswith("pipe:")
    assert pod.agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING


def test_image_volumes_are_writable_and_go_with_the_container(pod: Pod, image: MakeImage) -> None:
    reference = image("volumes", {"Volumes": {"/var/www": {}, "/new/folder": {}}})
    script = (
        "for d in /var/www /new/folder; do echo $d > $d/file && cat $d/file; done; grep -c -e www -e /new /proc/mounts"
    )
    config = container_config("main", "sh", "-c", script, image=reference)
    config.linux.security_context.readonly_rootfs = True
    assert pod.printed(config) == "/var/www\n/new/folder\n2\n"
    again = container_config("again", "ls", "/var/www", "/new/folder", image=reference)
    assert "file" not in pod.printed(again)
    data = pod.agent.data
    pod.agent.client.remove_sandbox(pod.id)
    assert not [path for path in (data / "containers").rglob("file") if path.is_file()]


def test_configured_mount_takes_the_place_of_an_image_volume(pod: Pod, image: MakeImage, tmp_path: Path) -> None:
    reference = image("taken", {"Volumes": {"/var/www": {}}})
    (tmp_path / "mine").write_text("mine")
    config = container_config("main", "cat", "/var/www/mine", image=reference)
    config.mounts.add(container_path="/var/www", host_path=str(tmp_path))
    assert pod.printed(config).strip() == "mine"


def test_each_container_has_its_own_root(pod: Pod) -> None:
    first = pod.start(container_config("first", *SLEEP))
    pod.agent.client.output(first, "touch", "/mark", "/etc/mark")
    second = pod.start(container_config("second", *SLEEP))
    assert "mark" not in pod.agent.client.output(second, "ls", "/", "/etc")
    assert pod.agent.client.status(second).image.image == BUSYBOX
