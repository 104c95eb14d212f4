"""Programs that allow or refuse the pull of an image."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from host.errors import KubeletReasonError
from tests.integration.images.conftest import Node
from tests.support.image_builder import OCI_MANIFEST, BuiltImage, digest_of, entry, make_tar
from tests.support.registry import Registry

NewNode = Callable[..., Awaitable[Node]]


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    return BuiltImage((make_tar([entry("a", "verified")]),))


@pytest.fixture
async def node(new_node: NewNode, tmp_path: Path) -> Node:
    (tmp_path / "verifiers").mkdir()
    return await new_node(verifier_dir=str(tmp_path / "verifiers"), verifier_seconds=1.0)


def verifier(node: Node, name: str, script: str, mode: int = 0o755) -> None:
    program = Path(node.options.verifier_dir) / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(mode)


async def test_each_program_gets_the_name_and_digest(
    node: Node, registry: Registry, built: BuiltImage, tmp_path: Path
) -> None:
    name = registry.push(built, "verify/told")
    (Path(node.options.verifier_dir) / "folder").mkdir()
    for number in (1, 2):
        verifier(
            node, f"number-{number}", f'echo "$@" > {tmp_path}/arguments-{number}; cat > {tmp_path}/stdin-{number}'
        )
    assert (await node.puller.pull(name)).id == built.id
    manifest = built.blobs()[1]
    media_type = "application/vnd.oci.descriptor.v1+json"
    for number in (1, 2):
        arguments = (tmp_path / f"arguments-{number}").read_text().split()
        assert arguments == ["-name", name, "-digest", digest_of(manifest), "-stdin-media-type", media_type]
        assert json.loads((tmp_path / f"stdin-{number}").read_text()) == {
            "mediaType": OCI_MANIFEST, "digest": digest_of(manifest), "size": len(manifest),
        }  # fmt: skip
    # An unchanged image is verified again.
    (tmp_path / "stdin-1").unlink()
    await node.puller.pull(name)
    assert json.loads((tmp_path / "stdin-1").read_text())["size"] == len(manifest)


@pytest.mark.parametrize(
    ("script", "mode", "words"),
    [
        ("echo it is  not signed; exit 1", 0o755, "verifier b refused it: it is not signed"),
        ("exit 7", 0o755, "verifier b refused it: status 7"),
        ("sleep 60", 0o755, "verifier b failed: .* did not finish within 1 s"),
        ("exit 0", 0o644, "verifier b failed: .*Permission denied"),
        ("kill -9 $$", 0o755, "verifier b refused it: status -9"),
    ],
)
async def test_one_refusal_fails_the_pull(node: Node, registry: Registry, script: str, mode: int, words: str) -> None:
    built = BuiltImage((make_tar([entry("a", script + str(mode))]),))
    name = registry.push(built, "verify/denied")
    for other in "ac":
        verifier(node, other, "exit 0")
    verifier(node, "b", script, mode)
    with pytest.raises(KubeletReasonError, match=words) as caught:
        await node.puller.pull(name)
    assert caught.value.message.startswith("SignatureValidationFailed: ")
    assert f"{name} ({digest_of(built.blobs()[1])})" in caught.value.message
    assert await node.leftovers() == {}
    # A pull of an image that is on the node is refused too; the image stays unchanged.
    verifier(node, "b", "exit 0")
    image = await node.puller.pull(name)
    verifier(node, "b", script, mode)
    with pytest.raises(KubeletReasonError, match=words):
        await node.puller.pull(name)
    assert node.store.images() == (image,)


async def test_folders(new_node: NewNode, node: Node, registry: Registry, built: BuiltImage, tmp_path: Path) -> None:
    name = registry.push(built, "verify/folders")
    assert (await node.puller.pull(name)).id == built.id, "an empty folder refuses nothing"
    missing = await new_node(verifier_dir=str(tmp_path / "missing"))
    with pytest.raises(KubeletReasonError, match="missing cannot be read") as caught:
        await missing.puller.pull(name)
    assert caught.value.message.startswith("SignatureValidationFailed: ")
