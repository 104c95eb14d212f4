"""Importing an image archive reads no file outside of it, and waits for no file in it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from proto.podkeel.v1 import agent_pb2
from tests.support.agent import AgentProcess
from tests.support.image_builder import BuiltImage, entry, make_tar


def refused(agent: AgentProcess, path: Path) -> str:
    """The error of ImportImage, which must arrive soon."""
    request = agent_pb2.ImportImageRequest(path=str(path), reference="bad:1")
    with pytest.raises(grpc.RpcError) as caught:
        agent.client.call("ImportImage", request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return str(caught.value.details())


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A docker archive as a folder."""
    BuiltImage((make_tar([entry("a", str(tmp_path))]),)).write_docker(tmp_path / "image.tar")
    folder = tmp_path / "folder"
    folder.mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "image.tar", "-C", folder], check=True)
    return folder


def rewrite(layout: Path, **members: object) -> None:
    """Change manifest.json of a docker archive."""
    manifest = json.loads((layout / "manifest.json").read_bytes())
    manifest[0].update(members)
    (layout / "manifest.json").write_text(json.dumps(manifest))


def layer_of(layout: Path) -> Path:
    return layout / str(json.loads((layout / "manifest.json").read_bytes())[0]["Layers"][0])


def absolute(layout: Path, outside: Path) -> None:
    rewrite(layout, Layers=[str(outside)])


def above(layout: Path, outside: Path) -> None:
    rewrite(layout, Layers=[f"../{outside.name}"])


def by_link(layout: Path, outside: Path) -> None:
    layer_of(layout).unlink()
    layer_of(layout).symlink_to(outside)


def by_linked_folder(layout: Path, outside: Path) -> None:
    (layout / "out").symlink_to("..")
    rewrite(layout, Layers=[f"out/{outside.name}"])


@pytest.mark.parametrize("lead_out", [absolute, above, by_link, by_linked_folder])
def test_members_of_folders_lead_to_no_file_outside(
    agent: AgentProcess, layout: Path, tmp_path: Path, lead_out: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside"
    layer_of(layout).rename(outside)
    layer_of(layout).write_bytes(b"")
    lead_out(layout, outside)
    assert "leads out of the archive's folder" in refused(agent, layout)


def test_links_within_a_folder_are_followed(agent: AgentProcess, layout: Path) -> None:
    """docker save writes such links for layers that several images share."""
    layer = layer_of(layout)
    (layout / "shared").mkdir()
    layer.rename(layout / "shared/layer.tar")
    layer.symlink_to(os.path.relpath(layout / "shared/layer.tar", layer.parent))
    request = agent_pb2.ImportImageRequest(path=str(layout), reference="linked:1")
    assert agent.client.call("ImportImage", request).images


@pytest.mark.parametrize("name", ["manifest.json", "layer", "config", "the archive"])
def test_fifos_and_devices_are_not_waited_for(agent: AgentProcess, layout: Path, tmp_path: Path, name: str) -> None:
    manifest = json.loads((layout / "manifest.json").read_bytes())[0]
    members = {"manifest.json": "manifest.json", "layer": manifest["Layers"][0], "config": manifest["Config"]}
    path = tmp_path / "fifo" if name == "the archive" else layout / members[name]
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    said = refused(agent, path if name == "the archive" else layout)
    assert "neither" in said or "is no regular file" in said
    path.unlink()
    os.mknod(path, 0o020600, os.makedev(1, 5))
    refused(agent, path if name == "the archive" else layout)


@pytest.mark.parametrize("name", ["manifest.json", "config"])
def test_json_members_of_any_size_are_refused_unread(agent: AgentProcess, layout: Path, name: str) -> None:
    config = json.loads((layout / "manifest.json").read_bytes())[0]["Config"]
    os.truncate(layout / (config if name == "config" else name), 1 << 40)
    assert "is larger than" in refused(agent, layout)


def long_header() -> bytes:
    """A pax header with a declared size of 3 GiB."""
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, 3 << 30
    return member.tobuf(tarfile.USTAR_FORMAT)


def sparse_map() -> bytes:
    """A sparse file whose map extends to the end of the archive."""
    header = bytearray(tarfile.TarInfo("sparse").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482:483] = b"S", b"\1"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def long_map() -> bytes:
    """The same in the pax format, where the map is at the start of the content."""
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1", "GNU.sparse.name": "x"}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("x")
        member.size, member.pax_headers = 1 << 30, records
        archive.addfile(member)
    return file.getvalue()[:-1024]


@pytest.mark.parametrize("begin", [long_header, sparse_map, long_map])
def test_headers_do_not_fill_the_memory(agent: AgentProcess, tmp_path: Path, begin: Callable[[], bytes]) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(begin())
    os.truncate(path, 3 << 30)
    peak = rss(agent)
    assert "is broken" in refused(agent, path)
    assert rss(agent) - peak < 64 << 20


def rss(agent: AgentProcess) -> int:
    """The highest memory usage of the agent so far, in bytes."""
    lines = Path(f"/proc/{agent.pid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
