"""Images from other tools and for other tools: archives and pushes, checked with skopeo and buildah."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import shutil
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zstandard

from host import libc, processes
from host.errors import (
    InvalidArgumentError,
    LimitError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
    WrongStateError,
)
from host.files import mounts
from images.registry.credentials import Credentials
from tests.integration.images.conftest import Node
from tests.support.image_builder import BuiltImage, digest_of, entry, make_tar
from tests.support.registry import Registry, run_registry
from tests.support.registry_front import TOKEN, run_front

NewNode = Callable[..., Awaitable[Node]]
needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="needs the Debian package skopeo")
needs_buildah = pytest.mark.skipif(shutil.which("buildah") is None, reason="needs the Debian package buildah")


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return BuiltImage((make_tar([entry("a", os.urandom(5000))]), make_tar([entry("b", "2")])), {"Cmd": ["run"]})


async def skopeo(folder: Path, *words: str) -> bytes:
    environment = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder)}
    done = await processes.run(("skopeo", "--insecure-policy", *words), environment=environment, timeout=60)
    return done.stdout


async def test_an_exported_image_is_imported_unchanged(
    node: Node, registry: Registry, built: BuiltImage, tmp_path: Path
) -> None:
    name = registry.push(built, "shipping/app", "1")
    image = await node.puller.pull(name)
    await node.store.tag(name, "other.example/app:2")
    archive = tmp_path / "app.tar"
    archive.write_text("an older one")
    assert await node.exporter.export([name], archive) == archive.stat().st_size
    with tarfile.open(archive) as members:
        names = members.getnames()
        assert json.load(members.extractfile("oci-layout") or pytest.fail("no layout")) == {
            "imageLayoutVersion": "1.0.0"
        }
        for member in members:
            if member.name.startswith("blobs/"):
                content = members.extractfile(member)
                assert content is not None
                assert digest_of(content.read()) == f"sha256:{member.name.rpartition('/')[2]}"
    assert len(names) == len(set(names)) == 6
    await node.store.remove(name)
    (again,) = await node.puller.import_archive(archive)
    assert (again.id, again.manifest_digest, again.repo_tags) == (image.id, image.manifest_digest, (name,))
    assert again.repo_digests == image.repo_digests
    assert sorted(path.name for path in tmp_path.glob("*app*")) == ["app.tar"]


async def test_several_images_in_one_archive(node: Node, registry: Registry, built: BuiltImage, tmp_path: Path) -> None:
    other = dataclasses.replace(built, layers=(built.layers[0], make_tar([entry("c", "3")])))
    names = [registry.push(built, "several/one"), registry.push(other, "several/two")]
    images = [await node.puller.pull(name) for name in names]
    await node.store.tag(names[1], "localhost/two:x")
    await node.exporter.export([names[0], images[1].id], tmp_path / "both.tar")
    for image in images:
        await node.store.remove(image.id)
    imported = await node.puller.import_archive(tmp_path / "both.tar")
    assert {image.id for image in imported} == {built.id, other.id}
    found = node.store.find(other.id)
    assert found is not None
    assert found.repo_tags == (names[1], "localhost/two:x")


@needs_skopeo
@pytest.mark.parametrize("form", ["oci", "docker"])
async def test_skopeo_reads_exported_archives(node: Node, built: BuiltImage, tmp_path: Path, form: str) -> None:
    write = built.write_oci if form == "oci" else built.write_docker
    write(tmp_path / "in.tar", "registry.example/app:1")
    await node.puller.import_archive(tmp_path / "in.tar")
    await node.exporter.export(["registry.example/app:1"], tmp_path / "out.tar")
    source = f"oci-archive:{tmp_path}/out.tar"
    inspected = json.loads(await skopeo(tmp_path, "inspect", "--raw", source))
    assert inspected["config"]["digest"] == built.id
    # Copying makes skopeo unpack each layer and compare it with its diff ID.
    await skopeo(tmp_path, "copy", "--dest-decompress", source, f"dir:{tmp_path}/copy")
    assert digest_of(built.layers[0])[7:] in {path.name for path in (tmp_path / "copy").iterdir()}


@needs_skopeo
@pytest.mark.parametrize("transport", ["oci-archive", "docker-archive", "oci"])
async def test_archives_of_skopeo_are_imported(
    node: Node, registry: Registry, built: BuiltImage, tmp_path: Path, transport: str
) -> None:
    source = registry.push(built, "skopeo/app", "1")
    target = f"{transport}:{tmp_path}/image:{'registry.example/app:1' if transport != 'oci' else '1'}"
    await skopeo(tmp_path, "copy", "--src-tls-verify=false", f"docker://{source}", target)
    (image,) = await node.puller.import_archive(tmp_path / "image", "registry.example/app:1")
    assert image.repo_tags == ("registry.example/app:1",)
    assert image.config.cmd == ("run",)
    assert (node.data / "layers" / str(image.layers[1]) / "fs/b").read_text() == "2"


@needs_buildah
async def test_images_of_buildah_are_imported_run_and_exported(node: Node, registry: Registry, tmp_path: Path) -> None:
    store = ("--root", f"{tmp_path}/root", "--runroot", f"{tmp_path}/run", "--storage-driver", "vfs")
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}

    async def buildah(*words: str) -> str:
        done = await processes.run(("buildah", *store, *words), environment=environment, timeout=60)
        return done.stdout.decode().strip()

    (tmp_path / "hello").write_text("built by another")
    container = await buildah("from", "scratch")
    await buildah("copy", container, str(tmp_path / "hello"), "/srv/hello")
    await buildah("config", "--cmd", "/srv/hello", container)
    await buildah("commit", container, f"oci-archive:{tmp_path}/built.tar:localhost/built:1")
    (image,) = await node.puller.import_archive(tmp_path / "built.tar")
    assert image.repo_tags == ("localhost/built:1",)
    snapshot = await node.snapshots.prepare("c", image, target=node.target("c"))
    assert (snapshot.target / "srv/hello").read_text() == "built by another"
    await node.exporter.export([image.id], tmp_path / "back.tar")
    assert await buildah("pull", f"oci-archive:{tmp_path}/back.tar") == image.id[7:]
    pushed = await node.exporter.push(image.id, f"{registry.host}/from/buildah:1")
    assert pushed.sent == 2
    await node.store.remove(image.id)
    assert (await node.puller.pull(pushed.reference)).id == image.id


@needs_skopeo
async def test_push_and_pull_again(node: Node, registry: Registry, built: BuiltImage, tmp_path: Path) -> None:
    name = registry.push(built, "push/one", "1")
    image = await node.puller.pull(name)
    again = await node.exporter.push(name)
    assert (again.reference, again.digest, again.sent, again.mounted, again.present) == (
        name, image.manifest_digest, 0, 0, 3,
    )  # fmt: skip
    mounted = await node.exporter.push(image.id, f"{registry.host}/push/two:2")
    assert (mounted.sent, mounted.mounted, mounted.present) == (0, 3, 0)
    found = node.store.get(image.id)
    assert found.repo_tags == image.repo_tags
    digests = [f"{registry.host}/push/{name}@{image.manifest_digest}" for name in ("one", "two")]
    assert list(found.repo_digests) == digests
    await node.restart()
    assert node.store.find(digests[1]) == found
    with run_registry() as other:
        sent = await node.exporter.push(name, f"{other.host}/copy:1")
        assert (sent.sent, sent.mounted, sent.present) == (3, 0, 0)
        await node.store.remove(name)
        copied = await node.puller.pull(sent.reference)
        assert (copied.id, copied.manifest_digest) == (image.id, image.manifest_digest)
        inspected = await skopeo(tmp_path, "inspect", "--tls-verify=false", f"docker://{sent.reference}")
        assert json.loads(inspected)["Digest"] == sent.digest


async def test_pushes_request_a_token_with_push_access(
    node: Node, registry: Registry, built: BuiltImage, tmp_path: Path
) -> None:
    built.write_docker(tmp_path / "image.tar", "localhost/app:1")
    (image,) = await node.puller.import_archive(tmp_path / "image.tar")
    async with run_front(registry.host) as front:
        front.token_user = "user:secret"
        target = f"{front.host}/tokens/app:1"
        with pytest.raises(PermissionDeniedError):
            await node.exporter.push("localhost/app:1", target)
        front.seen.clear()
        secret = Credentials(username="user", password="secret")
        pushed = await node.exporter.push("localhost/app:1", target, secret)
        assert pushed.sent == 3
        asked = {path for _, path, _ in front.seen if path.startswith("/token")}
        assert all("repository%3Atokens%2Fapp%3Apull%2Cpush" in path for path in asked)
        uploads = [headers for method, _, headers in front.seen if method in ("POST", "PUT")]
        assert {headers.get("Authorization") for headers in uploads} <= {None, f"Bearer {TOKEN}"}
        await node.store.remove(image.id)
        # Its layers were never compressed: Podkeel writes a new manifest, and the configuration stays the same.
        assert (await node.puller.pull(target, secret)).id == built.id


async def test_pushes_with_a_password(node: Node, built: BuiltImage, tmp_path: Path) -> None:
    # bcrypt of "open sesame"
    (tmp_path / "htpasswd").write_text("keeper:$2b$04$X.Ke4AhlWEKrpHVhgAyjHuOsU0lgz/bzn/WpD7NknYrVipKRJ.bSK\n")
    auth = f"auth:\n  htpasswd: {{realm: test, path: {tmp_path / 'htpasswd'}}}\n"
    basic = base64.b64encode(b"keeper:open sesame").decode()
    built.write_oci(tmp_path / "image.tar", "localhost/app:1")
    await node.puller.import_archive(tmp_path / "image.tar")
    with run_registry(auth=auth) as registry:
        with pytest.raises(PermissionDeniedError):
            await node.exporter.push("localhost/app:1", f"{registry.host}/app:1")
        pushed = await node.exporter.push("localhost/app:1", f"{registry.host}/app:1", Credentials(auth=basic))
        assert pushed.sent == 3


async def test_pushes_do_not_go_to_mirrors_or_hosts_without_push(
    node: Node, registry: Registry, built: BuiltImage, tmp_path: Path
) -> None:
    built.write_oci(tmp_path / "image.tar", "registry.example/app:1")
    await node.puller.import_archive(tmp_path / "image.tar")
    folder = Path(node.options.registry_config_dir) / "registry.example"
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'server = "http://127.0.0.1:9"\n[host."http://{registry.host}"]\n')
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        await node.exporter.push("registry.example/app:1")
    (folder / "hosts.toml").write_text(f'server = "http://{registry.host}"\ncapabilities = ["pull", "resolve"]\n')
    with pytest.raises(InvalidArgumentError, match="does not allow pushes"):
        await node.exporter.push("registry.example/app:1")


async def test_an_image_without_kept_layers_cannot_be_exported(
    new_node: NewNode, node: Node, registry: Registry, built: BuiltImage, tmp_path: Path
) -> None:
    name = registry.push(built, "unkept/app")
    unkept = await new_node(keep_blobs=False)
    await unkept.puller.pull(name)
    with pytest.raises(WrongStateError, match=r"images\.keep_blobs"):
        await unkept.exporter.export([name], tmp_path / "out.tar")
    with pytest.raises(WrongStateError, match=r"images\.keep_blobs"):
        await unkept.exporter.push(name)
    with pytest.raises(NotFoundError, match="absent"):
        await node.exporter.export(["absent"], tmp_path / "out.tar")
    image = await node.puller.pull(name)
    with pytest.raises(NotFoundError, match="no/such/folder does not exist"):
        await node.exporter.export([name], tmp_path / "no/such/folder/out.tar")
    with pytest.raises(InvalidArgumentError, match="it is a folder"):
        await node.exporter.export([name], tmp_path)
    with pytest.raises(InvalidArgumentError, match="give it a tag"):
        await node.exporter.push(image.repo_digests[0])
    assert not list(tmp_path.glob("*out*"))


async def test_a_full_disk_ends_an_export(node: Node, registry: Registry, built: BuiltImage, tmp_path: Path) -> None:
    name = registry.push(built, "full/app")
    await node.puller.pull(name)
    small = tmp_path / "small"
    small.mkdir()
    libc.mount("tmpfs", str(small), "tmpfs", 0, "size=8k")
    try:
        with pytest.raises(LimitError, match="No space left"):
            await node.exporter.export([name], small / "out.tar")
        assert list(small.iterdir()) == []
    finally:
        mounts.unmount(small)


async def test_a_cancelled_export_leaves_nothing(
    node: Node, registry: Registry, built: BuiltImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = registry.push(built, "cancelled/export")
    await node.puller.pull(name)
    copying = asyncio.Event()

    async def never(*_: object) -> None:
        copying.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("images.archives.writer.Archive.add_file", never)
    task = asyncio.create_task(node.exporter.export([name], tmp_path / "out.tar"))
    await copying.wait()
    removing = asyncio.create_task(node.store.remove(name))
    await removing
    assert list((node.data / "content/sha256").iterdir()), "what is on its way out stays until it is through"
    task.cancel()
    await asyncio.wait((task,))
    assert not list(tmp_path.glob("*out*"))
    assert await node.leftovers() == {}


async def test_layers_shared_in_another_compression_are_exported(
    node: Node, registry: Registry, built: BuiltImage, tmp_path: Path
) -> None:
    await node.puller.pull(registry.push(built, "compression/gzip"))
    zstd = dataclasses.replace(
        built, config={"Cmd": ["zstd"]}, compress=zstandard.ZstdCompressor(3).compress, suffix="+zstd"
    )
    image = await node.puller.pull(registry.push(zstd, "compression/zstd"))
    await node.exporter.export([image.id], tmp_path / "out.tar")
    fresh = dataclasses.replace(node, root=tmp_path / "fresh")
    fresh.root.mkdir()
    await fresh.start()
    try:
        (imported,) = await fresh.puller.import_archive(tmp_path / "out.tar")
        assert imported.id == image.id == zstd.id
        assert imported.manifest_digest != image.manifest_digest
    finally:
        await fresh.stop()


async def test_tags(node: Node, registry: Registry, built: BuiltImage) -> None:
    name = registry.push(built, "tags/app", "1")
    image = await node.puller.pull(name)
    assert await node.store.tag(image.id[7:19], "busybox") == "docker.io/library/busybox:latest"
    await node.restart()
    found = node.store.find("busybox")
    assert found is not None
    assert (found.id, set(found.repo_tags)) == (image.id, {name, "docker.io/library/busybox:latest"})
    other = registry.push(dataclasses.replace(built, config={"Cmd": ["other"]}), "tags/other", "1")
    await node.puller.pull(other)
    await node.store.tag(other, "busybox")
    moved = node.store.find("busybox")
    assert moved is not None
    assert moved.id != image.id
    for wrong in (f"busybox@{image.id}", "Upper"):
        with pytest.raises(InvalidArgumentError):
            await node.store.tag(name, wrong)
    with pytest.raises(NotFoundError):
        await node.store.tag("absent", "busybox")


async def test_disk_usage(node: Node, registry: Registry, built: BuiltImage) -> None:
    other = dataclasses.replace(built, layers=(built.layers[0], make_tar([entry("c", os.urandom(100_000))])))
    first = await node.puller.pull(registry.push(built, "usage/one"))
    second = await node.puller.pull(registry.push(other, "usage/two"))
    await node.snapshots.prepare("c1", first, target=node.target("c1"))
    usage = await node.images.disk_usage()
    by_id = {item.image.id: item for item in usage.images}
    assert (by_id[first.id].containers, by_id[second.id].containers) == (1, 0)
    assert by_id[second.id].unique_bytes > 100_000
    assert by_id[second.id].used_bytes > by_id[second.id].unique_bytes
    assert usage.layers + usage.blobs == node.store.filesystem_usage().used_bytes
    await node.store.remove(second.id)
    freed = usage.layers + usage.blobs - node.store.filesystem_usage().used_bytes
    assert freed == by_id[second.id].unique_bytes
