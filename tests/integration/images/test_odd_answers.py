"""Registries with rare answers: old HTTP, chunks, missing headers, several challenges, relative redirects."""

from __future__ import annotations

import base64
import dataclasses
import email.utils
import gzip
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator

import pytest

from host.errors import InvalidArgumentError, PodkeelError, UnsupportedError
from images.oci.manifests import DOCKER_CONFIG, DOCKER_LIST, DOCKER_MANIFEST
from images.registry.credentials import Credentials
from tests.integration.images.conftest import Node
from tests.support.image_builder import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    descriptor,
    digest_of,
    entry,
    make_tar,
)
from tests.support.scripted_registry import Answer, Request, ScriptedRegistry, run_scripted_registry, small_image

SECRET = Credentials(username="user", password="secret")
BASIC = "Basic " + base64.b64encode(b"user:secret").decode()
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
AMD64 = {"os": "linux", "architecture": "amd64"}


@pytest.fixture
def scripted() -> Iterator[ScriptedRegistry]:
    with run_scripted_registry() as running:
        yield running


def every_answer(registry: ScriptedRegistry, change: Callable[[Answer], Answer | Callable[[Request], Answer]]) -> None:
    for path, answer in list(registry.answers.items()):
        if isinstance(answer, Answer):
            registry.answers[path] = change(answer)


def chunked(answer: Answer) -> Answer:
    assert isinstance(answer.body, bytes)
    pieces = [answer.body[begin : begin + 100] for begin in range(0, len(answer.body), 100)]
    framed = [b"%x;extension=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\nTrailer: x\r\n\r\n"]
    return dataclasses.replace(answer, body=framed, headers={**answer.headers, "Transfer-Encoding": "chunked"})


def old(answer: Answer) -> Answer:
    """Without a length: the body ends when the connection is closed."""
    assert isinstance(answer.body, bytes)
    return dataclasses.replace(answer, body=[answer.body], protocol="HTTP/1.0")


def bare(answer: Answer) -> Answer:
    return dataclasses.replace(answer, content_type="", headers={})


def encoded(answer: Answer) -> Answer:
    assert isinstance(answer.body, bytes)
    return dataclasses.replace(
        answer, body=gzip.compress(answer.body), headers={**answer.headers, "Content-Encoding": "gzip"}
    )


def unfinished(answer: Answer) -> Answer:
    """Everything is sent, but neither the last chunk nor the end of the response."""
    assert isinstance(answer.body, bytes)
    framed = [b"%x\r\n%s\r\n" % (len(answer.body), answer.body)]
    return dataclasses.replace(answer, body=framed, headers={**answer.headers, "Transfer-Encoding": "chunked"})


def non_authoritative(answer: Answer) -> Answer:
    return dataclasses.replace(answer, status=203)


def always_partial(answer: Answer) -> Answer:
    return dataclasses.replace(answer, status=206)


def long_headers(answer: Answer) -> Answer:
    return dataclasses.replace(answer, headers={**answer.headers, "Content-Security-Policy": "x" * 30_000})


def guarded(answer: Answer, challenges: str | list[str], authorization: str) -> Callable[[Request], Answer]:
    refusal = Answer(b"{}", status=401, headers={"WWW-Authenticate": challenges})
    return lambda request: answer if request.headers.get("Authorization") == authorization else refusal


def last(answers: list[Answer]) -> Callable[[Request], Answer]:
    """One answer after the other, then always the last one."""
    return lambda request: answers.pop(0) if len(answers) > 1 else answers[0]


FORMS = [
    chunked,
    old,
    bare,
    encoded,
    lambda answer: chunked(encoded(answer)),
    unfinished,
    non_authoritative,
    always_partial,
    long_headers,
]


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
async def test_other_forms_of_answers(node: Node, scripted: ScriptedRegistry, form: Callable[[Answer], Answer]) -> None:
    name = scripted.offer_image("forms")
    every_answer(scripted, form)
    image = await node.puller.pull(name)
    assert (await node.puller.pull(name)).id == image.id, "the second pull asks by HEAD"


async def test_layers_declared_as_encoded_that_are_not(node: Node, scripted: ScriptedRegistry) -> None:
    """Without a length, only the kind of the layer shows it."""
    manifest, kind, (config, layer) = small_image()
    compressed = gzip.compress(layer)
    document = {**json.loads(manifest), "layers": [descriptor(f"{OCI_LAYER}+gzip", compressed)]}
    name = scripted.offer("declared", json.dumps(document).encode(), kind, config, compressed)
    path = f"/v2/declared/blobs/{digest_of(compressed)}"
    answer = scripted.answers[path]
    assert isinstance(answer, Answer)
    scripted.answers[path] = chunked(dataclasses.replace(answer, headers={"Content-Encoding": "gzip"}))
    await node.puller.pull(name)


async def test_an_interrupted_encoded_layer_is_requested_from_its_start(node: Node, scripted: ScriptedRegistry) -> None:
    layer = make_tar([entry("random", random.Random(0).randbytes(200_000))])
    config = {"rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]}}
    manifest, kind, (encoded_config, _) = small_image(config, layers=[descriptor(OCI_LAYER, layer)])
    name = scripted.offer("cut", manifest, kind, encoded_config, layer)
    path, whole = f"/v2/cut/blobs/{digest_of(layer)}", gzip.compress(layer)
    headers = {"Content-Encoding": "gzip"}

    def answer(request: Request) -> Answer:
        begin = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if begin:
            extent = {"Content-Range": f"bytes {begin}-{len(whole) - 1}/{len(whole)}"}
            return Answer(whole[begin:], status=206, headers={**headers, **extent})
        if len(scripted.requests(path)) == 1:
            return Answer([whole[:100_000]], headers={**headers, "Content-Length": str(len(whole))})
        return Answer(whole, headers=headers)

    scripted.answers[path] = answer
    await node.puller.pull(name)
    assert ["Range" in request.headers for request in scripted.requests(path)] == [False, True, False]


async def test_a_redirect_to_a_long_address(node: Node, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("far")
    path = next(path for path in scripted.answers if "/blobs/" in path)
    scripted.answers["/storage"] = scripted.answers[path]
    scripted.answers[path] = Answer(status=307, headers={"Location": f"/storage?signature={'s' * 12_000}"})
    await node.puller.pull(name)
    assert scripted.requests("/storage")


async def test_an_interrupted_old_answer_is_requested_again(node: Node, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("cut")

    def cut_once(answer: Answer) -> Callable[[Request], Answer]:
        assert isinstance(answer.body, bytes)
        return last([old(dataclasses.replace(answer, body=answer.body[:-30])), old(answer)])

    for path, answer in list(scripted.answers.items()):
        if (
            "/blobs/" in path
            and isinstance(answer, Answer)
            and isinstance(answer.body, bytes)
            and len(answer.body) > 5000
        ):
            scripted.answers[path] = cut_once(answer)
    await node.puller.pull(name)


@pytest.mark.parametrize("status", [429, 408, 500, 502, 503, 504])
async def test_transient_errors_are_retried_for_every_request(
    node: Node, scripted: ScriptedRegistry, status: int
) -> None:
    name = scripted.offer_image("busy")
    soon = email.utils.formatdate(time.time(), usegmt=True)
    for after in ("0", soon, ""):
        refusal = Answer(b"<html>busy</html>", "text/html", status, {"Retry-After": after} if after else {})
        answers = dict(scripted.answers)
        every_answer(scripted, lambda answer, refusal=refusal: last([refusal, answer]))  # type: ignore[misc]  # mypy cannot infer it
        image = await node.puller.pull(name)
        await node.store.remove(image.id)
        scripted.answers = answers


async def test_retry_after_of_a_token_server_is_followed(
    node: Node, scripted: ScriptedRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[int, str]] = []

    async def back_off(failures: int, retry_after: str = "") -> None:
        waits.append((failures, retry_after))

    monkeypatch.setattr("images.registry.connection.back_off", back_off)
    name = scripted.offer_image("private")
    challenge = f'Bearer realm="{scripted.address}/token"'
    every_answer(scripted, lambda answer: guarded(answer, challenge, "Bearer t"))
    busy = Answer(status=429, headers={"Retry-After": "7"})
    scripted.answers["/token"] = last([busy, Answer(status=503), Answer(b'{"token": "t"}')])
    await node.puller.pull(name)
    assert waits == [(1, "7"), (2, "")]


@pytest.mark.parametrize(
    "challenges",
    [
        'Negotiate, Basic realm="r"',
        ["Negotiate", 'basic REALM="r"'],
        ["Bearer", 'Basic realm="r, Bearer realm=\\"x\\""'],
        'NTLM, Negotiate abc==, Digest realm="a, b", qop="auth,auth-int", Basic realm=r',
        ', Basic realm="r" ,',
    ],
)
async def test_several_challenges_with_a_password(
    node: Node, scripted: ScriptedRegistry, challenges: str | list[str]
) -> None:
    name = scripted.offer_image("private")
    every_answer(scripted, lambda answer: guarded(answer, challenges, BASIC))
    await node.puller.pull(name, SECRET)


@pytest.mark.parametrize(
    "form",
    [
        'Basic realm="r", Bearer realm="{}/token",service="a, b"',
        'Bearer service="a, b", realm="{}/token", Basic realm="r"',
        'Negotiate, BEARER Realm="{}/token" , Service="a, b"',
        'bearer realm={}/token,service="a, b"',
        'Bearer error="none", Bearer realm="{}/token",service="a, b",scope="repository:a:pull repository:b:pull,push"',
    ],
)
async def test_several_challenges_with_a_token(node: Node, scripted: ScriptedRegistry, form: str) -> None:
    name = scripted.offer_image("private")
    every_answer(scripted, lambda answer: guarded(answer, form.format(scripted.address), "Bearer t"))
    scripted.answers["/token"] = Answer(b'{"token": "t"}')
    await node.puller.pull(name, SECRET)
    (asked,) = scripted.requests("/token")
    assert asked.headers["Authorization"] == BASIC
    assert "service=a%2C+b" in asked.target
    assert ("scope=repository%3Ab%3Apull%2Cpush" in asked.target) == ("scope" in form)


@pytest.mark.parametrize(
    "location", ["../../there", "/there", "//HOST/there", "?there=1", "there/../../../there", "./x#y"]
)
async def test_redirects_to_relative_places(node: Node, scripted: ScriptedRegistry, location: str) -> None:
    name = scripted.offer_image("moved")
    for path, answer in list(scripted.answers.items()):
        assert isinstance(answer, Answer)
        place = location.replace("HOST", scripted.host)

        def moved(request: Request, answer: Answer = answer, place: str = place) -> Answer:
            return answer if "there" in request.target else Answer(status=307, headers={"Location": place})

        scripted.answers[path] = moved
    for path in ("/v2/there", "/v2/moved/there", "/there", "/v2/moved/blobs/x", "/v2/moved/manifests/x"):
        scripted.answers[path] = Answer(status=404)
    if location == "?there=1":
        await node.puller.pull(name)
    else:  # all redirects have the same target, so the error is the one of that target
        with pytest.raises(PodkeelError, match="does not have"):
            await node.puller.pull(name)


async def test_digests_with_sha512(node: Node, scripted: ScriptedRegistry) -> None:
    def long(kind: str, content: bytes) -> dict[str, object]:
        return {**descriptor(kind, content), "digest": f"sha512:{hashlib.sha512(content).hexdigest()}"}

    config, layer = small_image()[2]
    manifest = {"schemaVersion": 2, "config": long(OCI_CONFIG, config), "layers": [long(OCI_LAYER, layer)]}
    content = json.dumps(manifest).encode()
    digest = f"sha512:{hashlib.sha512(content).hexdigest()}"
    for path, body in ((f"manifests/{digest}", content), ("manifests/" + "t" * 128, content)):
        said = {"Docker-Content-Digest": digest}
        scripted.answers[f"/v2/long/{path}"] = Answer(body, OCI_MANIFEST, headers=said)
    for kind, body in ((OCI_CONFIG, config), (OCI_LAYER, layer)):
        scripted.answers[f"/v2/long/blobs/{long(kind, body)['digest']}"] = Answer(body)
    tag = f"{scripted.host}/long:{'t' * 128}"
    image = await node.puller.pull(tag)
    assert image.repo_tags == (tag,)
    assert image.repo_digests == (f"{scripted.host}/long@{digest}",)
    both = await node.puller.pull(f"{tag}@{digest}")
    assert (both.id, both.manifest_digest) == (image.id, digest)
    await node.store.remove(image.id)
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    scripted.answers[f"/v2/long/manifests/{wrong}"] = Answer(content, OCI_MANIFEST)
    with pytest.raises(InvalidArgumentError, match="is broken"):
        await node.puller.pull(f"{scripted.host}/long@{wrong}")


async def test_a_tag_beside_a_digest_is_not_requested(node: Node, scripted: ScriptedRegistry) -> None:
    scripted.offer_image("both")
    digest = digest_of(small_image()[0])
    image = await node.puller.pull(f"{scripted.host}/both:other@{digest}")
    assert image.repo_tags == ()
    assert not scripted.requests("manifests/other")
    assert node.store.find(f"{scripted.host}/both:other@{digest}") is not None


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", [DOCKER_LIST, OCI_INDEX])
async def test_lists_within_lists(node: Node, scripted: ScriptedRegistry, kind: str, said: bool) -> None:
    """Docker's media types. The member mediaType may be missing, and the type may have parameters."""
    config, layer = small_image()[2]
    manifest = {
        "schemaVersion": 2,
        "config": descriptor(DOCKER_CONFIG, config),
        "layers": [descriptor(f"{DOCKER_LAYER}.gzip", gzip.compress(layer))],
    }
    content = json.dumps(manifest | ({"mediaType": DOCKER_MANIFEST} if said else {})).encode()
    header = f"{DOCKER_MANIFEST}; charset=utf-8"
    scripted.offer("lists", content, header, config, gzip.compress(layer), tag="plain")
    entry = {**descriptor(DOCKER_MANIFEST, content), "platform": {**AMD64, "features": ["sse4"], "os.version": "1"}}
    arm = {**entry, "platform": {"os": "linux", "architecture": "arm", "variant": "v7"}}
    inner = json.dumps({"schemaVersion": 2, "manifests": [arm, entry]} | ({"mediaType": kind} if said else {})).encode()
    scripted.offer("lists", inner, f"{kind}; charset=utf-8", tag="inner")
    outer = json.dumps({"schemaVersion": 2, "manifests": [descriptor(kind, inner)]}).encode()
    image = await node.puller.pull(scripted.offer("lists", outer, kind))
    assert image.manifest_digest == digest_of(content)
    assert image.repo_digests == (f"{scripted.host}/lists@{digest_of(outer)}",)


@pytest.mark.parametrize("packed", [gzip.compress, bytes])
@pytest.mark.parametrize(
    "kind", [OCI_LAYER, f"{OCI_LAYER}+gzip", f"{OCI_LAYER}+zstd", DOCKER_LAYER, f"{DOCKER_LAYER}.gzip", ""]
)
async def test_the_first_bytes_of_a_layer_select_the_decompressor(
    node: Node, scripted: ScriptedRegistry, kind: str, packed: Callable[[bytes], bytes]
) -> None:
    config, layer = small_image()[2]
    layers = [descriptor(kind, packed(layer))]
    content = json.dumps({"schemaVersion": 2, "config": descriptor(OCI_CONFIG, config), "layers": layers}).encode()
    await node.puller.pull(scripted.offer("packed", content, OCI_MANIFEST, config, packed(layer)))


async def test_images_that_cannot_be_unpacked_are_reported(node: Node, scripted: ScriptedRegistry) -> None:
    config, layer = small_image()[2]
    good = descriptor(OCI_LAYER, layer)
    foreign = descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", layer)
    documents: list[tuple[dict[str, object], str, str]] = [
        ({"layers": [good, good]}, OCI_MANIFEST, "2 layers.*1"),
        ({"layers": []}, OCI_MANIFEST, "0 layers.*1"),
        ({"layers": [{**foreign, "urls": ["https://elsewhere.example/layer"]}]}, OCI_MANIFEST, "outside the registry"),
        ({"layers": [{**good, "mediaType": f"{OCI_LAYER}+gzip+encrypted"}]}, OCI_MANIFEST, "encrypted"),
        ({"schemaVersion": 1, "fsLayers": []}, "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
        ({"schemaVersion": 1, "fsLayers": [], "history": []}, "application/json", "schema 1"),
    ]
    for number, (members, kind, words) in enumerate(documents):
        document = {"schemaVersion": 2, "config": descriptor(OCI_CONFIG, config), **members}
        name = scripted.offer(f"odd{number}", json.dumps(document).encode(), kind, config, layer)
        with pytest.raises((InvalidArgumentError, UnsupportedError), match=words):
            await node.puller.pull(name)
    assert await node.leftovers() == {}
