from __future__ import annotations

import json

import pytest

from host.errors import InvalidArgumentError, PodkeelError, UnsupportedError
from images.digests import chain_ids, digest_of, verify
from images.image import parse_config
from images.manifests import OCI_INDEX, OCI_MANIFEST, check_is_image, choose, parse_manifest
from images.platforms import Platform, suitability, this_machine

DIGEST = digest_of(b"x")
BLOB = {"mediaType": "", "digest": DIGEST, "size": 1}


def index(*platforms: tuple[str, str, str]) -> bytes:
    manifests = [
        {
            "mediaType": OCI_MANIFEST,
            "digest": digest_of("/".join(platform).encode()),
            "size": 1,
            "platform": dict(zip(("os", "architecture", "variant"), platform, strict=True)),
        }
        for platform in platforms
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()


def chosen(machine: Platform, *platforms: tuple[str, str, str]) -> str:
    descriptor = choose(parse_manifest(index(*platforms), "it"), machine, "it")
    names = {digest_of("/".join(platform).encode()): "/".join(platform) for platform in platforms}
    return names[descriptor.digest]


def test_the_best_platform_is_chosen() -> None:
    v7 = Platform("linux", "arm", "v7")
    offered = [("linux", "arm", "v5"), ("linux", "arm", "v6"), ("linux", "arm64", "v8"), ("windows", "arm", "v7")]
    assert chosen(v7, *offered) == "linux/arm/v6"
    assert chosen(v7, *offered, ("linux", "arm", "v7")) == "linux/arm/v7"
    assert chosen(Platform("linux", "amd64"), ("linux", "amd64", "v3"), ("linux", "amd64", "")) == "linux/amd64/"
    assert chosen(Platform("linux", "arm64", "v8"), ("linux", "arm64", "")) == "linux/arm64/"
    with pytest.raises(InvalidArgumentError, match="it has linux/arm/v7"):
        chosen(Platform("linux", "arm", "v6"), ("linux", "arm", "v7"))
    with pytest.raises(InvalidArgumentError, match="none"):
        chosen(v7)
    assert suitability(this_machine(), this_machine()) == 100


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"schemaVersion": 3}',
        b'{"schemaVersion": 2}',
        b'\xff{"schemaVersion": 2}',
        json.dumps({"schemaVersion": 2, "config": {"digest": "sha256:12", "size": 1}}).encode(),
        json.dumps({"schemaVersion": 2, "config": {"digest": DIGEST}}).encode(),
        json.dumps({"schemaVersion": 2, "config": {"digest": DIGEST, "size": -5}}).encode(),
        json.dumps({"schemaVersion": 2, "config": BLOB, "layers": [{"digest": "../../x", "size": 1}]}).encode(),
        json.dumps({"schemaVersion": 2, "manifests": [{"digest": "x", "size": 1}]}).encode(),
    ],
)
def test_malformed_manifests_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="thing"):
        parse_manifest(content, "thing")


def test_schema_1_is_refused_by_its_name() -> None:
    with pytest.raises(UnsupportedError, match="schema 1"):
        parse_manifest(b'{"schemaVersion": 1}', "thing")
    with pytest.raises(UnsupportedError, match="schema 1"):
        parse_manifest(b"{}", "thing", "application/vnd.docker.distribution.manifest.v1+prettyjws")


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "urls": ["http://x"]}, "outside"),
        ({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"}, "encrypted"),
        ({"mediaType": "text/plain"}, "not a layer"),
    ],
)
def test_layers_that_cannot_be_unpacked(layer: dict[str, object], words: str) -> None:
    manifest = {"schemaVersion": 2, "config": BLOB, "layers": [{**BLOB, **layer}]}
    with pytest.raises(UnsupportedError, match=words):
        check_is_image(parse_manifest(json.dumps(manifest).encode(), "thing"), "thing")


def test_configs() -> None:
    nothing = {"config": {"Env": None, "Cmd": None, "Labels": None, "Volumes": None, "User": None}, "rootfs": None}
    config, diff_ids = parse_config(json.dumps(nothing).encode(), "thing")
    assert (config.env, config.cmd, config.labels, diff_ids) == ((), (), {}, ())
    assert parse_config(b"{}", "thing")[0].user == ""
    mistakes: tuple[object, ...] = (
        {"os": "windows"},
        {"config": {"Env": "A=1"}},
        {"rootfs": {"diff_ids": ["sha256:zz"]}},
        [],
    )
    for wrong in mistakes:
        with pytest.raises(PodkeelError, match="thing"):
            parse_config(json.dumps(wrong).encode(), "thing")


def test_digests() -> None:
    verify(b"x", DIGEST, "it")
    verify(b"x", digest_of(b"x", "sha512:"), "it")
    with pytest.raises(InvalidArgumentError, match="it is broken"):
        verify(b"y", DIGEST, "it")
    first, second = digest_of(b"1"), digest_of(b"2")
    assert chain_ids((first, second)) == (first, digest_of(f"{first} {second}".encode()))
    assert chain_ids(()) == ()
