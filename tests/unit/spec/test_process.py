"""Command, environment, working directory and stop signal."""

from __future__ import annotations

import pytest

from host.errors import InvalidArgumentError
from runtime.specgen.process import DEFAULT_PATH, command_line, environment, working_directory
from runtime.specgen.signals import parse_signal, stop_signal
from tests.unit.spec.requests import Image, container


@pytest.mark.parametrize(
    ("command", "args", "entrypoint", "cmd", "expected"),
    [
        ([], [], ["/entry"], ["a"], ["/entry", "a"]),
        ([], ["x"], ["/entry"], ["a"], ["/entry", "x"]),
        (["/mine"], [], ["/entry"], ["a"], ["/mine"]),
        (["/mine"], ["x"], ["/entry"], ["a"], ["/mine", "x"]),
        ([], [], [], ["a", "b"], ["a", "b"]),
        ([], ["x"], [], ["a"], ["x"]),
        ([], [], [""], ["a"], ["a"]),
        ([], [], ["/entry"], [], ["/entry"]),
    ],
)
def test_command_line(
    command: list[str], args: list[str], entrypoint: list[str], cmd: list[str], expected: list[str]
) -> None:
    image = Image(entrypoint=entrypoint, cmd=cmd)
    assert command_line(container(command=command, args=args), image) == expected


@pytest.mark.parametrize(("command", "reason"), [([], "no command"), ([""], "no command"), (["a\0b"], "NUL")])
def test_command_line_refused(command: list[str], reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        command_line(container(command=command), Image(cmd=[]))


def test_environment_is_the_images_then_the_configurations() -> None:
    config = container(
        tty=True, envs=[{"key": "B", "value": b"2"}, {"key": "B", "value": b"3"}, {"key": "EMPTY", "value": b""}]
    )
    image = Image(env=["A=1=1", "B=image", "TERM=dumb", "NOVALUE", "=x"])
    assert environment(config, image, hostname="pod", home="/home/app") == [
        f"PATH={DEFAULT_PATH}",
        "HOSTNAME=pod",
        "TERM=dumb",
        "A=1=1",
        "B=3",
        "EMPTY=",
        "HOME=/home/app",
    ]


def test_environment_keeps_what_is_given() -> None:
    config = container(envs=[{"key": "HOME", "value": b"/mine"}, {"key": "HOSTNAME", "value": "ü".encode()}])
    result = environment(config, Image(env=["PATH=/bin"]), hostname="pod", home="/root")
    assert result == ["PATH=/bin", "HOSTNAME=ü", "HOME=/mine"]


def test_tty_sets_term() -> None:
    assert "TERM=xterm" in environment(container(tty=True), Image(), hostname="", home="/")
    assert not [entry for entry in environment(container(), Image(), hostname="", home="/") if entry.startswith("TERM")]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [("", b"x", "name"), ("A=B", b"x", "name"), ("A", b"\xff", "UTF-8"), ("A", b"a\0b", "NUL")],
)
def test_environment_refused(key: str, value: bytes, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        environment(container(envs=[{"key": key, "value": value}]), Image(), hostname="", home="/")


@pytest.mark.parametrize(
    ("given", "image", "expected"),
    [("", "", "/"), ("", "/srv", "/srv"), ("/app/../x/", "/srv", "/x"), ("", "rel/ative", "/rel/ative")],
)
def test_working_directory(given: str, image: str, expected: str) -> None:
    assert working_directory(container(working_dir=given), Image(working_dir=image)) == expected


@pytest.mark.parametrize(
    "given",
    ["relative", "/proc/self/fd/7", "/x/../proc/self/fd/7/../8", "/proc/1/cwd", "//proc/thread-self/fd/8", "/dev/fd/7"],
)
def test_working_directory_refused(given: str) -> None:
    with pytest.raises(InvalidArgumentError, match="working_dir"):
        working_directory(container(working_dir=given), Image())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15", ("SIGTERM", 15)),
        ("term", ("SIGTERM", 15)),
        ("SIGQUIT", ("SIGQUIT", 3)),
        ("SIGRTMIN+3", ("SIGRTMIN+3", 37)),
        ("RTMINPLUS3", ("SIGRTMIN+3", 37)),
        ("SIGRTMAX-2", ("SIGRTMAX-2", 62)),
        ("37", ("SIGRTMIN+3", 37)),
        ("64", ("SIGRTMAX", 64)),
        ("SIGWHAT", None),
        ("0", None),
        ("99", None),
        ("999", None),
        ("SIGRTMIN-3", None),
        ("SIGRTMAX+1", None),
        ("", None),
    ],
)
def test_parse_signal(text: str, expected: tuple[str, int] | None) -> None:
    found = parse_signal(text)
    assert (found and (found.name, found.number)) == expected


def test_stop_signal_is_the_configurations_then_the_images() -> None:
    assert stop_signal(container(), "").name == "SIGTERM"
    assert stop_signal(container(), "SIGQUIT").number == 3
    assert stop_signal(container(), "NONSENSE").name == "SIGTERM"
    assert stop_signal(container(stop_signal="SIGNAL_SIGUSR1"), "SIGQUIT").name == "SIGUSR1"
    assert stop_signal(container(stop_signal="SIGNAL_SIGRTMAXMINUS14"), "").number == 50
    assert stop_signal(container(stop_signal="SIGNAL_SIGPOLL"), "").number == 29


def test_every_signal_of_the_protocol_is_known() -> None:
    from proto.runtime.v1 import cri_pb2

    for name, number in cri_pb2.Signal.items():
        if number:
            assert parse_signal(name.removeprefix("SIGNAL_")), name
