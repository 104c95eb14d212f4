"""Images in forms that some tools write: null members, indexes without platforms, attestations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.errors import InvalidArgumentError
from tests.integration.images.conftest import Node
from tests.support.image_builder import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, descriptor, digest_of
from tests.support.scripted_registry import ScriptedRegistry, run_scripted_registry, small_image

ATTESTATION = {"vnd.docker.reference.type": "attestation-manifest"}


@pytest.fixture
def scripted() -> Iterator[ScriptedRegistry]:
    with run_scripted_registry() as running:
        yield running


def image_for(scripted: ScriptedRegistry, repository: str, architecture: str) -> dict[str, object]:
    """Serve an image for that architecture. Returns its descriptor, without a platform."""
    manifest, kind, blobs = small_image({"architecture": architecture, "config": {"Cmd": [architecture]}})
    scripted.offer(repository, manifest, kind, *blobs, tag=architecture)
    return descriptor(kind, manifest)


def index_of(scripted: ScriptedRegistry, repository: str, *entries: dict[str, object]) -> str:
    content = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    return scripted.offer(repository, content, OCI_INDEX)


def attestation(scripted: ScriptedRegistry, repository: str) -> dict[str, object]:
    statement, config = b'{"_type": "https://in-toto.io/Statement/v0.1"}', b"{}"
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG, config),
        "layers": [descriptor("application/vnd.in-toto+json", statement)],
    }
    content = json.dumps(manifest).encode()
    scripted.offer(repository, content, OCI_MANIFEST, config, statement, tag="attestation")
    return descriptor(OCI_MANIFEST, content)


async def test_an_index_without_platforms(node: Node, scripted: ScriptedRegistry) -> None:
    arm, amd = (image_for(scripted, "plain", name) for name in ("arm64", "amd64"))
    for entries in ((arm, amd), (attestation(scripted, "plain"), arm, amd)):
        image = await node.puller.pull(index_of(scripted, "plain", *entries))
        assert image.config.cmd == ("amd64",)
        await node.store.remove(image.id)
    with pytest.raises(InvalidArgumentError, match=r"no image for linux/amd64; it has linux/arm64"):
        await node.puller.pull(index_of(scripted, "plain", arm))


async def test_an_attestation_comes_first(node: Node, scripted: ScriptedRegistry) -> None:
    amd = {**image_for(scripted, "attested", "amd64"), "platform": {"os": "linux", "architecture": "amd64"}}
    bare = attestation(scripted, "attested")
    for first in (bare, {**bare, "annotations": ATTESTATION}, {**bare, "platform": {"os": None, "variant": None}}):
        image = await node.puller.pull(index_of(scripted, "attested", first, amd))
        assert image.config.cmd == ("amd64",)
        await node.store.remove(image.id)


async def test_the_first_variant_of_amd64_is_amd64(node: Node, scripted: ScriptedRegistry) -> None:
    entry = image_for(scripted, "variant", "amd64")
    platform = {"os": "linux", "architecture": "amd64", "variant": "v1"}
    image = await node.puller.pull(index_of(scripted, "variant", {**entry, "platform": platform}))
    assert image.config.cmd == ("amd64",)


async def test_null_members(node: Node, scripted: ScriptedRegistry) -> None:
    config = {
        "architecture": None,
        "os": None,
        "variant": None,
        "history": None,
        "config": {"Labels": {"a": None}, "Env": [None, "A=1"], "User": None, "Entrypoint": None, "StopSignal": None},
    }
    manifest, kind, blobs = small_image(config, mediaType=None, annotations={"a": None}, subject=None)
    document = json.loads(manifest)
    document["layers"][0].update({"annotations": {"a": None}, "urls": None, "platform": None, "mediaType": None})
    image = await node.puller.pull(scripted.offer("null", json.dumps(document).encode(), kind, *blobs))
    assert (image.config.env, image.config.user) == (("A=1",), "")
    await node.restart()
    assert node.store.images() == (image,)
    await node.store.remove(image.id)
    empty = json.dumps({"rootfs": None, "config": None}).encode()
    manifest = json.dumps({"schemaVersion": 2, "config": descriptor(OCI_CONFIG, empty), "layers": None}).encode()
    image = await node.puller.pull(scripted.offer("null", manifest, OCI_MANIFEST, empty))
    assert (image.id, image.layers) == (digest_of(empty), ())


async def test_text_that_is_not_unicode(node: Node, scripted: ScriptedRegistry) -> None:
    """Bytes that are not UTF-8 and halves of surrogate pairs are replaced, as containerd does."""
    config = {
        "config": {"Labels": {"author": "LATIN"}, "Env": ["A=LATIN", "B=HALF"]},
        "history": [{"created_by": "HALF"}],
    }

    def odd(document: bytes) -> bytes:
        return document.replace(b"LATIN", b"Jos\xe9").replace(b"HALF", b"\\ud83d")

    _, kind, (encoded, layer) = small_image(config)
    encoded = odd(encoded)
    manifest = {
        "config": {**descriptor(OCI_CONFIG, encoded), "annotations": {"a": "LATIN"}},
        "layers": [{**descriptor(OCI_LAYER, layer), "annotations": {"HALF": "LATIN"}}],
    }
    name = scripted.offer("text", odd(json.dumps(manifest).encode()), kind, encoded, layer)
    image = await node.puller.pull(name)
    assert (image.id, image.config.env) == (digest_of(encoded), ("A=Jos\ufffd", "B=\ufffd"))
    await node.restart()
    assert node.store.images() == (image,)


async def test_layouts_with_odd_images_are_imported(node: Node, scripted: ScriptedRegistry, tmp_path: Path) -> None:
    folder = tmp_path / "layout"
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(content: bytes, media_type: str) -> dict[str, object]:
        (blobs / digest_of(content).removeprefix("sha256:")).write_bytes(content)
        return descriptor(media_type, content)

    entries = []
    for architecture in ("arm64", "amd64"):
        manifest, kind, (config, layer) = small_image({"architecture": architecture, "config": {"Labels": {"a": None}}})
        put(config, OCI_CONFIG)
        put(layer, OCI_LAYER)
        entries.append(put(manifest, kind))
    index = put(json.dumps({"schemaVersion": 2, "manifests": entries, "layers": None}).encode(), OCI_INDEX)
    top = {"schemaVersion": 2, "mediaType": None, "manifests": [{**index, "annotations": None}]}
    (folder / "index.json").write_text(json.dumps(top))
    (image,) = await node.puller.import_archive(folder, "localhost/odd:1")
    assert json.loads(await node.store.config_file(image))["architecture"] == "amd64"
    for wrong in ({**top, "layers": []}, {**top, "manifests": [{**index, "mediaType": OCI_MANIFEST}]}):
        (folder / "index.json").write_text(json.dumps(wrong))
        with pytest.raises(InvalidArgumentError, match="ambiguous"):
            await node.puller.import_archive(folder, "localhost/odd:2")
    for nested in ("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000):
        (folder / "index.json").write_text(f'{{"schemaVersion": 2, "manifests": {nested}}}')
        with pytest.raises(InvalidArgumentError, match="nests"):
            await node.puller.import_archive(folder, "localhost/odd:2")
        (folder / "manifest.json").write_text(nested)
        with pytest.raises(InvalidArgumentError, match="nests"):
            await node.puller.import_archive(folder, "localhost/odd:2")
        (folder / "manifest.json").unlink()
