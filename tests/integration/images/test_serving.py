"""``podkeel serve-images``: nodes of a rack take images from each other."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from host.concurrency.threads import inside_namespace
from host.libc import CLONE_NEWNET
from images.serving.catalog import Catalog
from images.serving.server import ImageServer
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.integration.images.conftest import Node
from tests.support.agent import AgentProcess, wait_for
from tests.support.image_builder import BuiltImage, digest_of, entry, make_tar
from tests.support.registry import Registry, run_registry

IMAGE = BuiltImage((make_tar([entry("a", os.urandom(300_000))]), make_tar([entry("b", "b")])))
TOKEN = b"a token of this test"


@dataclass
class Client:
    """Sends requests to the image server."""

    port: int
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN.decode()}"})

    async def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        def exchange() -> tuple[int, dict[str, str], bytes]:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
                connection.request(method, path, headers={**self.headers, **headers})
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()

        return await asyncio.to_thread(exchange)


@pytest.fixture
async def client(node: Node) -> AsyncIterator[Client]:
    server = ImageServer(Catalog(node.data), tokens=[TOKEN])
    yield Client(await server.start("127.0.0.1", 0))
    await server.close()


@pytest.fixture
async def name(node: Node, registry: Registry) -> str:
    reference = registry.push(IMAGE, "team/app", "1")
    await node.puller.pull(reference)
    return reference


def paths(name: str) -> tuple[str, str, str]:
    """The registry's host, and the paths of the manifests and blobs of its repository."""
    host, _, rest = name.partition("/")
    repository = rest.rpartition(":")[0]
    return host, f"/v2/{repository}/manifests/", f"/v2/{repository}/blobs/"


async def test_manifests_and_blobs_are_those_of_the_registry(client: Client, name: str) -> None:
    host, manifests, blobs = paths(name)
    content, manifest = IMAGE.blobs()
    digest = digest_of(manifest)
    status, headers, body = await client.ask(f"{manifests}1?ns={host}")
    assert (status, body, headers["Docker-Content-Digest"]) == (200, manifest, digest)
    assert headers["Content-Type"] == json.loads(manifest)["mediaType"]
    status, headers, body = await client.ask(f"{manifests}{digest}?ns={host}", "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(manifest)))
    for one, expected in content.items():
        if expected != manifest:
            status, headers, body = await client.ask(f"{blobs}{one}?ns={host}")
            assert (status, body) == (200, expected)
            assert headers["Docker-Content-Digest"] == one


async def test_parts_of_blobs(client: Client, name: str) -> None:
    host, _, blobs = paths(name)
    content, _ = IMAGE.blobs()
    digest, blob = max(content.items(), key=lambda item: len(item[1]))
    size = len(blob)
    for asked, begin, end in (("0-0", 0, 1), ("100-", 100, size), ("-7", size - 7, size), (f"5-{size + 9}", 5, size)):
        status, headers, body = await client.ask(f"{blobs}{digest}?ns={host}", Range=f"bytes={asked}")
        assert (status, body) == (206, blob[begin:end]), asked
        assert headers["Content-Range"] == f"bytes {begin}-{end - 1}/{size}"
    status, headers, _ = await client.ask(f"{blobs}{digest}?ns={host}", Range=f"bytes={size}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
    status, _, body = await client.ask(f"{blobs}{digest}?ns={host}", Range="bytes=0-1,5-6")
    assert (status, body) == (200, blob), "several parts may be answered with the whole"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("team/app/manifests/2", "MANIFEST_UNKNOWN"),
        ("team/app/blobs/sha256:" + "0" * 64, "BLOB_UNKNOWN"),
        ("team/app/blobs/sha256:../../../podkeel.db", "UNSUPPORTED"),
        ("team/app/blobs/..%2f..%2fpodkeel.db", "UNSUPPORTED"),
        ("team/app/tags/list", "UNSUPPORTED"),
        ("team/%ff/manifests/1", "UNSUPPORTED"),
        ("Team/app/manifests/1", "UNSUPPORTED"),
    ],
)
async def test_answers_for_missing_images(client: Client, name: str, path: str, code: str) -> None:
    status, _, body = await client.ask(f"/v2/{path}?ns={paths(name)[0]}")
    assert (status, json.loads(body)["errors"][0]["code"]) == (404, code)


async def test_an_image_without_its_compressed_layers_is_not_served(client: Client, name: str, node: Node) -> None:
    host, manifests, _ = paths(name)
    layer = node.images.layers.all()
    await node.images.layers.drop_blob(next(iter(layer)).blob_digest)
    status, _, body = await client.ask(f"{manifests}1?ns={host}")
    assert (status, b"no complete image 1" in body) == (404, True)


async def test_only_clients_with_a_token_get_images(client: Client, name: str) -> None:
    host, manifests, _ = paths(name)
    for authorization, status in (
        ("", 401),
        ("Bearer another token", 401),
        ("Basic !!!", 401),
        ("Basic dTphIHRva2VuIG9mIHRoaXMgdGVzdA==", 200),
        ("bearer a token of this test", 200),
    ):
        client.headers = {"Authorization": authorization} if authorization else {}
        for path in ("/v2/", f"{manifests}1?ns={host}"):
            answer, headers, _ = await client.ask(path)
            assert answer == status, authorization
            assert ("WWW-Authenticate" in headers) == (status == 401)


async def test_images_can_only_be_read(client: Client, name: str, node: Node) -> None:
    for method in ("PUT", "POST", "DELETE", "PATCH"):
        status, _, _ = await client.ask(f"{paths(name)[1]}1", method)
        assert status == 405
    assert node.store.find(name) is not None


ADDRESSES = {"a": "10.97.0.1", "b": "10.97.0.2", "c": "10.97.0.3"}


class Rack:
    """Three agents in separate network namespaces, with a switch between them. Only ``a`` reaches the registry."""

    def __init__(self, folder: Path, token: str) -> None:
        self._folder = folder
        self._names = {name: f"pkt{token}{name}" for name in ("a", "b", "c", "switch")}
        self.agents: dict[str, AgentProcess] = {}
        self.servers: dict[str, subprocess.Popen[bytes]] = {}

    def inside(self, name: str) -> tuple[str, ...]:
        """The words that run a command in a namespace."""
        return ("nsenter", f"--net=/run/netns/{self._names[name]}")

    def build(self) -> None:
        """Make the namespaces and links."""
        for name in self._names.values():
            _run("ip", "netns", "add", name)
        switch = self._names["switch"]
        _run("ip", "-n", switch, "link", "add", "br0", "up", "type", "bridge")
        for name, address in ADDRESSES.items():
            own = self._names[name]
            _run("ip", "-n", own, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", switch)
            _run("ip", "-n", switch, "link", "set", "dev", name, "master", "br0", "up")
            _run("ip", "-n", own, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                _run("ip", "-n", own, "link", "set", "dev", link, "up")

    def slow_down(self, name: str) -> None:
        """Limit what a node sends to 1 MiB a second."""
        words = ("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "8mbit", "burst", "64kb", "latency", "1s")
        _run(*self.inside(name), *words)

    def start(self, name: str, mirrors: str, registry: str, *options: str) -> AgentProcess:
        """Start an agent that asks the image servers of ``mirrors`` first, and its image server."""
        folder = self._folder / name
        hosts = folder / "certs.d" / registry
        hosts.mkdir(parents=True)
        lines = [f'server = "http://{registry}"']
        for mirror in mirrors:
            lines.append(f'[host."http://{ADDRESSES[mirror]}:5000"]\ncapabilities = ["pull", "resolve"]')
            lines.append(f'header.Authorization = "Bearer {TOKEN.decode()}"')
        (hosts / "hosts.toml").write_text("\n".join(lines))
        agent = AgentProcess(folder, options=f'[images]\nregistry_config_dir = "{folder}/certs.d"\nconnect_seconds = 2')
        program = folder / "podkeel"
        program.write_text(f'#!/bin/sh\nexec {" ".join(self.inside(name))} {agent.program} "$@"\n')
        program.chmod(0o755)
        agent.program = program
        self.agents[name] = agent
        agent.start()
        (folder / "tokens").write_bytes(TOKEN)
        words = ("serve-images", *agent.flags, "--listen", "0.0.0.0:5000", "--token-file", str(folder / "tokens"))
        log = folder / "serving.log"
        with log.open("wb") as output:
            self.servers[name] = subprocess.Popen(agent.command(*words, *options), stderr=output)
        wait_for(lambda: b"serving on" in log.read_bytes(), what=f"the image server of {name}")
        return agent

    def end(self) -> None:
        """End everything and remove the namespaces."""
        for server in self.servers.values():
            server.terminate()
        for server in self.servers.values():
            assert server.wait() in (0, -9)
        for agent in self.agents.values():
            agent.reset()
        for name in self._names.values():
            _run("ip", "netns", "delete", name)


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


def pull(agent: AgentProcess, reference: str) -> str:
    request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=reference))
    return str(agent.client.call("PullImage", request).image_ref)


def in_namespace(rack: Rack, name: str, work: Callable[[], object]) -> None:
    """Run ``work`` in a thread in a namespace of the rack."""

    def run() -> None:
        with inside_namespace(rack.inside(name)[1].removeprefix("--net="), CLONE_NEWNET):
            work()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    made = Rack(tmp_path, hashlib.sha256(str(tmp_path).encode()).hexdigest()[:6])
    with ExitStack() as stack:
        stack.callback(made.end)
        made.build()
        yield made


def test_nodes_of_a_rack_take_layers_from_each_other(rack: Rack) -> None:
    big = BuiltImage((make_tar([entry("big", os.urandom(6 << 20))]), make_tar([entry("small", "small")])))
    with run_registry(prefix=rack.inside("a")) as registry:
        in_namespace(rack, "a", lambda: registry.push(big, "team/app", "1"))
        name = f"{registry.host}/team/app:1"
        a = rack.start("a", "", registry.host, "--pull")
        c = rack.start("c", "a", registry.host)
        b = rack.start("b", "ac", registry.host)
        # Node a pulls the image from the registry because c asks for it.
        assert pull(c, name) == big.id
        assert a.client.call("ImageStatus", cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=name))).image.id
        # Node a goes away while b takes a layer from it: b continues with c, from where it was.
        rack.slow_down("a")
        call = b.client.future("PullImage", cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=name)))

        def received() -> int:
            pulls = b.client.call("ListPulls", agent_pb2.ListPullsRequest()).pulls
            return max((layer.received for pull in pulls for layer in pull.layers), default=0)

        wait_for(lambda: received() > 1 << 20, what="the first megabyte")
        rack.servers["a"].kill()
        rack.servers["a"].wait()
        a.kill()
        assert call.result().image_ref == big.id
    continued = rf"blob sha256:\w+ of {re.escape(registry.host)}/team/app: bytes [1-9]\d* to "
    assert re.search(continued, (c.folder / "serving.log").read_text())
    a.start()
    for node in (a, b, c):
        answer = node.client.call("CheckImages", agent_pb2.CheckImagesRequest())
        assert not answer.findings
