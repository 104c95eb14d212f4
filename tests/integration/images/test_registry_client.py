"""The registry client with a real registry behind a misbehaving proxy."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from host.errors import InvalidArgumentError, KubeletReasonError, NotFoundError, PermissionDeniedError
from host.processes import run
from images.registry.credentials import Credentials
from tests.integration.images.conftest import Node
from tests.support.agent import SOON
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.registry import Registry
from tests.support.registry_front import TOKEN, Front, run_front

NewNode = Callable[..., Awaitable[Node]]


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return BuiltImage((make_tar([entry("a", os.urandom(300_000))]), make_tar([entry("b", os.urandom(300_000))])))


@pytest.fixture
async def front(registry: Registry, built: BuiltImage) -> AsyncIterator[Front]:
    registry.push(built, "fronted")
    async with run_front(registry.host) as running:
        yield running


async def pull(node: Node, front: Front, credentials: Credentials | None = None) -> str:
    return (await node.puller.pull(f"{front.host}/fronted", credentials)).id


def sent_with(front: Front, part: str) -> set[str]:
    return {headers.get("Authorization", "") for _, path, headers in front.seen if part in path}


async def test_tokens(node: Node, front: Front, built: BuiltImage) -> None:
    front.token_user = "*"
    assert await pull(node, front) == built.id
    assert sum(count for path, count in front.count().items() if path.startswith("/token")) == 1
    await node.store.remove(built.id)
    front.token_user = "user:secret"
    with pytest.raises(PermissionDeniedError, match="token server"):
        await pull(node, front)
    with pytest.raises(PermissionDeniedError):
        await pull(node, front, Credentials(username="user", password="wrong"))
    front.seen.clear()
    assert await pull(node, front, Credentials(username="user", password="secret")) == built.id
    assert sent_with(front, "/blobs/") == {f"Bearer {TOKEN}"}, "only the token server gets the password"
    await node.store.remove(built.id)
    assert await pull(node, front, Credentials(registry_token=TOKEN)) == built.id


async def test_redirects_do_not_carry_credentials(
    node: Node, front: Front, registry: Registry, built: BuiltImage
) -> None:
    async with run_front(registry.host) as elsewhere:
        front.token_user = "user:secret"
        front.redirect_blobs_to = f"http://{elsewhere.host}"
        assert await pull(node, front, Credentials(username="user", password="secret")) == built.id
        assert elsewhere.seen
        assert sent_with(elsewhere, "") == {""}


@pytest.mark.parametrize("refuse_ranges", [False, True])
async def test_an_interrupted_transfer_is_resumed(
    node: Node, front: Front, built: BuiltImage, refuse_ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("images.registry.client.back_off", no_wait)
    front.refuse_ranges = refuse_ranges
    front.cut_after = 120_000
    if refuse_ranges:
        with pytest.raises(KubeletReasonError, match="interrupted at byte 120000"):
            await pull(node, front)
        await node.forget_partials()
        assert await node.leftovers() == {}
        return
    assert await pull(node, front) == built.id
    ranges = [headers["Range"] for _, _, headers in front.seen if "Range" in headers]
    assert "bytes=120000-" in ranges
    assert "bytes=240000-" in ranges


async def no_wait(failures: int, retry_after: str = "") -> None:
    await asyncio.sleep(0)


async def test_transient_failures_are_retried(node: Node, front: Front, built: BuiltImage) -> None:
    front.failures = {"/manifests/": [503], "/blobs/": [429, 500, 429]}
    front.retry_after = "0"
    assert await pull(node, front) == built.id
    front.failures = {"/manifests/": [500] * 50}
    await node.store.remove(built.id)
    with pytest.raises(KubeletReasonError, match="status 500") as caught:
        await pull(node, front)
    assert caught.value.message.startswith("RegistryUnavailable: ")


async def test_a_stalled_transfer_fails(new_node: NewNode, front: Front) -> None:
    node = await new_node(stall_seconds=1.0, attempts=2)
    front.stall = True
    with pytest.raises(KubeletReasonError, match="interrupted"):
        await pull(node, front)
    await node.forget_partials()
    assert await node.leftovers() == {}


async def test_a_cancelled_pull_stops_its_transfers_at_once(node: Node, front: Front) -> None:
    front.stall = True
    task = asyncio.create_task(pull(node, front))
    await asyncio.wait_for(front.stalled.wait(), SOON)
    task.cancel()
    await asyncio.wait((task,), timeout=SOON)
    assert task.cancelled()
    await node.forget_partials()
    assert await node.leftovers() == {}


async def test_mirrors(node: Node, front: Front, registry: Registry, built: BuiltImage) -> None:
    folder = Path(node.options.registry_config_dir) / "registry.example"
    folder.mkdir(parents=True)
    async with run_front(registry.host) as mirror:
        mirror.failures = {"/manifests/": [404]}
        hosts = f'[host."http://127.0.0.1:9"]\n[host."http://{mirror.host}"]\n'
        (folder / "hosts.toml").write_text(f'server = "http://{front.host}"\n{hosts}')
        front.token_user = "user:secret"
        secret = Credentials(username="user", password="secret")
        image = await node.puller.pull("registry.example/fronted", secret)
        assert image.repo_tags == ("registry.example/fronted:latest",)
        assert any("?ns=registry.example" in path for _, path, _ in mirror.seen)
        assert any("/blobs/" in path for _, path, _ in mirror.seen)
        assert sent_with(mirror, "") == {""}, "a mirror gets nothing that is meant for the registry"
        await node.store.remove(image.id)
        mirror.failures = {"/": [404] * 100}
        assert (await node.puller.pull("registry.example/fronted", secret)).id == built.id
        await node.store.remove(built.id)
        (folder / "hosts.toml").write_text(f'server = "http://127.0.0.1:9"\n[host."http://{mirror.host}"]\n')
        with pytest.raises(KubeletReasonError):  # "not found" of a mirror is not the registry's answer
            await node.puller.pull("registry.example/fronted", secret)
        (folder / "hosts.toml").write_text(f'server = "http://{mirror.host}"\n[host."http://127.0.0.1:9"]\n')
        with pytest.raises(NotFoundError):
            await node.puller.pull("registry.example/fronted", secret)


async def test_tls_with_a_private_authority(node: Node, registry: Registry, built: BuiltImage, tmp_path: Path) -> None:
    registry.push(built, "fronted")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    await run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *files, *subject])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with run_front(registry.host, tls=context) as front:
        folder = Path(node.options.registry_config_dir) / front.host
        folder.mkdir(parents=True)
        server = f'server = "https://{front.host}"\n'
        (folder / "hosts.toml").write_text(server)
        with pytest.raises(KubeletReasonError, match="certificate"):
            await pull(node, front)
        (folder / "hosts.toml").write_text(server + f'ca = "{certificate}"\n')
        assert await pull(node, front) == built.id
        await node.store.remove(built.id)
        front.token_user = "user:secret"
        assert await pull(node, front, Credentials(username="user", password="secret")) == built.id
        await node.store.remove(built.id)
        (folder / "hosts.toml").write_text(server + "skip_verify = true\n")
        assert await pull(node, front, Credentials(registry_token=TOKEN)) == built.id
        (folder / "hosts.toml").write_text("capabilities = 5")
        with pytest.raises(InvalidArgumentError, match=r"hosts\.toml"):
            await pull(node, front)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 501])
async def test_get_is_used_if_a_registry_refuses_head(node: Node, front: Front, built: BuiltImage, status: int) -> None:
    front.head_status = status
    assert [await pull(node, front) for _ in range(2)] == [built.id] * 2
    assert tuple(method for method, path, _ in front.seen if "/manifests/" in path)[-2:] == ("HEAD", "GET")


async def test_an_interrupted_manifest_is_fetched_again(
    node: Node, front: Front, built: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("images.registry.client.back_off", no_wait)
    front.cut_manifests = 1
    assert await pull(node, front) == built.id
    assert front.cut_manifests == 0
