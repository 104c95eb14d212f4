from __future__ import annotations

import json

import pytest

from host.errors import InvalidArgumentError, PodkeelError, UnsupportedError
from images.image import check_linux, numeric_user, read_config
from images.oci.digests import chain_ids, digest_of, verify
from images.oci.layer_limit import MAX_LAYERS
from images.oci.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    PlatformFields,
    check_is_image,
    parse_manifest,
)

DIGEST = digest_of(b"x")
BLOB = {"mediaType": "", "digest": DIGEST, "size": 1}


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


IMAGE = {"schemaVersion": 2, "config": BLOB, "layers": [BLOB]}
INDEX = {"schemaVersion": 2, "manifests": [BLOB]}
LAYER = {**BLOB, "mediaType": "Application/vnd.oci.image.layer.v1.tar+gzip;a=b"}


@pytest.mark.parametrize(
    ("document", "claimed"),
    [
        ({**IMAGE, **INDEX}, ()),
        ({**INDEX, "layers": []}, ()),
        ({**INDEX, "config": BLOB}, ()),
        ({**IMAGE, "manifests": []}, ()),
        ({**IMAGE, "mediaType": OCI_INDEX}, ()),
        ({**INDEX, "mediaType": DOCKER_MANIFEST}, ()),
        (IMAGE, (OCI_INDEX,)),
        (INDEX, ("application/vnd.oci.image.manifest.v1+json; charset=utf-8",)),
        ({**IMAGE, "mediaType": OCI_MANIFEST}, (DOCKER_MANIFEST,)),
        ({**INDEX, "mediaType": OCI_INDEX}, (OCI_INDEX, DOCKER_LIST)),
        ({**IMAGE, "Manifests": [BLOB]}, ()),
        ({**INDEX, "LAYERS": [BLOB]}, ()),
    ],
)
def test_what_could_be_image_and_index_is_refused(document: object, claimed: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match="thing is ambiguous"):
        parse_manifest(json.dumps(document).encode(), "thing", *claimed)


def test_a_member_that_comes_twice_is_refused() -> None:
    content = json.dumps(IMAGE)[:-1] + f', "layers": [{json.dumps({**BLOB, "digest": digest_of(b"y")})}]}}'
    with pytest.raises(InvalidArgumentError, match="twice"):
        parse_manifest(content.encode(), "thing")
    double = '{"schemaVersion": 2, "layers": [], "config": {"digest": "%s", "digest": "%s", "size": 1}}'
    with pytest.raises(InvalidArgumentError, match="twice"):
        parse_manifest((double % (DIGEST, digest_of(b"y"))).encode(), "thing")


def test_what_says_its_type_in_one_way_is_taken() -> None:
    for claimed in ("application/json", "application/octet-stream", "text/plain", "", OCI_MANIFEST):
        assert not parse_manifest(json.dumps(IMAGE).encode(), "thing", claimed).is_index
    odd = {**IMAGE, "config": {**BLOB, "mediaType": f"{OCI_CONFIG}; charset=utf-8"}, "layers": [LAYER]}
    assert check_is_image(parse_manifest(json.dumps(odd).encode(), "thing"), "thing").digest == DIGEST
    typed = {**INDEX, "mediaType": OCI_INDEX}
    assert parse_manifest(json.dumps(typed).encode(), "thing", OCI_INDEX.upper(), "").is_index
    with pytest.raises(UnsupportedError, match="text/html"):
        parse_manifest(json.dumps({**IMAGE, "mediaType": "text/html"}).encode(), "thing")


def test_null_members_count_as_absent() -> None:
    nothing = {"mediaType": None, "annotations": None, "urls": None, "platform": None}
    layer = {**BLOB, **nothing, "annotations": {"a": None, "b": "c"}, "urls": [None]}
    document = {
        "schemaVersion": None,
        "mediaType": None,
        "manifests": None,
        "annotations": None,
        "subject": None,
        "config": {**BLOB, **nothing},
        "layers": [layer],
    }
    manifest = parse_manifest(json.dumps(document).encode(), "thing")
    assert manifest.config == Descriptor("", DIGEST, 1)
    assert manifest.layers == [Descriptor("", DIGEST, 1, None, {"a": "", "b": "c"}, [])]
    assert parse_manifest(json.dumps({**IMAGE, "layers": None}).encode(), "thing").layers == []
    platform = {"os": None, "architecture": "arm", "variant": None}
    index = {"schemaVersion": 2, "manifests": [None, {**BLOB, "platform": platform}], "config": None, "layers": None}
    assert parse_manifest(json.dumps(index).encode(), "thing").manifests == [
        Descriptor("", DIGEST, 1, PlatformFields("", "arm", ""))
    ]
    for wrong in ({**IMAGE, "layers": [None]}, {**IMAGE, "layers": [{**BLOB, "size": None}]}):
        with pytest.raises(InvalidArgumentError, match="thing"):
            parse_manifest(json.dumps(wrong).encode(), "thing")


def test_more_layers_than_can_be_mounted_are_refused() -> None:
    most = {**IMAGE, "layers": [BLOB] * MAX_LAYERS}
    assert len(parse_manifest(json.dumps(most).encode(), "thing").layers) == MAX_LAYERS
    for number in (MAX_LAYERS + 1, 25_000):
        more = {**IMAGE, "layers": [{**BLOB, "mediaType": OCI_MANIFEST}] * number}
        with pytest.raises(InvalidArgumentError, match=f"at most {MAX_LAYERS}"):
            parse_manifest(json.dumps(more).encode(), "thing")
    diff_ids = {"rootfs": {"diff_ids": [DIGEST] * (MAX_LAYERS + 1)}}
    with pytest.raises(InvalidArgumentError, match=f"at most {MAX_LAYERS}"):
        read_config(json.dumps(diff_ids).encode(), "thing")


def test_sizes_that_no_blob_has_are_refused() -> None:
    for size in (2**63, 2**64, 10**30):
        with pytest.raises(InvalidArgumentError, match="thing"):
            parse_manifest(json.dumps({**IMAGE, "layers": [{**BLOB, "size": size}]}).encode(), "thing")


@pytest.mark.parametrize("nested", ["[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000])
def test_nested_documents_are_refused(nested: str) -> None:
    for member in ("annotations", "layers", "config", "unknown"):
        with pytest.raises(InvalidArgumentError, match="thing"):
            parse_manifest(f'{{"schemaVersion": 2, "{member}": {nested}}}'.encode(), "thing")
        with pytest.raises(InvalidArgumentError, match="thing"):
            read_config(f'{{"{member}": {nested}}}'.encode(), "thing")


def test_configs() -> None:
    nothing = {"config": {"Env": None, "Cmd": None, "Labels": None, "Volumes": None, "User": None}, "rootfs": None}
    file = read_config(json.dumps(nothing).encode(), "thing")
    assert (file.config.env, file.config.cmd, file.diff_ids) == ((), (), ())
    assert read_config(b"{}", "thing").config.user == ""
    mistakes: tuple[object, ...] = (
        {"os": "windows"},
        {"config": {"Env": "A=1"}},
        {"config": {"Labels": {"a": 1}}},
        {"rootfs": {"diff_ids": ["sha256:zz"]}},
        {"rootfs": {"diff_ids": [None]}},
        {"config": {"User": "u" * 5000}},
        [],
    )
    for wrong in mistakes:
        with pytest.raises(PodkeelError, match="thing"):
            check_linux(read_config(json.dumps(wrong).encode(), "thing"), "thing")


def test_null_members_of_configs_count_as_absent() -> None:
    content = {
        "os": None,
        "architecture": None,
        "variant": None,
        "created": None,
        "history": None,
        "config": {
            "Env": [None, "A=1", ""],
            "Labels": {"a": None, "b": "c"},
            "Entrypoint": ["run", None],
            "Volumes": {"/data": None},
            "ExposedPorts": {"80/tcp": None},
            "StopSignal": None,
            "WorkingDir": None,
            "Healthcheck": None,
        },
        "rootfs": {"type": None, "diff_ids": None},
    }
    file = read_config(json.dumps(content).encode(), "thing")
    check_linux(file, "thing")
    config = file.config
    assert (config.env, config.entrypoint, config.volumes) == (("A=1",), ("run", ""), ("/data",))
    assert read_config(b'{"config": null}', "thing").config.user == ""


def test_names_of_members_of_configs_in_any_case() -> None:
    """As in Go. Otherwise an image would lose its command without an error."""
    content = {
        "OS": "linux",
        "Config": {"env": ["A=1"], "cmd": ["run"], "WORKINGDIR": "/w", "own": 1},
        "rootFS": {"Diff_Ids": [DIGEST]},
    }
    file = read_config(json.dumps(content).encode(), "thing")
    assert (file.config.env, file.config.cmd, file.config.working_dir) == (("A=1",), ("run",), "/w")
    assert (file.platform.os, file.diff_ids, file.digest) == ("linux", (DIGEST,), digest_of(file.content))
    twice = b'{"config": {"Cmd": ["first"], "cmd": ["last"]}}'
    assert read_config(twice, "thing").config.cmd == ("last",)


def test_numbers_of_users() -> None:
    assert [numeric_user(user) for user in ("0", "1000", "007", str(2**63 - 1))] == [0, 1000, 7, 2**63 - 1]
    for name in ("", "root", "-1", "1a", "\u0661", "\u00b2", str(2**63), "9" * 20, "9" * 5000):
        assert numeric_user(name) is None, name


def test_digests() -> None:
    verify(b"x", DIGEST, "it")
    verify(b"x", digest_of(b"x", "sha512:"), "it")
    with pytest.raises(InvalidArgumentError, match="it is broken"):
        verify(b"y", DIGEST, "it")
    first, second = digest_of(b"1"), digest_of(b"2")
    assert chain_ids((first, second)) == (first, digest_of(f"{first} {second}".encode()))
    assert chain_ids(()) == ()
