"""Signatures of images, as containers' policy.json asks for them."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec

from host.errors import KubeletReasonError
from images.oci.reference import parse
from images.options import ImageOptions
from images.signatures import lookaside
from images.signatures.policy import rule_for
from images.signatures.requirements import MatchExact, MatchRepository, RemapIdentity, matches
from tests.integration.images.conftest import Node
from tests.support import signing
from tests.support.image_builder import OCI_INDEX, descriptor, digest_of
from tests.support.scripted_registry import Answer, ScriptedRegistry, run_scripted_registry, small_image
from tests.support.signing import Authority, Log, attach, bundle, new_key, refer, signed

NewNode = Callable[..., Awaitable[Node]]
_EMAIL, _ISSUER = "signer@example.org", "https://accounts.example.org"
_REPOSITORY = {"type": "matchRepository"}


@dataclass
class Signed:
    """An image in a registry, a node with a policy, and a key that the policy accepts."""

    node: Node
    registry: ScriptedRegistry
    folder: Path
    reference: str
    digest: str
    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    repository: str = "team/app"

    def policy(self, *requirements: dict[str, Any], **scopes: Any) -> None:
        """Write the policy: for the image's registry, or for ``scopes``; everything else is rejected."""
        docker = scopes or {self.registry.host: list(requirements)}
        content = {"default": [{"type": "reject"}], "transports": {"docker": docker}}
        (self.folder / "policy.json").write_text(json.dumps(content))

    def by_key(self, key: ec.EllipticCurvePrivateKey | None = None, **members: Any) -> dict[str, Any]:
        """A requirement of the key."""
        data = base64.b64encode(signing.public_pem(key or self.key)).decode()
        return {"type": "sigstoreSigned", "keyData": data, **members}

    async def pull(self) -> str:
        return (await self.node.puller.pull(self.reference)).id

    async def refused(self) -> str:
        with pytest.raises(KubeletReasonError) as caught:
            await self.node.puller.pull(self.reference)
        assert caught.value.reason == "SignatureValidationFailed"
        assert f"image {self.reference} ({self.digest}): policy " in caught.value.message
        assert await self.node.leftovers() == {}
        return caught.value.message


@pytest.fixture
def registry() -> Iterator[ScriptedRegistry]:
    with run_scripted_registry() as running:
        yield running


@pytest.fixture
async def image(new_node: NewNode, registry: ScriptedRegistry, tmp_path: Path) -> Signed:
    policy, places = str(tmp_path / "policy.json"), str(tmp_path / "registries.d")
    node = await new_node(signature_policy=policy, registries_dir=places, attempts=1)
    manifest, kind, blobs = small_image()
    reference = registry.offer("team/app", manifest, kind, *blobs)
    return Signed(node, registry, tmp_path, reference, digest_of(manifest))


async def test_an_image_needs_a_signature_of_the_key(image: Signed) -> None:
    image.policy(image.by_key())
    assert "a signature is required, and there is none in its registry" in await image.refused()
    attach(image.registry, image.repository, image.digest, signed(image.key, image.digest, image.reference))
    image_id = await image.pull()
    # An image that the node has is verified again, by the policy of now.
    image.policy(image.by_key(new_key()))
    with pytest.raises(
        KubeletReasonError, match=r"its signature is not accepted: it was not made with the policy's key"
    ):
        await image.node.puller.pull(image.reference)
    image.policy({"type": "insecureAcceptAnything"})
    assert await image.pull() == image_id


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another digest", "it is a signature of another image, 'sha256:00"),
        ("another name", "it was signed as 'registry.example/other:1', which is not"),
        ("a changed document", "or its document was changed"),
        ("a document of another kind", "its signed document has the type 'atomic container signature'"),
        ("a document with more members", "its signed document cannot be read"),
        ("no signature", "it has no signature"),
        ("no base64", "its signature is not base64"),
        ("a repository without a tag", "which is not"),
    ],
)
async def test_signatures_that_do_not_count(image: Signed, what: str, words: str) -> None:
    layer = signed(image.key, image.digest, image.reference)
    annotation = "dev.cosignproject.cosign/signature"
    match what:
        case "another digest":
            layer = signed(image.key, f"sha256:{'0' * 64}", image.reference)
        case "another name":
            layer = signed(image.key, image.digest, "registry.example/other:1")
        case "a changed document":
            layer.content = layer.content.replace(b"null", b"{}")
        case "a document of another kind":
            layer.content = signing.payload(image.digest, image.reference, type="atomic container signature")
            layer.annotations[annotation] = signing.text(signing.sign(image.key, layer.content))
        case "a document with more members":
            layer.content = signing.payload(image.digest, image.reference, more=1)
            layer.annotations[annotation] = signing.text(signing.sign(image.key, layer.content))
        case "no signature":
            layer.annotations.clear()
        case "no base64":
            layer.annotations[annotation] = "%"
        case "a repository without a tag":
            layer = signed(image.key, image.digest, image.reference.rpartition(":")[0])
    attach(image.registry, image.repository, image.digest, layer)
    image.policy(image.by_key())
    assert words in await image.refused()


async def test_every_requirement_must_be_met_by_some_signature(image: Signed) -> None:
    other = new_key()
    image.policy(image.by_key(), image.by_key(other, signedIdentity=_REPOSITORY))
    name = image.reference.rpartition(":")[0]
    attach(image.registry, image.repository, image.digest, signed(other, image.digest, name))
    assert "sigstoreSigned keyData: its signature is not accepted" in await image.refused()
    layers = [signed(key, image.digest, found) for key, found in ((other, name), (image.key, image.reference))]
    attach(image.registry, image.repository, image.digest, *layers)
    await image.pull()
    found = await image.node.puller.verify(image.reference)
    assert [verdict.met for verdict in found.verdicts] == [True, True]
    assert found.policy == f"policy {image.folder}/policy.json, scope {image.registry.host}"


@pytest.mark.parametrize("by_tag", [False, True])
async def test_bundles_refer_to_the_image(image: Signed, by_tag: bool, new_node: NewNode) -> None:
    log = Log()
    key = base64.b64encode(signing.public_pem(log.key)).decode()
    image.policy(image.by_key(rekorPublicKeyData=key))
    refer(image.registry, image.repository, image.digest, bundle(image.key, image.digest), by_tag=by_tag)
    assert "it has no entry of a transparency log" in await image.refused()
    unnamed = bundle(image.key, image.digest, log=log)
    refer(image.registry, image.repository, image.digest, unnamed, by_tag=by_tag)
    assert "it names no image (images.accept_unnamed_signatures)" in await image.refused()
    named = bundle(image.key, image.digest, image.reference, log)
    refer(image.registry, image.repository, image.digest, named, by_tag=by_tag)
    await image.pull()
    refer(
        image.registry, image.repository, image.digest, bundle(image.key, f"sha256:{'0' * 64}", log=log), by_tag=by_tag
    )
    options = {"signature_policy": f"{image.folder}/policy.json", "accept_unnamed_signatures": True}
    lenient = await new_node(**options)
    with pytest.raises(KubeletReasonError, match="it is a signature of another image"):
        await lenient.puller.pull(image.reference)
    refer(image.registry, image.repository, image.digest, unnamed, by_tag=by_tag)
    await lenient.puller.pull(image.reference)


async def test_a_changed_bundle_is_refused(image: Signed) -> None:
    layer = bundle(image.key, image.digest, image.reference)
    document = json.loads(layer.content)
    statement = base64.b64decode(document["dsseEnvelope"]["payload"]).replace(b'"predicate": {}', b'"predicate":{} ')
    document["dsseEnvelope"]["payload"] = base64.b64encode(statement).decode()
    layer.content = json.dumps(document).encode()
    image.policy(image.by_key())
    refer(image.registry, image.repository, image.digest, layer)
    assert "or its document was changed" in await image.refused()


async def test_a_registry_without_lists_of_referrers(image: Signed) -> None:
    image.policy(image.by_key())
    for status in (404, 405, 501):
        image.registry.answers[f"/v2/{image.repository}/referrers/{image.digest}"] = Answer(status=status)
        assert "there is none in its registry" in await image.refused()


def fulcio(image: Signed, authority: Authority, log: Log, **members: str) -> dict[str, Any]:
    encoded = {"caData": authority.pem(), "rekorPublicKeyData": signing.public_pem(log.key)}
    data = {name: base64.b64encode(content).decode() for name, content in encoded.items()}
    identity = {"caData": data["caData"], "oidcIssuer": _ISSUER, "subjectEmail": _EMAIL, **members}
    return {"type": "sigstoreSigned", "fulcio": identity, "rekorPublicKeyData": data["rekorPublicKeyData"]}


def keyless(image: Signed, authority: Authority, log: Log, time: int = 0) -> signing.Layer:
    certificate = authority.issue(image.key, _EMAIL, _ISSUER, time or log.time - 60)
    content = signing.payload(image.digest, image.reference)
    signature = signing.sign(image.key, content)
    entry = json.dumps(log.of_signature(certificate, signature, content))
    annotations = {"certificate": certificate.decode(), "bundle": entry}
    told = {f"dev.sigstore.cosign/{name}": value for name, value in annotations.items()}
    return signing.Layer(content, {"dev.cosignproject.cosign/signature": signing.text(signature), **told})


async def test_certificates_of_fulcio(image: Signed) -> None:
    authority, log = Authority(), Log()
    attach(image.registry, image.repository, image.digest, keyless(image, authority, log))
    for requirement, words in (
        (fulcio(image, authority, log, subjectEmail="other@example.org"), f"is one of '{_EMAIL}', not of 'other@"),
        (fulcio(image, authority, log, oidcIssuer="https://else.example"), f"was issued for '{_ISSUER}', not"),
        (fulcio(image, Authority(), log), "no authority of the policy issued its certificate"),
        (fulcio(image, authority, Log()), "no transparency log of the policy signed its entry"),
    ):
        image.policy(requirement)
        assert words in await image.refused()
    image.policy(fulcio(image, authority, log))
    await image.pull()


@pytest.mark.parametrize("what", ["a later signature", "an entry of another", "a changed entry", "no entry"])
async def test_entries_of_the_log_that_do_not_count(image: Signed, what: str) -> None:
    authority, log = Authority(), Log()
    layer = keyless(image, authority, log, log.time - 3600 if what == "a later signature" else 0)
    name = "dev.sigstore.cosign/bundle"
    match what:
        case "a later signature":
            words = "its certificate is valid from"
        case "an entry of another":
            layer.annotations[name] = keyless(image, authority, log).annotations[name]
            words = "its entry of the transparency log is one of another signature"
        case "a changed entry":
            layer.annotations[name] = layer.annotations[name].replace(str(log.time), str(log.time + 1))
            words = "no transparency log of the policy signed its entry"
        case "no entry":
            del layer.annotations[name]
            words = "it has no entry of a transparency log"
    image.policy(fulcio(image, authority, log))
    attach(image.registry, image.repository, image.digest, layer)
    assert words in await image.refused()


async def test_a_signature_of_the_index_or_of_the_image(image: Signed, registry: ScriptedRegistry) -> None:
    manifest, kind, blobs = small_image()
    registry.offer("team/many", manifest, kind, *blobs, tag="one")
    platform = {"platform": {"os": "linux", "architecture": "amd64"}}
    entry = {**descriptor(kind, manifest), **platform}
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode()
    reference = registry.offer("team/many", index, OCI_INDEX)
    image.policy(image.by_key())
    for digest in (digest_of(manifest), digest_of(index)):
        attach(registry, "team/many", digest, signed(image.key, digest, reference))
        await image.node.puller.pull(reference)
        del registry.answers[f"/v2/team/many/manifests/{digest.replace(':', '-')}.sig"]
    with pytest.raises(KubeletReasonError, match="there is none"):
        await image.node.puller.pull(reference)


@pytest.fixture
def gpg(tmp_path: Path) -> Callable[..., bytes]:
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)

    def run(*words: str, stdin: bytes = b"") -> bytes:
        command = ["gpg", "--homedir", str(home), "--batch", "--pinentry-mode", "loopback", "--passphrase", "", *words]
        return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout

    run("--quick-generate-key", "signer", "rsa2048", "sign", "never")
    return run


async def test_simple_signatures_by_gpg(image: Signed, gpg: Callable[..., bytes]) -> None:
    key = image.folder / "key.asc"
    key.write_bytes(gpg("--armor", "--export", "signer"))
    image.policy({"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(key)})
    lookaside = image.folder / "lookaside"
    (image.folder / "registries.d").mkdir()
    (image.folder / "registries.d/test.yaml").write_text(
        json.dumps({"docker": {image.registry.host: {"lookaside": f"file://{lookaside}"}}})
    )
    assert f"signedBy {key}: a signature is required, and there is none at file://" in await image.refused()
    place = lookaside / f"team/app@{image.digest.replace(':', '=')}"
    place.mkdir(parents=True)
    document = signing.payload(image.digest, image.reference, type="atomic container signature")
    good = gpg("--sign", stdin=document)
    (place / "signature-1").write_bytes(document)
    assert "it is not a GPG signature with a document in it" in await image.refused()
    (place / "signature-2").write_bytes(good)
    await image.pull()
    assert gpg("--quick-generate-key", "other", "rsa2048", "sign", "never") == b""
    key.write_bytes(gpg("--export", "other"))
    with pytest.raises(KubeletReasonError, match="which the policy does not have"):
        await image.node.puller.pull(image.reference)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "the policy .* cannot be used: "),
        ('{"default": []}', "a list of requirements is empty"),
        ('{"default": [{"type": "reject"}], "more": 1}', "unknown field `more`"),
        ('{"default": [{"type": "reject"}], "default": [{"type": "reject"}]}', "'default' is there twice"),
        ('{"default": [{"type": "signedBaseLayer"}]}', "signedBaseLayer"),
        ('{"default": [{"type": "sigstoreSigned"}]}', "give exactly one of keyPath"),
        ('{"default": [{"type": "sigstoreSigned", "keyPath": "/nothing/here"}]}', "/nothing/here cannot be read"),
        ('{"default": [{"type": "sigstoreSigned", "keyData": "AAAA"}]}', "holds no public key"),
        ('{"default": [{"type": "reject"}]}', "default: reject: the policy accepts no such image"),
    ],
)
async def test_a_policy_that_cannot_be_used_refuses_everything(image: Signed, content: str, words: str) -> None:
    (image.folder / "policy.json").write_text(content)
    with pytest.raises(KubeletReasonError, match=words) as caught:
        await image.node.puller.pull(image.reference)
    assert caught.value.reason == "SignatureValidationFailed"


async def test_a_missing_policy_refuses_everything(image: Signed) -> None:
    with pytest.raises(KubeletReasonError, match=r"it is missing \(images.signature_policy\)"):
        await image.node.puller.pull(image.reference)


def test_the_closest_scope_holds(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    accept, reject = [{"type": "insecureAcceptAnything"}], [{"type": "reject"}]
    scopes = {
        "a.example.org:5000/team/app:1": accept,
        "a.example.org:5000/team/app": reject,
        "a.example.org:5000/team": accept,
        "*.example.org": reject,
        "docker.io/library/busybox": accept,
        "": reject,
    }
    path.write_text(json.dumps({"default": accept, "transports": {"docker": scopes, "atomic": {"": accept}}}))
    for name, scope in (
        ("a.example.org:5000/team/app:1", "scope a.example.org:5000/team/app:1"),
        ("a.example.org:5000/team/app:2", "scope a.example.org:5000/team/app"),
        (f"a.example.org:5000/team/app@sha256:{'0' * 64}", "scope a.example.org:5000/team/app"),
        ("a.example.org:5000/team/application", "scope a.example.org:5000/team"),
        ("a.example.org:5000/teams/app", "scope *.example.org"),
        ("b.example.org/x", "scope *.example.org"),
        ("busybox", "scope docker.io/library/busybox"),
        ("example.org/x", "default of docker"),
    ):
        rule = rule_for(ImageOptions(signature_policy=str(path)), parse(name))
        assert rule is not None
        assert rule.scope == scope, name


def test_identities() -> None:
    digest = f"sha256:{'0' * 64}"
    tagged, by_digest = parse("r.example/team/app:1"), parse(f"r.example/team/app@{digest}")
    assert matches(MatchExact(), tagged, "r.example/team/app:1")
    assert not matches(MatchExact(), by_digest, "r.example/team/app:1")
    assert not matches(MatchExact(), parse("r.example/a"), "r.example/a")
    assert matches(MatchRepository(), tagged, "r.example/team/app")
    assert not matches(MatchRepository(), tagged, "r.example/team/application")
    remap = RemapIdentity(prefix="r.example/team", signed_prefix="vendor.example")
    assert matches(remap, tagged, "vendor.example/app:1")
    assert not matches(remap, parse("r.example/teams/app:1"), "vendor.example/app:1")
    assert matches(remap, by_digest, "vendor.example/app:9")
    assert not matches(remap, by_digest, "vendor.example/app")


async def test_a_slow_place_of_signatures_has_a_limit_of_time_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookaside, "ALL_SECONDS", 0.5)
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        await asyncio.sleep(0.2)  # a slow answer, but not one that fails by itself
        return web.Response(body=b"signature")

    server = TestServer(web.Application())
    server.app.router.add_get("/{path:.*}", answer)
    async with server:
        place = f"http://{server.host}:{server.port}/sigs"
        with pytest.raises(KubeletReasonError, match=r"signature-\d: no answer in"):
            async for _ in lookaside.simple_signatures(place, parse("registry.example/a"), f"sha256:{'0' * 64}"):
                pass
    assert 1 <= len(asked) <= 3
