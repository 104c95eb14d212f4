"""Copying an image's files to a VOLUME does not fill the node's disk."""

from __future__ import annotations

import tarfile
from pathlib import Path

from proto.podkeel.v1 import agent_pb2
from tests.integration.agent.hardening import like_kubelets
from tests.security.conftest import StartAttacker
from tests.support.agent import AgentProcess
from tests.support.image_builder import BuiltImage, busybox_layer

_SIZE = 2 << 30


def sparse_layer(name: str) -> bytes:
    """A sparse file of 2 GiB without data, in GNU tar's old format."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:398] = b"%011o\0" % _SIZE  # an empty region at the end
    header[398:410] = b"%011o\0" % 0
    header[483:495] = b"%011o\0" % _SIZE
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def test_a_sparse_file_stays_sparse(agent: AgentProcess, attacker: StartAttacker, tmp_path: Path) -> None:
    image = BuiltImage((busybox_layer(), sparse_layer("data/sparse")), {"Volumes": {"/data": {}}})
    image.write_docker(tmp_path / "image.tar", "sparse:1")
    agent.client.call("ImportImage", agent_pb2.ImportImageRequest(path=str(tmp_path / "image.tar")))
    ours = attacker(like_kubelets("main", image="sparse:1"))
    (copy,) = (agent.data / "containers" / ours.container_id / "volumes").rglob("sparse")
    assert copy.stat().st_size == _SIZE
    assert copy.stat().st_blocks * 512 < 1 << 20
    assert ours.shell("stat -c %s /data/sparse").strip() == str(_SIZE)
