"""The client and the lookup of names, against a gRPC server whose answers the tests choose."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from cli.client import Client
from cli.connect import connect
from cli.lookup import find_container, find_pod
from cli.main import main
from host.errors import (
    InvalidArgumentError,
    LimitError,
    NotFoundError,
    PodkeelError,
    UnavailableError,
    UnsupportedError,
    WrongStateError,
)
from proto.runtime.v1 import cri_pb2

Answer = Callable[[bytes, Any], Message]


class Server:
    """Answers each method of the CRI as ``answers`` says; those without an answer are unimplemented."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.answers: dict[str, Answer] = {}
        self._server = grpc.server(ThreadPoolExecutor(2))
        handlers = [
            grpc.method_handlers_generic_handler(
                service.full_name,
                {
                    name: grpc.unary_unary_rpc_method_handler(
                        partial(self._answer, name), response_serializer=lambda message: message.SerializeToString()
                    )
                    for name in service.methods_by_name
                },
            )
            for service in cri_pb2.DESCRIPTOR.services_by_name.values()
        ]
        self._server.add_generic_rpc_handlers(tuple(handlers))
        self._server.add_insecure_port(socket)
        self._server.start()

    def _answer(self, method: str, request: bytes, context: Any) -> Any:
        if method not in self.answers:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "not built")
        return self.answers[method](request, context)

    def answer(self, method: str, message: Message) -> None:
        self.answers[method] = lambda _request, _context: message

    def refuse(self, method: str, code: grpc.StatusCode, details: str) -> None:
        self.answers[method] = lambda _request, context: context.abort(code, details)

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(f"unix://{tmp_path}/test.sock")
    yield started
    started.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.socket) as connected:
        yield connected


def test_a_call_finds_its_method_by_its_request(server: Server, client: Client) -> None:
    server.answer("Version", cri_pb2.VersionResponse(runtime_name="x"))
    server.answer("ListImages", cri_pb2.ListImagesResponse(images=[cri_pb2.Image(id="i")]))
    assert client.call(cri_pb2.VersionRequest(), cri_pb2.VersionResponse).runtime_name == "x"
    assert client.call(cri_pb2.ListImagesRequest(), cri_pb2.ListImagesResponse).images[0].id == "i"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError),
        (grpc.StatusCode.FAILED_PRECONDITION, WrongStateError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, LimitError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.INTERNAL, PodkeelError),
    ],
)
def test_refusals_keep_their_kind(
    server: Server, client: Client, code: grpc.StatusCode, kind: type[PodkeelError]
) -> None:
    server.refuse("StopContainer", code, "it is\n  so")
    with pytest.raises(kind) as raised:
        client.call(cri_pb2.StopContainerRequest(), cri_pb2.StopContainerResponse, "stop container web")
    assert type(raised.value) is kind
    assert raised.value.message == "stop container web: it is so"


def test_a_method_the_agent_lacks(client: Client) -> None:
    with pytest.raises(UnsupportedError, match=r"^Version: not built$"):
        client.call(cri_pb2.VersionRequest(), cri_pb2.VersionResponse)


def test_no_agent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"unix://{tmp_path}/none.sock"
    assert main(["pods", "--socket", address]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"podkeel: no agent listens on {address}: start one with `podkeel serve`, or name its socket with --socket\n"
    )


def test_an_agent_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{tmp_path}/left.sock")
    assert main(["pods", "--socket", f"unix://{tmp_path}/left.sock"]) == 1
    assert capsys.readouterr().err.startswith(f"podkeel: no agent listens on unix://{tmp_path}/left.sock: start one")


@pytest.mark.parametrize("named", ["/run/podkeel.sock", "tcp://127.0.0.1:80", "unix:relative"])
def test_a_socket_of_another_form(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pods", "--socket", named]) == 1
    expected = 'podkeel: --socket: expected a unix socket such as "unix:///run/podkeel/podkeel.sock", got'
    assert capsys.readouterr().err == f'{expected} "{named}"\n'


@pytest.mark.parametrize(("word", "meant"), [("push", "image push"), ("rmi", "image rm")])
def test_commands_of_images_are_hinted_at(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "a"]) == 2
    assert capsys.readouterr().err == f"podkeel: there is no command {word!r}: did you mean `podkeel {meant}`?\n"


def test_a_refusal_is_printed_as_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.refuse("ListPodSandbox", grpc.StatusCode.INTERNAL, "the store\nis broken")
    assert main(["pods", "--socket", server.socket]) == 1
    assert capsys.readouterr().err == "podkeel: list pods: the store is broken\n"


def test_where_the_socket_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[server]\nsocket = "unix:///from/file"\n')
    monkeypatch.setattr("cri.config.configuration.DEFAULT_FILE", tmp_path / "config.toml")
    monkeypatch.delenv("PODKEEL_SOCKET", raising=False)
    unset, given = argparse.Namespace(socket=None), argparse.Namespace(socket="unix:///from/flag")
    assert connect(unset).socket == "unix:///from/file"
    monkeypatch.setenv("PODKEEL_SOCKET", "unix:///from/environment")
    assert connect(unset).socket == "unix:///from/environment"
    assert connect(given).socket == "unix:///from/flag"


def pod(identifier: str, name: str, namespace: str = "default", attempt: int = 0) -> cri_pb2.PodSandbox:
    metadata = cri_pb2.PodSandboxMetadata(name=name, namespace=namespace, attempt=attempt)
    return cri_pb2.PodSandbox(id=identifier, metadata=metadata, created_at=attempt)


def container(identifier: str, pod_id: str, name: str, attempt: int = 0) -> cri_pb2.Container:
    metadata = cri_pb2.ContainerMetadata(name=name, attempt=attempt)
    return cri_pb2.Container(id=identifier, pod_sandbox_id=pod_id, metadata=metadata, created_at=attempt)


@pytest.fixture
def populated(server: Server, client: Client) -> Client:
    pods = [pod("aa11", "web"), pod("aa22", "db"), pod("bb33", "db", attempt=1), pod("cc44", "web", "shop")]
    containers = [
        container("1111", "aa11", "main"),
        container("1222", "aa11", "main", attempt=1),
        container("2333", "aa22", "main"),
        container("2444", "cc44", "side"),
        container("aaaa", "cc44", "2"),
    ]
    server.answer("ListPodSandbox", cri_pb2.ListPodSandboxResponse(items=pods))
    server.answer("ListContainers", cri_pb2.ListContainersResponse(containers=containers))
    return client


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("aa11", "aa11"), ("aa1", "aa11"), ("c", "cc44"), ("db", "bb33"), ("shop/web", "cc44"), ("default/web", "aa11")],
)
def test_pods_are_found(populated: Client, wanted: str, found: str) -> None:
    assert find_pod(populated, wanted).id == found


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("1222", "1222"),
        ("11", "1111"),
        ("web/main", "1222"),
        ("default/db/main", "2333"),
        ("side", "2444"),
        ("2", "aaaa"),
    ],
)
def test_containers_are_found(populated: Client, wanted: str, found: str) -> None:
    assert find_container(populated, wanted).id == found


@pytest.mark.parametrize("wanted", ["", "nothing", "main/web", "ff"])
def test_names_of_no_pod_or_container(populated: Client, wanted: str) -> None:
    with pytest.raises(NotFoundError, match=f"no pod is called '{wanted}'"):
        find_pod(populated, wanted)
    with pytest.raises(NotFoundError, match=f"no container is called '{wanted}'"):
        find_container(populated, wanted)


def test_ambiguous_names(populated: Client) -> None:
    with pytest.raises(InvalidArgumentError, match="'aa' may mean several pods, use more of the id: web aa11, db aa22"):
        find_pod(populated, "aa")
    with pytest.raises(InvalidArgumentError, match="'web' may mean several pods"):
        find_pod(populated, "web")
    with pytest.raises(InvalidArgumentError, match="'main' may mean several containers"):
        find_container(populated, "main")
