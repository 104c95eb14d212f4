"""The node's credentials: where they come from, and that only the right host gets them."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from host.errors import InvalidArgumentError, PermissionDeniedError
from images.registry.credentials import Credentials
from tests.integration.images.conftest import Node
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.registry import Registry
from tests.support.registry_front import TOKEN, Front, run_front

Helper = Callable[[str, str], None]
NewNode = Callable[..., Awaitable[Node]]
BASIC = base64.b64encode(b"user:secret").decode()


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return BuiltImage((make_tar([entry("a", "node credentials")]),))


@pytest.fixture
async def fronts(registry: Registry, built: BuiltImage) -> AsyncIterator[tuple[Front, Front]]:
    """Two registries that accept the same user. Each records what it receives."""
    registry.push(built, "team/app")
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(run_front(registry.host)) for _ in range(2)]
        first.token_user = second.token_user = "user:secret"
        yield first, second


@pytest.fixture
async def node(new_node: NewNode, tmp_path: Path) -> Node:
    return await new_node(credentials_file=str(tmp_path / "credentials.json"), credential_helper_seconds=1.0)


def write(node: Node, **content: object) -> None:
    Path(node.options.credentials_file).write_text(json.dumps(content))


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    """Makes a credential helper on the PATH from a shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, script: str) -> None:
        program = folder / f"docker-credential-{name}"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return make


def sent(front: Front) -> set[str]:
    return {headers["Authorization"] for _, _, headers in front.seen if "Authorization" in headers}


@pytest.mark.parametrize("key", ["{host}", "https://{host}/v2/", "{host}/team"])
async def test_entries_of_the_file(node: Node, fronts: tuple[Front, Front], built: BuiltImage, key: str) -> None:
    front, other = fronts
    write(node, auths={key.format(host=front.host): {"auth": BASIC}, f"{front.host}/other": {"auth": "bm90OmhlcmU="}})
    assert (await node.puller.pull(f"{front.host}/team/app")).id == built.id
    assert sent(front) == {f"Basic {BASIC}", f"Bearer {TOKEN}"}
    await node.store.remove(built.id)
    with pytest.raises(PermissionDeniedError, match="has none for"):
        await node.puller.pull(f"{other.host}/team/app")
    assert sent(other) == set()


async def test_credentials_of_the_request_come_first(node: Node, fronts: tuple[Front, Front]) -> None:
    front, _ = fronts
    write(node, auths={front.host: {"auth": BASIC}})
    with pytest.raises(PermissionDeniedError, match="user other, from the request"):
        await node.puller.pull(f"{front.host}/team/app", Credentials(username="other", password="wrong"))
    assert f"Basic {BASIC}" not in sent(front)
    elsewhere = Credentials(username="other", password="wrong", server_address="https://elsewhere.example")
    await node.puller.pull(f"{front.host}/team/app", elsewhere)
    await node.store.remove(f"{front.host}/team/app")
    await node.puller.pull(f"{front.host}/team/app", Credentials())


async def test_redirects_and_mirrors_do_not_get_credentials(
    node: Node, registry: Registry, fronts: tuple[Front, Front], built: BuiltImage
) -> None:
    front, other = fronts
    other.token_user = ""
    front.redirect_blobs_to = f"http://{other.host}"
    write(node, auths={front.host: {"auth": BASIC}})
    assert (await node.puller.pull(f"{front.host}/team/app")).id == built.id
    assert other.seen
    assert sent(other) == set()
    await node.store.remove(built.id)
    other.token_user = "user:secret"
    with pytest.raises(PermissionDeniedError):  # the target of the redirect cannot get them by asking, either
        await node.puller.pull(f"{front.host}/team/app")
    assert sent(other) == set()
    front.redirect_blobs_to = ""
    # A mirror that requires credentials gets its own, never those of the registry that it mirrors.
    folder = Path(node.options.registry_config_dir) / front.host
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'server = "http://{front.host}"\n[host."http://{other.host}"]\n')
    assert (await node.puller.pull(f"{front.host}/team/app")).id == built.id
    assert sent(other) == set()
    await node.store.remove(built.id)
    front.seen.clear()
    write(node, auths={other.host: {"username": "user", "password": "secret"}})
    assert (await node.puller.pull(f"{front.host}/team/app")).id == built.id
    assert sent(front) == set()
    assert f"Bearer {TOKEN}" in sent(other)


async def test_helpers(
    node: Node, fronts: tuple[Front, Front], built: BuiltImage, helper: Helper, tmp_path: Path
) -> None:
    front, other = fronts
    asked = tmp_path / "asked"
    answer = json.dumps({"ServerURL": "x", "Username": "user", "Secret": "secret"})
    helper("good", f"cat >> {asked}; echo >> {asked}; test $1 = get; echo '{answer}'")
    helper("none", "echo credentials not found in native keychain; exit 1")
    write(node, credHelpers={front.host: "good"}, auths={front.host: {"auth": "d3Jvbmc6d3Jvbmc="}}, credsStore="none")
    assert (await node.puller.pull(f"{front.host}/team/app")).id == built.id
    with pytest.raises(PermissionDeniedError, match="docker-credential-none has none"):
        await node.puller.pull(f"{other.host}/team/app")
    write(node, credsStore="good", auths={other.host: {}})
    assert (await node.puller.pull(f"{other.host}/team/app")).id == built.id
    assert asked.read_text().split() == [front.host, other.host]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sleep 60", "did not finish within"),
        ("echo broken >&2; exit 3", "status 3: broken"),
        ("echo '{'", "not understood"),
    ],
)
async def test_public_images_are_pulled_if_a_helper_fails(
    node: Node, fronts: tuple[Front, Front], helper: Helper, script: str, words: str
) -> None:
    front, other = fronts
    helper("bad", script)
    write(node, credsStore="bad")
    with pytest.raises(PermissionDeniedError, match=words):
        await node.puller.pull(f"{front.host}/team/app")
    other.token_user = "*"
    await node.puller.pull(f"{other.host}/team/app")


async def test_errors_name_the_malformed_file(node: Node, fronts: tuple[Front, Front]) -> None:
    front, _ = fronts
    write(node, credHelpers={front.host: "../../bin/sh"})
    with pytest.raises(PermissionDeniedError, match="not the name of a helper"):
        await node.puller.pull(f"{front.host}/team/app")
    write(node, credHelpers={front.host: "absent"})
    with pytest.raises(PermissionDeniedError, match="docker-credential-absent' is not installed"):
        await node.puller.pull(f"{front.host}/team/app")
    Path(node.options.credentials_file).write_text("{")
    with pytest.raises(InvalidArgumentError, match=r"credentials\.json cannot be used"):
        await node.puller.pull(f"{front.host}/team/app")


async def test_explain_shows_every_host(node: Node, fronts: tuple[Front, Front], built: BuiltImage) -> None:
    front, mirror = fronts
    folder = Path(node.options.registry_config_dir) / "registry.example"
    folder.mkdir(parents=True)
    hosts = "".join(
        f'[host."http://{host}"]\n{more}\n'
        for host, more in ((mirror.host, ""), ("127.0.0.1:9", ""), ("127.0.0.1:8", 'capabilities = ["pull"]'))
    )
    (folder / "hosts.toml").write_text(f'server = "http://{front.host}"\n{hosts}')
    write(node, auths={front.host: {"auth": BASIC}})
    plan = await node.puller.explain("registry.example/team/app")
    name, answers = plan.name, plan.hosts
    assert str(name) == "registry.example/team/app:latest"
    assert [answer.address for answer in answers] == [
        f"http://{host}/v2" for host in (mirror.host, "127.0.0.1:9", "127.0.0.1:8", front.host)
    ]
    refused, unreachable, unasked, own = answers
    assert refused.mirror
    assert not refused.answered
    assert "token server" in refused.answer
    assert "has none for" in refused.credentials
    assert "unreachable" in unreachable.answer
    assert unreachable.credentials == "none were required"
    assert "not asked" in unasked.answer
    assert own.answered
    assert not own.mirror
    assert own.answer.startswith("sha256:")
    assert own.credentials == f"user user, from {node.options.credentials_file}, entry {front.host}"
    assert own.configured_in == str(folder / "hosts.toml")
    assert "secret" not in repr(answers)
    assert node.store.images() == ()
