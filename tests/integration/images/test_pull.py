from __future__ import annotations

import asyncio
import base64
import dataclasses
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zstandard

from host import stages
from host.errors import (
    InvalidArgumentError,
    KubeletReasonError,
    NotFoundError,
    PermissionDeniedError,
    PodkeelError,
    UnsupportedError,
)
from images.registry.credentials import Credentials
from tests.integration.images.conftest import Node
from tests.support.agent import SOON
from tests.support.image_builder import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    BuiltImage,
    descriptor,
    digest_of,
    entry,
    make_tar,
)
from tests.support.registry import Registry, run_registry

NewNode = Callable[..., Awaitable[Node]]


def small(text: str, **config: object) -> BuiltImage:
    return BuiltImage((make_tar([entry("etc/base", "base")]), make_tar([entry("etc/text", text)])), config)


async def test_a_pulled_image_is_found_by_every_form_of_reference(
    node: Node, registry: Registry, busybox: BuiltImage
) -> None:
    name = registry.push(busybox, "forms/busybox", "1.35")
    image = await node.puller.pull(name)
    assert image.id == busybox.id
    assert image.config.cmd == ("sh",)
    assert image.config.user == "1000"
    assert image.repo_tags == (name,)
    manifest_digest = digest_of(busybox.blobs()[1])
    assert image.repo_digests == (f"{registry.host}/forms/busybox@{manifest_digest}",)
    assert image.manifest_digest == manifest_digest
    assert image.size > 1_000_000
    hexadecimal = image.id.removeprefix("sha256:")
    repository = name.rpartition(":")[0]
    for form in (image.id, hexadecimal, hexadecimal[:12], name, image.repo_digests[0], f"{name}@{manifest_digest}"):
        assert node.store.find(form) == image, form
    for form in (repository, f"{repository}@{digest_of(b'other')}", "0" * 64, "busybox"):
        assert node.store.find(form) is None, form


async def test_a_pull_survives_a_restart_and_a_removal_leaves_nothing(node: Node, registry: Registry) -> None:
    image = await node.puller.pull(registry.push(small("one"), "restart/one"))
    usage = node.store.filesystem_usage()
    await node.restart()
    assert node.store.images() == (image,)
    assert node.store.filesystem_usage() == usage
    revision = node.store.revision
    await asyncio.gather(*(node.store.remove(image.repo_tags[0]) for _ in range(5)))
    assert node.store.images() == ()
    assert node.store.revision > revision
    assert node.store.filesystem_usage().used_bytes == 0
    assert node.store.filesystem_usage().inodes_used == 0
    assert await node.leftovers() == {}


async def test_counts_match_the_disk(node: Node, registry: Registry, busybox: BuiltImage) -> None:
    await node.puller.pull(registry.push(busybox, "counts/busybox"))
    (layer,) = [path for path in (node.data / "layers").iterdir() if path.name != "0"]
    found = [path.lstat() for path in (layer / "fs", *(layer / "fs").rglob("*"))]
    blobs = list((node.data / "content" / "sha256").iterdir())
    usage = node.store.filesystem_usage()
    assert usage.inodes_used == len(found) + len(blobs)
    assert usage.used_bytes == sum(s.st_blocks * 512 for s in found) + sum(path.stat().st_size for path in blobs)


async def test_layers_are_shared_and_fetched_once(node: Node, registry: Registry) -> None:
    first = await node.puller.pull(registry.push(small("one"), "shared/one"))
    used = node.store.filesystem_usage().used_bytes
    second = await node.puller.pull(registry.push(small("two"), "shared/two"))
    assert first.layers[0] == second.layers[0]
    assert first.layers[1] != second.layers[1]
    assert node.store.filesystem_usage().used_bytes < 2 * used
    await node.store.remove(first.id)
    assert (node.data / "layers" / str(second.layers[0]) / "fs/etc/base").read_text() == "base"


async def test_blobs_need_not_be_kept(new_node: NewNode, registry: Registry) -> None:
    node = await new_node(keep_blobs=False)
    image = await node.puller.pull(registry.push(small("unkept"), "unkept"))
    assert list((node.data / "content/sha256").iterdir()) == []
    assert list((node.data / "content/incoming").iterdir()) == []
    await node.store.remove(image.id)
    assert await node.leftovers() == {}


async def test_a_pull_by_digest_keeps_no_tag(node: Node, registry: Registry) -> None:
    built = small("by digest")
    name = registry.push(built, "digest/only", "v1")
    digest = digest_of(built.blobs()[1])
    image = await node.puller.pull(f"{name}@{digest}")
    assert image.repo_tags == ()
    assert image.repo_digests == (f"{registry.host}/digest/only@{digest}",)
    assert await node.puller.pull(image.repo_digests[0]) == image


async def test_a_moved_tag_is_removed_from_the_old_image(node: Node, registry: Registry) -> None:
    name = registry.push(small("old"), "moving")
    old = await node.puller.pull(name)
    assert await node.puller.pull(name) == old
    registry.push(small("new"), "moving")
    new = await node.puller.pull(name)
    assert new.id != old.id
    assert new.repo_tags == (name,)
    left = node.store.find(old.id)
    assert left is not None
    assert left.repo_tags == ()
    assert left.repo_digests == old.repo_digests
    await node.restart()
    assert node.store.find(name) == new
    assert node.store.find(old.id) == left


async def test_removing_by_one_tag_removes_all_tags(node: Node, registry: Registry) -> None:
    built = small("many names")
    names = [
        registry.push(built, "names/a", "1"),
        registry.push(built, "names/a", "2"),
        registry.push(built, "names/b"),
    ]
    for name in names:
        await node.puller.pull(name)
    (image,) = node.store.images()
    assert sorted(image.repo_tags) == sorted(names)
    assert len(image.repo_digests) == 2
    await node.store.remove(names[2])
    assert node.store.images() == ()
    assert node.store.find(names[0]) is None


async def test_identical_pulls_are_one(node: Node, registry: Registry, busybox: BuiltImage) -> None:
    name = registry.push(busybox, "joined")
    images = await asyncio.gather(*(node.puller.pull(name) for _ in range(8)))
    assert len(set(map(id, images))) == 1


async def test_different_images_with_the_same_layers_pulled_at_once_share_them(node: Node, registry: Registry) -> None:
    names = [registry.push(small(f"together {n}"), f"together/{n}") for n in range(6)]
    images = await asyncio.gather(*map(node.puller.pull, names))
    assert len({image.layers[0] for image in images}) == 1
    for image in images:
        await node.store.remove(image.id)
    assert await node.leftovers() == {}


async def test_an_index_gives_the_image_of_this_machine(node: Node, registry: Registry) -> None:
    mine, other = small("mine"), dataclasses.replace(small("theirs"), architecture="s390x")
    entries = []
    for built, architecture in ((other, "s390x"), (mine, json.loads(mine.blobs()[0][mine.id])["architecture"])):
        blobs, manifest = built.blobs()
        for digest, blob in blobs.items():
            registry.push_blob("indexed", digest, blob)
        registry.push_manifest("indexed", digest_of(manifest), manifest, OCI_MANIFEST)
        entries.append(
            {**descriptor(OCI_MANIFEST, manifest), "platform": {"os": "linux", "architecture": architecture}}
        )
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    registry.push_manifest("indexed", "latest", index, OCI_INDEX)
    image = await node.puller.pull(f"{registry.host}/indexed")
    assert image.id == mine.id
    assert image.repo_digests == (f"{registry.host}/indexed@{digest_of(index)}",)
    only_others = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries[:1]}).encode()
    registry.push_manifest("indexed", "others", only_others, OCI_INDEX)
    with pytest.raises(InvalidArgumentError, match=r"no image for linux/.* it has linux/s390x"):
        await node.puller.pull(f"{registry.host}/indexed:others")


async def test_docker_schema_2_zstd_and_plain_layers(node: Node, registry: Registry) -> None:
    built = small("docker form", Entrypoint=["/bin/x"])
    blobs, manifest = built.blobs()
    docker = manifest.replace(OCI_MANIFEST.encode(), b"application/vnd.docker.distribution.manifest.v2+json")
    docker = docker.replace(OCI_CONFIG.encode(), b"application/vnd.docker.container.image.v1+json")
    docker = docker.replace(b"vnd.oci.image.layer.v1.tar+gzip", b"vnd.docker.image.rootfs.diff.tar.gzip")
    for digest, blob in blobs.items():
        registry.push_blob("docker", digest, blob)
    registry.push_manifest("docker", "latest", docker, "application/vnd.docker.distribution.manifest.v2+json")
    image = await node.puller.pull(f"{registry.host}/docker")
    assert image.id == built.id
    frames = zstandard.ZstdCompressor(3)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # a skippable frame, as in zstd:chunked
    zstd = dataclasses.replace(small("zstd"), compress=lambda data: frames.compress(data) + skippable, suffix="+zstd")
    plain = dataclasses.replace(small("plain"), compress=None)
    for built in (zstd, plain):
        image = await node.puller.pull(registry.push(built, "formats"))
        text = (node.data / "layers" / str(image.layers[1]) / "fs/etc/text").read_text()
        assert image.id == built.id
        assert text in ("zstd", "plain")


async def test_estargz_is_an_ordinary_layer(node: Node, registry: Registry) -> None:
    """Its gzip stream has one member per file, one with a table of contents, and an empty one with its offset."""

    def members(data: bytes) -> bytes:
        step = 1500
        parts = [gzip.compress(data[begin : begin + step]) for begin in range(0, len(data), step)]
        return b"".join((*parts, gzip.compress(b"")))

    contents = [
        entry("etc/text", "stargz " * 1000),
        entry(".no.prefetch.landmark", "\x0f"),
        entry("stargz.index.json", "{}"),
    ]
    built = BuiltImage((make_tar(contents),), compress=members)
    image = await node.puller.pull(registry.push(built, "estargz"))
    assert image.id == built.id
    assert (node.data / "layers" / str(image.layers[0]) / "fs/etc/text").read_text() == "stargz " * 1000


async def test_cancelling_the_last_waiter_cancels_the_pull(node: Node, registry: Registry, busybox: BuiltImage) -> None:
    name = registry.push(busybox, "abandoned")
    reached = asyncio.Event()

    async def hang_at_the_commit(point: str) -> None:
        if point == "PullImage.commit:before":
            reached.set()
            await asyncio.Event().wait()

    with stages.faults_of(hang_at_the_commit):
        pulls = [asyncio.create_task(node.puller.pull(name)) for _ in range(2)]
        await asyncio.wait_for(reached.wait(), SOON)
        pulls[0].cancel()
        await asyncio.wait([pulls[0]])
        assert pulls[0].cancelled()
        assert not pulls[1].done()
        pulls[1].cancel()
        await asyncio.wait(pulls)
    assert len(await node.forget_partials()) == 1
    assert await node.leftovers() == {}
    assert (await node.puller.pull(name)).id == busybox.id


async def test_missing_images_and_unreachable_registries(node: Node, registry: Registry) -> None:
    registry.push(small("there"), "there")
    with pytest.raises(NotFoundError, match="there:nope"):
        await node.puller.pull(f"{registry.host}/there:nope")
    with pytest.raises(NotFoundError):
        await node.puller.pull(f"{registry.host}/absent")
    with pytest.raises(KubeletReasonError, match=r"127\.0\.0\.1:9/nothing:latest") as caught:
        await node.puller.pull("127.0.0.1:9/nothing")
    assert caught.value.message.startswith("RegistryUnavailable: ")
    with pytest.raises(InvalidArgumentError, match="lower case"):
        await node.puller.pull("Upper")
    assert await node.leftovers() == {}


async def test_basic_authentication(node: Node, tmp_path: Path) -> None:
    # bcrypt of "open sesame"
    (tmp_path / "htpasswd").write_text("keeper:$2b$04$X.Ke4AhlWEKrpHVhgAyjHuOsU0lgz/bzn/WpD7NknYrVipKRJ.bSK\n")
    auth = f"auth:\n  htpasswd: {{realm: test, path: {tmp_path / 'htpasswd'}}}\n"
    basic = base64.b64encode(b"keeper:open sesame").decode()
    with run_registry(auth=auth, authorization=f"Basic {basic}") as registry:
        name = registry.push(small("secret"), "secret")
        with pytest.raises(PermissionDeniedError, match="no credentials"):
            await node.puller.pull(name)
        with pytest.raises(PermissionDeniedError, match="refused access"):
            await node.puller.pull(name, Credentials(username="keeper", password="wrong"))
        with pytest.raises(PermissionDeniedError):
            await node.puller.pull(name, Credentials(auth=basic, server_address="https://elsewhere.example"))
        assert (await node.puller.pull(name, Credentials(auth=basic))).repo_tags == (name,)
        await node.store.remove(name)
        await node.puller.pull(
            name, Credentials(username="keeper", password="open sesame", server_address=registry.host)
        )


@pytest.mark.parametrize("keep_blobs", [True, False])
async def test_broken_blobs_leave_nothing(new_node: NewNode, registry: Registry, keep_blobs: bool) -> None:
    node = await new_node(keep_blobs=keep_blobs)
    built = small(f"to be broken {keep_blobs}")
    name = registry.push(built, f"broken/{keep_blobs}".lower())
    manifest = built.blobs()[1]
    layer = json.loads(manifest)["layers"][1]["digest"]
    path = registry.blob_path(layer)
    whole = path.read_bytes()
    for damage, words in ((whole[:-20], "bytes"), (b"\x1f\x8b" + bytes(len(whole) - 2), "broken")):
        path.write_bytes(damage)
        with pytest.raises(PodkeelError) as caught:
            await node.puller.pull(name)
        assert words in caught.value.message
        assert layer in caught.value.message
        if words == "bytes":  # a wrong length may be a network error
            assert (layer.replace(":", "-") in await node.forget_partials()) == keep_blobs
        assert await node.leftovers() == {}
    path.write_bytes(whole)
    config = registry.blob_path(built.id)
    config.write_bytes(config.read_bytes().replace(b"linux", b"Linux"))
    with pytest.raises(InvalidArgumentError, match="digest"):
        await node.puller.pull(name)
    assert await node.leftovers() == {}


async def test_a_wrong_diff_id_is_refused(node: Node, registry: Registry) -> None:
    built = small("wrong diff id")
    blobs, manifest = built.blobs()
    config = blobs[built.id].replace(digest_of(built.layers[1]).encode(), digest_of(b"something else").encode())
    other = manifest.replace(built.id.encode(), digest_of(config).encode())
    for blob in (config, *blobs.values()):
        registry.push_blob("diff", digest_of(blob), blob)
    registry.push_manifest("diff", "latest", other, OCI_MANIFEST)
    with pytest.raises(InvalidArgumentError, match=r"layer 2 of 2 .* unpacked, its digest is"):
        await node.puller.pull(f"{registry.host}/diff")
    assert await node.leftovers() == {}


async def test_artifacts_are_refused_with_their_type(node: Node, registry: Registry) -> None:
    blobs, manifest = small("artifact").blobs()
    for digest, blob in blobs.items():
        registry.push_blob("artifact", digest, blob)
    changed = manifest.replace(OCI_CONFIG.encode(), b"application/vnd.example.chart+json")
    registry.push_manifest("artifact", "latest", changed, OCI_MANIFEST)
    with pytest.raises(UnsupportedError, match=r"artifact of type application/vnd\.example\.chart"):
        await node.puller.pull(f"{registry.host}/artifact")
    encrypted = manifest.replace(b"tar+gzip", b"tar+gzip+encrypted")
    registry.push_manifest("artifact", "encrypted", encrypted, OCI_MANIFEST)
    with pytest.raises(UnsupportedError, match="encrypted"):
        await node.puller.pull(f"{registry.host}/artifact:encrypted")


async def test_an_ambiguous_prefix_is_refused(node: Node, registry: Registry) -> None:
    images: dict[str, list[BuiltImage]] = {}
    number = 0
    while not (twice := [prefix for prefix, found in images.items() if len(found) > 1]):
        built = small(f"{number}")
        images.setdefault(built.id[7:11], []).append(built)
        number += 1
    for index, built in enumerate(images[twice[0]]):
        await node.puller.pull(registry.push(built, f"ambiguous/{index}"))
    with pytest.raises(InvalidArgumentError, match="ambiguous"):
        node.store.find(twice[0])


async def test_pinned_images_by_pattern(new_node: NewNode, registry: Registry) -> None:
    node = await new_node(pinned=("*/pinned/*",))
    assert (await node.puller.pull(registry.push(small("pin"), "pinned/pin"))).pinned
    assert not (await node.puller.pull(registry.push(small("free"), "free/pin"))).pinned
