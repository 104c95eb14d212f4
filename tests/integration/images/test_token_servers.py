"""Token servers and registries of many kinds: redirects, POST only, encodings, unusual forms of credentials."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gzip
import json
import ssl
import subprocess
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from host.errors import InvalidArgumentError, KubeletReasonError, PermissionDeniedError, PodkeelError, UnavailableError
from images.registry.credentials import Credentials
from tests.integration.images.conftest import Node
from tests.support.agent import SOON
from tests.support.image_builder import OCI_MANIFEST, digest_of
from tests.support.scripted_registry import Answer, Request, ScriptedRegistry, run_scripted_registry, small_image

NewNode = Callable[..., Awaitable[Node]]

SECRET = Credentials(username="user", password="secret")
BASIC = "Basic " + base64.b64encode(b"user:secret").decode()
TOKEN = "the-token"


@pytest.fixture
def scripted() -> Iterator[ScriptedRegistry]:
    with run_scripted_registry() as running:
        yield running


@pytest.fixture
def other() -> Iterator[ScriptedRegistry]:
    """Another host."""
    with run_scripted_registry() as running:
        yield running


def private_image(registry: ScriptedRegistry, realm: str = "", repository: str = "private") -> str:
    """Serve an image to clients with a token only. Returns its reference."""
    name = registry.offer_image(repository)

    def guarded(answer: Answer) -> Callable[[Request], Answer]:
        challenge = f'Bearer realm="{realm or registry.address + "/token"}",service="reg"'
        refusal = Answer(b"{}", status=401, headers={"WWW-Authenticate": challenge})
        return lambda request: answer if request.headers.get("Authorization") == f"Bearer {TOKEN}" else refusal

    for path, answer in list(registry.answers.items()):
        if path.startswith("/v2/") and isinstance(answer, Answer):
            registry.answers[path] = guarded(answer)
    return name


def token_for(authorization: str) -> Callable[[Request], Answer]:
    def answer(request: Request) -> Answer:
        given = request.headers.get("Authorization", "")
        return Answer(json.dumps({"token": TOKEN}).encode()) if given == authorization else Answer(status=401)

    return answer


def redirect(target: str, status: int = 302) -> Answer:
    return Answer(status=status, headers={"Location": target})


def forms(registry: ScriptedRegistry, path: str) -> list[dict[str, list[str]]]:
    return [parse_qs(request.body.decode()) for request in registry.requests(path) if request.method == "POST"]


def secrets_seen(registry: ScriptedRegistry) -> list[str]:
    return [text for request in registry.seen for text in request.headers.values() if text == BASIC] + [
        request.body.decode() for request in registry.seen if b"secret" in request.body
    ]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_token_server_that_redirects(node: Node, scripted: ScriptedRegistry, status: int) -> None:
    name = private_image(scripted)
    scripted.answers["/token"] = redirect("/there", status)
    scripted.answers["/there"] = token_for(BASIC)
    await node.puller.pull(name, SECRET)


async def test_credentials_are_not_sent_to_another_host_by_a_redirect(
    node: Node, scripted: ScriptedRegistry, other: ScriptedRegistry
) -> None:
    name = private_image(scripted)
    for status in (302, 307):
        scripted.answers["/token"] = redirect(f"{other.address}/token", status)
        other.answers["/token"] = Answer(status=401)
        with pytest.raises(PermissionDeniedError, match="refused access"):
            await node.puller.pull(name, SECRET)
        assert secrets_seen(scripted)
        other.answers["/token"] = token_for("")
        image = await node.puller.pull(name, SECRET)
        await node.store.remove(image.id)
        with pytest.raises(PermissionDeniedError, match="must not get") if status == 307 else nullcontext():
            await node.puller.pull(name, Credentials(identity_token="secret"))
        await node.store.remove(name)
    assert secrets_seen(other) == []


async def test_targets_of_redirects_get_anonymous_tokens(
    node: Node, scripted: ScriptedRegistry, other: ScriptedRegistry
) -> None:
    """Registries in front of a public one redirect every request to it, which demands its own tokens."""
    private_image(other, repository="public")
    other.answers["/token"] = token_for("")
    name = private_image(scripted, repository="public")
    scripted.answers["/token"] = token_for(BASIC)

    def redirected(answer: Callable[[Request], Answer]) -> Callable[[Request], Answer]:
        def inner(request: Request) -> Answer:
            own = answer(request)
            return own if own.status == 401 else redirect(f"{other.address}{request.target}", 307)

        return inner

    for path, answer in list(scripted.answers.items()):
        if path.startswith("/v2/") and callable(answer):
            scripted.answers[path] = redirected(answer)
    image = await node.puller.pull(name, SECRET)
    assert (len(scripted.requests("/token")), len(other.requests("/token"))) == (1, 1), "all requests share the tokens"
    assert (bool(secrets_seen(scripted)), secrets_seen(other)) == (True, [])
    await node.store.remove(image.id)
    other.answers["/token"] = token_for(BASIC)
    with pytest.raises(PermissionDeniedError, match=rf"{other.host} \(the target of a redirect\): .*refused"):
        await node.puller.pull(name, SECRET)
    assert secrets_seen(other) == []


async def test_a_token_server_that_accepts_only_post(node: Node, scripted: ScriptedRegistry) -> None:
    name = private_image(scripted)

    def post_only(request: Request) -> Answer:
        if request.method != "POST":
            return Answer(status=405)
        form = parse_qs(request.body.decode())
        good = form.get("grant_type") == ["password"] and form.get("password") == ["secret"]
        return Answer(json.dumps({"access_token": TOKEN}).encode()) if good else Answer(status=401)

    scripted.answers["/token"] = post_only
    await node.puller.pull(name, SECRET)
    (form,) = forms(scripted, "/token")
    assert form["username"] == ["user"]
    assert form["scope"] == ["repository:private:pull"]
    assert form["service"] == ["reg"]
    await node.store.remove(name)
    with pytest.raises(PermissionDeniedError, match="status 401"):
        await node.puller.pull(name, Credentials(username="user", password="wrong"))
    with pytest.raises(PermissionDeniedError, match="status 405"):
        await node.puller.pull(name)


async def test_a_token_server_that_answers_created(node: Node, scripted: ScriptedRegistry) -> None:
    name = private_image(scripted)
    scripted.answers["/token"] = Answer(json.dumps({"token": TOKEN}).encode(), status=201)
    await node.puller.pull(name, SECRET)


async def test_ten_redirects_are_followed(node: Node, scripted: ScriptedRegistry, other: ScriptedRegistry) -> None:
    name = private_image(scripted)
    scripted.answers["/token"] = token_for(BASIC)
    path = next(path for path in scripted.answers if "/blobs/" in path)
    content = small_image()[2][0]
    scripted.answers[path] = redirect(f"{other.address}/1", 307)
    for number in range(1, 10):
        other.answers[f"/{number}"] = redirect(f"/{number + 1}")
    other.answers["/10"] = Answer(content)
    await node.puller.pull(name, SECRET)
    assert all("Authorization" not in request.headers for request in other.seen)
    await node.store.remove(name)
    other.answers["/10"] = redirect("/1")
    with pytest.raises(KubeletReasonError, match="more than 10 redirects"):
        await node.puller.pull(name, SECRET)


@pytest.mark.parametrize(
    "location", ["", "http://[::1", "ftp://x/y", "http://a:99999/", "/\u00fc", "http://" + "a" * 99]
)
async def test_redirects_to_invalid_addresses(node: Node, scripted: ScriptedRegistry, location: str) -> None:
    name = scripted.offer_image("lost")
    scripted.answers["/v2/lost/manifests/latest"] = redirect(location)
    with pytest.raises(PodkeelError) as failed:
        await node.puller.pull(name)
    assert isinstance(failed.value, KubeletReasonError | PermissionDeniedError) or "not have" in failed.value.message


async def test_invalid_headers_are_ignored(node: Node, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("odd")
    plain = scripted.answers["/v2/odd/manifests/latest"]
    for challenge in ('Bearer realm="http://[::1"', "Bearer realm=x", 'Bearer realm="http://a:99999/"', "\xff=", ","):
        headers = {"WWW-Authenticate": challenge}
        scripted.answers["/v2/odd/manifests/latest"] = Answer(status=401, headers=headers)
        with pytest.raises(PermissionDeniedError):
            await node.puller.pull(name, SECRET)
    tries = iter([Answer(status=503, headers={"Retry-After": "\xb2"}), plain])
    scripted.answers["/v2/odd/manifests/latest"] = lambda _: next(tries)  # type: ignore[assignment,return-value]  # of two kinds
    await node.puller.pull(name)


async def test_the_registry_among_its_own_hosts_gets_the_pull_secret(node: Node, scripted: ScriptedRegistry) -> None:
    name = private_image(scripted)
    scripted.answers["/token"] = token_for(BASIC)
    folder = Path(node.options.registry_config_dir) / scripted.host
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'[host."{scripted.address}"]\ncapabilities = ["pull", "resolve"]\n')
    await node.puller.pull(name, SECRET)
    assert not scripted.requests("ns=")
    found = await node.puller.explain(name, SECRET)
    assert [answer.mirror for answer in found.hosts] == [False]


async def test_a_registry_among_its_own_hosts_can_be_pushed_to(node: Node, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("pushed")
    await node.puller.pull(name)
    folder = Path(node.options.registry_config_dir) / scripted.host
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'[host."{scripted.address}"]\n')
    scripted.answers["/v2/pushed/manifests/new"] = Answer(status=201)
    await node.exporter.push(name, f"{scripted.host}/pushed:new")
    assert [request.method for request in scripted.requests("/manifests/new")] == ["PUT"]


async def test_a_registry_without_a_valid_upload_address(node: Node, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("source")
    await node.puller.pull(name)
    for headers in ({}, {"Location": "http://[::1"}, {"Location": "file:///etc/passwd"}):
        scripted.answers["/v2/target/blobs/uploads/"] = Answer(status=202, headers=headers)
        with pytest.raises(UnavailableError, match="no valid address for the upload"):
            await node.exporter.push(name, f"{scripted.host}/target:new")


def authority(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A new certificate for 127.0.0.1, and a server's TLS context with it."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return certificate, context


@pytest.mark.parametrize("setting", ["ca", "skip_verify"])
async def test_a_host_s_authority_is_used_for_its_redirects(node: Node, tmp_path: Path, setting: str) -> None:
    certificate, context = authority(tmp_path, "test")
    with run_scripted_registry(tls=context) as registry, run_scripted_registry(tls=context) as storage:
        name = private_image(registry, f"{storage.address}/token")
        storage.answers["/token"] = token_for(BASIC)
        for path in [path for path in registry.answers if "/blobs/" in path]:
            storage.answers[path] = Answer(next(blob for blob in small_image()[2] if path.endswith(digest_of(blob))))
            registry.answers[path] = redirect(f"{storage.address}{path}", 307)
        folder = Path(node.options.registry_config_dir) / registry.host
        folder.mkdir(parents=True)
        line = f'ca = "{certificate}"' if setting == "ca" else "skip_verify = true"
        (folder / "hosts.toml").write_text(f'server = "{registry.address}"\n{line}\n')
        await node.puller.pull(name, SECRET)
        assert storage.requests("/blobs/")
        await node.store.remove(name)
        (folder / "hosts.toml").write_text(f'server = "{registry.address}"\n')
        with pytest.raises(KubeletReasonError, match="certificate"):
            await node.puller.pull(name, SECRET)


def deflate(content: bytes) -> bytes:
    machine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return machine.compress(content) + machine.flush()


@pytest.mark.parametrize(
    ("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", deflate)]
)
async def test_encoded_answers(
    node: Node, scripted: ScriptedRegistry, encoding: str, encode: Callable[[bytes], bytes]
) -> None:
    manifest, _, (config, _) = small_image()
    name = private_image(scripted)
    headers = {"Content-Encoding": encoding}
    for path in ("/v2/private/manifests/latest", f"/v2/private/blobs/{digest_of(config)}"):
        content = encode(manifest if "manifests" in path else config)
        scripted.answers[path] = Answer(content, OCI_MANIFEST, headers=headers)
    layer = next(path for path in scripted.answers if path.endswith(digest_of(small_image()[2][1])))
    scripted.answers["/token"] = Answer(encode(json.dumps({"token": TOKEN}).encode()), headers=headers)
    await node.puller.pull(name)
    assert {request.headers.get("Accept-Encoding") for request in scripted.seen} == {"identity"}
    assert scripted.requests(layer)
    await node.store.remove(name)
    scripted.answers["/v2/private/manifests/latest"] = Answer(b"\x1f\x8b broken", headers=headers)
    with pytest.raises(InvalidArgumentError, match="does not have its Content-Encoding"):
        await node.puller.pull(name)
    bomb = encode(b" " * (64 << 20))
    scripted.answers["/v2/private/manifests/latest"] = Answer(bomb, headers=headers)
    with pytest.raises(InvalidArgumentError, match="larger than 4194304 bytes"):
        await node.puller.pull(name)
    scripted.answers["/v2/private/manifests/latest"] = Answer(manifest, headers={"Content-Encoding": "br"})
    with pytest.raises(InvalidArgumentError, match="'br'"):
        await node.puller.pull(name)
    private_image(scripted)
    scripted.answers["/token"] = Answer(bomb, headers=headers)
    with pytest.raises(PermissionDeniedError, match="larger than 1048576 bytes"):
        await node.puller.pull(name)


async def test_bodies_declared_as_encoded_that_are_not(node: Node, scripted: ScriptedRegistry) -> None:
    manifest, _, _ = small_image()
    name = scripted.offer_image("plain")
    for path, answer in list(scripted.answers.items()):
        assert isinstance(answer, Answer)
        headers = {**answer.headers, "Content-Encoding": "gzip"}
        scripted.answers[path] = dataclasses.replace(answer, headers=headers)
    await node.puller.pull(f"{name.rpartition(':')[0]}@{digest_of(manifest)}")


@pytest.mark.parametrize("content", [b"user:secret", b"j\xfcrgen:gr\xfc\xdfe", b"\xff\xfe:\x80"])
async def test_auth_is_sent_to_the_token_server_unchanged(
    node: Node, scripted: ScriptedRegistry, content: bytes
) -> None:
    name = private_image(scripted)
    encoded = base64.b64encode(content).decode()
    scripted.answers["/token"] = token_for(f"Basic {encoded}")
    image = await node.puller.pull(name, Credentials(auth=f"{encoded[:4]}\r\n{encoded[4:]}\n"))
    await node.store.remove(image.id)
    scripted.answers["/token"] = lambda request: Answer(status=405 if request.method == "GET" else 401)
    with pytest.raises(PermissionDeniedError) as failed:
        await node.puller.pull(name, Credentials(auth=encoded))
    failed.value.message.encode()
    user, _, password = content.partition(b":")
    (request,) = [request for request in scripted.requests("/token") if request.method == "POST"]
    form = parse_qs(request.body.decode(), errors="surrogateescape")
    assert form["username"][0].encode(errors="surrogateescape") == user
    assert form["password"][0].encode(errors="surrogateescape") == password


async def test_an_interrupted_manifest_is_requested_again(node: Node, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("cut")
    manifest, kind, _ = small_image()
    headers = {"Content-Length": str(len(manifest))}
    tries = iter([Answer([manifest[:20]], kind, headers=headers), Answer(manifest, kind)])
    scripted.answers["/v2/cut/manifests/latest"] = lambda _: next(tries)
    await node.puller.pull(name)


async def test_slow_answers_have_a_time_limit(new_node: NewNode, scripted: ScriptedRegistry) -> None:
    node = await new_node(stall_seconds=1.5, slow_seconds=0.3, attempts=1)
    name = private_image(scripted)

    def trickle(_: Request) -> Answer:
        return Answer(bytes_in_time() for _ in range(600))

    def bytes_in_time() -> bytes:
        time.sleep(0.1)
        return b" "

    scripted.answers["/token"] = trickle
    with pytest.raises(KubeletReasonError, match="no answer in time"):
        await asyncio.wait_for(node.puller.pull(name), SOON)
    scripted.answers["/v2/private/manifests/latest"] = trickle
    with pytest.raises(KubeletReasonError, match="too slow"):
        await asyncio.wait_for(node.puller.pull(name), SOON)
    scripted.answers["/v2/private/manifests/latest"] = lambda request: dataclasses.replace(trickle(request), status=403)
    with pytest.raises(PermissionDeniedError, match="403"):
        await asyncio.wait_for(node.puller.pull(name), SOON)
