from __future__ import annotations

import dataclasses
import gzip
import io
import json
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from host import processes
from host.errors import InvalidArgumentError, LimitError, NotFoundError, PodkeelError
from tests.integration.images.conftest import Node
from tests.support.image_builder import (
    OCI_INDEX,
    OCI_MANIFEST,
    BuiltImage,
    build_busybox_archive,
    descriptor,
    digest_of,
    entry,
    make_tar,
)


@pytest.fixture
def built() -> BuiltImage:
    layers = (make_tar([entry("a", "1")]), make_tar([entry("b", "2")]))
    return BuiltImage(layers, {"Env": ["A=1"], "Volumes": {"/v": {}}, "Labels": {"l": "x"}, "StopSignal": "SIGQUIT"})


@pytest.mark.parametrize("form", ["oci", "docker"])
@pytest.mark.parametrize("packed", [False, True])
async def test_busybox_archives(node: Node, tmp_path: Path, form: str, packed: bool) -> None:
    archive = tmp_path / "image.tar"
    built = build_busybox_archive(archive, "busybox:1.35", form=form, config={"User": "user"})
    if packed:
        archive.write_bytes(gzip.compress(archive.read_bytes(), 1))
    (image,) = await node.puller.import_archive(archive)
    assert image.id == built.id
    assert image.repo_tags == ("docker.io/library/busybox:1.35",)
    assert image.config.user == "user"
    assert node.store.find("busybox:1.35") == image
    assert node.store.find("busybox") is None
    assert (await node.puller.import_archive(archive)) == [image]
    await node.store.remove("busybox:1.35")
    assert await node.leftovers() == {}


async def test_all_fields_of_the_configuration_are_read(node: Node, tmp_path: Path, built: BuiltImage) -> None:
    built.write_oci(tmp_path / "image.tar", "named:1")
    (image,) = await node.puller.import_archive(tmp_path / "image.tar")
    assert image.config.env == ("A=1",)
    assert image.config.volumes == ("/v",)
    assert json.loads(await node.store.config_file(image))["config"]["Labels"] == {"l": "x"}
    assert image.config.stop_signal == "SIGQUIT"
    assert digest_of(await node.store.config_file(image)) == image.id
    assert len(image.layers) == len(image.chain_ids) == 2


async def test_an_oci_layout_folder(node: Node, tmp_path: Path, built: BuiltImage) -> None:
    built.write_oci(tmp_path / "image.tar", "")
    layout = tmp_path / "layout"
    layout.mkdir()
    await processes.run(("tar", "-xf", str(tmp_path / "image.tar"), "-C", str(layout)))
    (image,) = await node.puller.import_archive(layout, "registry.example:5000/app:v2")
    assert image.repo_tags == ("registry.example:5000/app:v2",)
    assert image.repo_digests == (f"registry.example:5000/app@{digest_of(built.blobs()[1])}",)
    blob = next(path for path in (layout / "blobs/sha256").iterdir() if path.name == image.id[7:])
    blob.unlink()
    blob.symlink_to("/etc/passwd")
    with pytest.raises(InvalidArgumentError, match="broken"):
        await node.puller.import_archive(layout)


async def test_an_image_without_a_name_is_known_by_its_id(node: Node, tmp_path: Path, built: BuiltImage) -> None:
    for write, name in ((built.write_oci, "oci.tar"), (built.write_docker, "docker.tar")):
        write(tmp_path / name)
        (image,) = await node.puller.import_archive(tmp_path / name)
        assert image.repo_tags == ()
        assert node.store.find(image.id[7:19]) == image
        (image,) = await node.puller.import_archive(tmp_path / name, "given")
        assert image.repo_tags == ("docker.io/library/given:latest",)
        await node.store.remove("given")


async def test_a_layout_of_several_images_and_tags(node: Node, tmp_path: Path, built: BuiltImage) -> None:
    other = dataclasses.replace(built, layers=(*built.layers, make_tar([entry("c", "3")])))
    blobs: dict[str, bytes] = {}
    manifests = []
    for image, name in ((built, "v1"), (other, "v2"), (other, "registry.example/other:x")):
        found, manifest = image.blobs()
        blobs.update(found)
        annotations = {"org.opencontainers.image.ref.name": name}
        manifests.append({**descriptor(OCI_MANIFEST, manifest), "annotations": annotations})
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()
    members = [entry(f"blobs/sha256/{digest[7:]}", blob) for digest, blob in blobs.items()]
    (tmp_path / "image.tar").write_bytes(make_tar([*members, entry("index.json", index)]))
    await node.puller.import_archive(tmp_path / "image.tar", "registry.example/app")
    tags = sorted(tag for image in node.store.images() for tag in image.repo_tags)
    assert tags == ["registry.example/app:v1", "registry.example/app:v2", "registry.example/other:x"]
    assert len(node.store.images()) == 2


async def test_docker_archives_with_linked_layers_and_several_tags(node: Node, tmp_path: Path) -> None:
    layer = make_tar([entry("a", "1")])
    built = BuiltImage((layer, layer))
    config = built.blobs()[0][built.id]
    manifest = [
        {"Config": "c.json", "RepoTags": ["a:1", "b.example/c:2"], "Layers": ["one/layer.tar", "two/layer.tar"]}
    ]
    members = [
        entry("one/layer.tar", layer),
        entry("two/layer.tar", kind=tarfile.SYMTYPE, link="../one/layer.tar"),
        entry("c.json", config),
        entry("manifest.json", json.dumps(manifest)),
    ]
    (tmp_path / "image.tar").write_bytes(make_tar(members))
    (image,) = await node.puller.import_archive(tmp_path / "image.tar")
    assert image.repo_tags == ("b.example/c:2", "docker.io/library/a:1")
    await node.store.remove("a:1")
    assert await node.leftovers() == {}


async def test_broken_archives(
    node: Node, new_node: Callable[..., Awaitable[Node]], tmp_path: Path, built: BuiltImage
) -> None:
    built.write_oci(tmp_path / "oci.tar", "x:1")
    built.write_docker(tmp_path / "docker.tar", "x:1")
    oci, docker = (tmp_path / "oci.tar").read_bytes(), (tmp_path / "docker.tar").read_bytes()
    layer = built.layers[1]
    cases: list[tuple[bytes, str]] = [
        (b"", "neither|broken"),
        (b"x" * 5000, "no tar archive"),
        (oci[: len(oci) // 2], "broken|missing|neither"),
        (docker[:2000], "broken|missing|neither"),
        (gzip.compress(oci)[:-50], "broken"),
        (make_tar([entry("some", "file")]), "neither"),
        (make_tar([entry("index.json", "{}")]), "not a valid manifest"),
        (make_tar([entry("index.json", "not json")]), "not a valid manifest"),
        (make_tar([entry("manifest.json", '[{"Config": "c", "Layers": ["../../l"]}]')]), "missing"),
        (make_tar([entry("manifest.json", "[]")]), "no image"),
        (docker.replace(b'"linux"', b'"plan9"'), "plan9|broken"),
        (docker.replace(layer, make_tar([entry("b", "X")])), "its digest is"),
    ]
    for index, (content, words) in enumerate(cases):
        path = tmp_path / f"broken{index}.tar"
        path.write_bytes(content)
        with pytest.raises(InvalidArgumentError, match=words) as caught:
            await node.puller.import_archive(path)
        assert str(path) in caught.value.message, caught.value.message
        assert await node.leftovers() == {}
    with pytest.raises(NotFoundError, match="absent"):
        await node.puller.import_archive(tmp_path / "absent.tar")
    tight = await new_node(max_archive_bytes=10_000)
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    with pytest.raises(LimitError, match="max_archive_bytes"):
        await tight.puller.import_archive(tmp_path / "bomb.tar.gz")


async def test_every_truncation_of_an_archive_is_refused(node: Node, tmp_path: Path, built: BuiltImage) -> None:
    built.write_oci(tmp_path / "whole.tar", "x:1")
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        end = max(member.offset_data + member.size for member in archive)
    for length in range(0, end, 700):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        with pytest.raises(PodkeelError):
            await node.puller.import_archive(path)
    assert await node.leftovers() == {}


async def test_an_imported_archive_may_be_deleted(node: Node, tmp_path: Path, built: BuiltImage) -> None:
    built.write_oci(tmp_path / "image.tar", "x:1")
    await node.puller.import_archive(tmp_path / "image.tar")
    (tmp_path / "image.tar").unlink()
    await node.restart()
    image = node.store.find("x:1")
    assert image is not None
    await node.snapshots.prepare("c1", image, target=node.target("c1"))
    assert (node.target("c1") / "b").read_text() == "2"
