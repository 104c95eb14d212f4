"""Checkpoint archives are not trusted: a hostile one cannot make the agent read, extract or keep other files."""

from __future__ import annotations

import gzip
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.checkpoints import made_up, no_new_images

__all__ = ["no_new_images"]

NAME = "example.org/checkpoint:1"


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor, info.devminor = 1, 1
    return info


def make_image(agent: AgentProcess, path: Path, name: str = NAME) -> agent_pb2.ImageFromCheckpointResponse:
    answer = agent.client.call("ImageFromCheckpoint", agent_pb2.ImageFromCheckpointRequest(path=str(path), name=name))
    assert isinstance(answer, agent_pb2.ImageFromCheckpointResponse)
    return answer


def refusal(agent: AgentProcess, path: Path, name: str = NAME) -> str:
    """The error message. Its code must be INVALID_ARGUMENT, and nothing of the archive may stay."""
    with pytest.raises(grpc.RpcError) as failure:
        make_image(agent, path, name)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT, failure.value.details()
    work = agent.data / "checkpoints"
    assert not work.exists() or list(work.iterdir()) == []
    request = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=NAME))
    assert not agent.client.call("ImageStatus", request).HasField("image")
    return str(failure.value.details())


def test_an_image_of_a_checkpoint_has_its_annotations(agent: AgentProcess, tmp_path: Path) -> None:
    archive = made_up(tmp_path)
    answer = make_image(agent, archive)
    assert answer.name == NAME
    exported = tmp_path / "image.tar"
    agent.client.call("ExportImages", agent_pb2.ExportImagesRequest(path=str(exported), references=[NAME]))
    with tarfile.open(exported) as image:

        def blob(digest: str) -> bytes:
            file = image.extractfile("blobs/" + digest.replace(":", "/"))
            assert file is not None
            return file.read()

        index = image.extractfile("index.json")
        assert index is not None
        manifest = json.loads(blob(json.loads(index.read())["manifests"][0]["digest"]))
        assert manifest["annotations"] == {
            "org.criu.checkpoint.container.name": "main",
            "io.kubernetes.cri-o.annotations.checkpoint.name": "main",
            "org.criu.checkpoint.rootfsImageName": "docker.io/library/busybox:latest",
            "org.criu.checkpoint.rootfsImageID": "",
            "org.criu.checkpoint.runtime.name": "crun",
            "org.criu.checkpoint.engine.name": "podkeel",
        }
        assert len(manifest["layers"]) == 1
    agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=NAME)))


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (member("../../etc/cron.d/evil"), "a name that leaves the archive"),
        (member("/etc/evil"), "a name that leaves the archive"),
        (member("checkpoint/../../evil"), "a name that leaves the archive"),
        (member("checkpoint/.wh.pages-1.img"), "hides others"),
        (member("checkpoint/pages-2.img", tarfile.SYMTYPE, "/etc/shadow"), "neither a file nor a folder"),
        (member("checkpoint/pages-2.img", tarfile.LNKTYPE, "checkpoint/pages-1.img"), "neither a file nor a folder"),
        (member("checkpoint/parent", tarfile.SYMTYPE, "/"), "neither a file nor a folder"),
        (member("checkpoint/mem", tarfile.CHRTYPE), "neither a file nor a folder"),
        (member("checkpoint/sda", tarfile.BLKTYPE), "neither a file nor a folder"),
        (member("checkpoint/fifo", tarfile.FIFOTYPE), "neither a file nor a folder"),
        (member("checkpoint/inventory.img"), "twice"),
        (member("x" * 300), "more than 255 bytes"),
    ],
    ids=lambda value: value.name[:30] if isinstance(value, tarfile.TarInfo) else "",
)
def test_odd_members_are_refused(agent: AgentProcess, tmp_path: Path, hostile: tarfile.TarInfo, words: str) -> None:
    key = hostile.name if hostile.name != "checkpoint/inventory.img" else "./checkpoint/inventory.img"
    hostile.name = key
    assert words in refusal(agent, made_up(tmp_path, {key: hostile}))


@pytest.mark.parametrize(
    "missing",
    ["config.dump", "spec.dump", "checkpoint/inventory.img", "checkpoint/pstree.img", "checkpoint/core-1.img"],
)
def test_required_members_must_exist(agent: AgentProcess, tmp_path: Path, missing: str) -> None:
    assert "not a checkpoint of a container" in refusal(agent, made_up(tmp_path, {missing: None}))


def test_a_checkpoint_of_another_architecture_is_refused(agent: AgentProcess, tmp_path: Path) -> None:
    assert "was made on s390x" in refusal(agent, made_up(tmp_path, machine=5))
    assert "an unknown machine" in refusal(agent, made_up(tmp_path, machine=99))


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2 // 512 * 512]


@pytest.mark.parametrize(
    "broken",
    [_cut, gzip.compress, lambda content: b"", lambda content: bytes(10240), lambda content: b"x" * 10240],
    ids=["cut", "compressed", "empty", "zeros", "garbage"],
)
def test_broken_files(agent: AgentProcess, tmp_path: Path, broken: Callable[[bytes], bytes]) -> None:
    archive = made_up(tmp_path)
    archive.write_bytes(broken(archive.read_bytes()))
    refusal(agent, archive)


def test_documents_have_limits(agent: AgentProcess, tmp_path: Path) -> None:
    assert "config.dump" in refusal(agent, made_up(tmp_path, {"config.dump": b"[" * 100_000}))
    assert "config.dump" in refusal(agent, made_up(tmp_path, {"config.dump": b'{"name": 1}'}))
    assert "larger than" in refusal(agent, made_up(tmp_path, {"config.dump": b" " * (2 << 20)}))


def test_only_a_file_is_read(agent: AgentProcess, tmp_path: Path) -> None:
    refusal(agent, tmp_path)
    refusal(agent, Path("relative.tar"))
    refusal(agent, Path("/dev/zero"))
    refusal(agent, made_up(tmp_path), name="Not A Name")
    with tempfile.TemporaryDirectory() as folder, pytest.raises(grpc.RpcError) as failure:
        make_image(agent, Path(folder, "missing.tar"))
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
