"""hosts.toml and the environment configure the connection to a registry."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host.errors import KubeletReasonError
from host.processes import run
from tests.integration.images.conftest import Node
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.registry import Registry
from tests.support.registry_front import Front, run_front


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return BuiltImage((make_tar([entry("a", os.urandom(100_000))]),))


@pytest.fixture
async def front(registry: Registry, built: BuiltImage) -> AsyncIterator[Front]:
    registry.push(built, "configured")
    async with run_front(registry.host) as running:
        yield running


def configure(node: Node, host: str, text: str) -> None:
    folder = Path(node.options.registry_config_dir) / host
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.toml").write_text(text)


async def test_headers_are_sent_only_to_their_host(
    node: Node, front: Front, registry: Registry, built: BuiltImage
) -> None:
    async with run_front(registry.host) as elsewhere:
        front.redirect_blobs_to = f"http://{elsewhere.host}"
        configure(node, "reg.example", f'server = "http://{front.host}"\n[header]\nX-Team = "blue"\n')
        assert (await node.puller.pull("reg.example/configured")).id == built.id
        assert {headers.get("X-Team") for _, _, headers in front.seen} == {"blue"}
        assert {headers.get("X-Team") for _, _, headers in elsewhere.seen} == {None}


async def test_hosts_toml_is_read_on_each_pull(node: Node, front: Front, built: BuiltImage) -> None:
    configure(node, "_default", 'server = "http://127.0.0.1:9"\n')
    with pytest.raises(KubeletReasonError):
        await node.puller.pull("reg.example/configured")
    configure(node, "_default", f'server = "http://{front.host}"\n')
    assert (await node.puller.pull("reg.example/configured")).id == built.id


async def test_a_host_that_may_only_resolve_serves_no_blobs(
    node: Node, front: Front, registry: Registry, built: BuiltImage
) -> None:
    async with run_front(registry.host) as mirror:
        only = f'[host."http://{mirror.host}"]\ncapabilities = ["resolve"]\n'
        configure(node, "reg.example", f'server = "http://{front.host}"\n{only}')
        assert (await node.puller.pull("reg.example/configured")).id == built.id
        assert any("/manifests/latest" in path for _, path, _ in mirror.seen)
        assert not any("/blobs/" in path for _, path, _ in mirror.seen)
        assert any("/blobs/" in path for _, path, _ in front.seen)


async def test_a_proxy_is_used_according_to_the_environment(
    node: Node, front: Front, built: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(node, "reg.example", 'server = "http://reg.example"\n')
    monkeypatch.setenv("http_proxy", f"http://{front.host}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert (await node.puller.pull("reg.example/configured")).id == built.id
    assert {headers["Host"] for _, _, headers in front.seen} == {"reg.example"}
    await node.store.remove(built.id)
    monkeypatch.setenv("no_proxy", "reg.example")
    front.seen.clear()
    with pytest.raises(KubeletReasonError, match=r"reg\.example"):
        await node.puller.pull("reg.example/configured")
    assert front.seen == []


async def test_client_certificates(node: Node, registry: Registry, built: BuiltImage, tmp_path: Path) -> None:
    registry.push(built, "configured")
    made = {}
    for name in ("server", "client"):
        key, certificate = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        subject = ("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1")
        files = ("-keyout", str(key), "-out", str(certificate))
        await run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *files, *subject])
        made[name] = key, certificate
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=made["client"][1])
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(made["server"][1], made["server"][0])
    async with run_front(registry.host, tls=context) as front:
        server = f'server = "https://{front.host}"\nca = "{made["server"][1]}"\n'
        configure(node, front.host, server)
        with pytest.raises(KubeletReasonError, match=front.host):
            await node.puller.pull(f"{front.host}/configured")
        assert front.seen == []
        configure(node, front.host, f'{server}client = [["{made["client"][1]}", "{made["client"][0]}"]]\n')
        assert (await node.puller.pull(f"{front.host}/configured")).id == built.id
