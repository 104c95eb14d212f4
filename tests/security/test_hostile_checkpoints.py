"""A forged checkpoint gets only rights of the new configuration, reads no file of the node, and leaves nothing."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from proto.criu.v1 import images_pb2 as criu
from proto.runtime.v1 import cri_pb2
from runtime.checkpoint.restore import criu_images
from tests.support.agent import AgentProcess, wait_for
from tests.support.checkpoints import (
    abilities,
    checkpoint,
    content,
    image_of,
    lines_of,
    members,
    no_new_images,
    run_with,
    wait_for_lines,
)
from tests.support.pods import container_config, remove_all_pods, sandbox_config, wait_for_log

__all__ = ["no_new_images"]

# Reads a file of the image again and again, by a descriptor that it keeps.
SCRIPT = (
    "echo it > /word; exec 3</word; echo ready; i=0;"
    " while :; do i=$((i+1)); echo $i; cat /proc/self/fd/3 2>/dev/null; sleep 0.05; done"
)
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)


@pytest.fixture(scope="module")
def original(shared_agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of a container that was really saved."""
    why = abilities(shared_agent).get("crun", "it does not work here")
    if why != "able":
        pytest.skip(f"crun cannot make checkpoints here: {why}")
    _, container_id = run_with(shared_agent, "crun", "sh", "-c", SCRIPT)
    wait_for_log(shared_agent.client, container_id)
    wait_for_lines(shared_agent, container_id, 2)
    archive = tmp_path_factory.mktemp("original") / "it.tar"
    checkpoint(shared_agent, container_id, archive)
    remove_all_pods(shared_agent.client)
    return archive


def forged(original: Path, folder: Path, changes: Mapping[str, bytes]) -> Path:
    """A copy of the archive with other content of some members."""
    path = folder / "forged.tar"
    left = dict(changes)
    with tarfile.open(original) as source, tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as target:
        for member in source:
            if member.name in left:
                member.size = len(left[member.name])
                target.addfile(member, io.BytesIO(left.pop(member.name)))
            else:
                target.addfile(member, source.extractfile(member) if member.isreg() else None)
    assert not left, f"the archive has no {list(left)}"
    return path


def changed(original: Path, folder: Path, name: str, entries: list[Message], begin: int = 8) -> Path:
    """A copy of the archive with other entries in one of CRIU's images."""
    image = folder / "image"
    criu_images.write(image, content(original, name)[:begin], *entries)
    return forged(original, folder, {name: image.read_bytes()})


def entries(original: Path, folder: Path, name: str, kind: type[criu_images.M]) -> list[criu_images.M]:
    (folder / "source").write_bytes(content(original, name))
    return list(criu_images.entries(folder / "source", kind))


def restored(agent: AgentProcess, archive: Path) -> str:
    """A running container from an archive, in a new pod without any special right."""
    image = image_of(agent, archive)
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, "crun")
    container_id = agent.client.create(sandbox_id, container_config("main", image=image), sandbox)
    agent.client.start(container_id)
    return container_id


def refused(agent: AgentProcess, archive: Path) -> str:
    """What the agent says; no process and no container that runs is there then."""
    with pytest.raises(grpc.RpcError) as failure:
        restored(agent, archive)
    assert failure.value.code() in REFUSALS, failure.value.details()
    for container in agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers:
        assert container.state == cri_pb2.CONTAINER_EXITED
    remove_all_pods(agent.client)
    wait_for(lambda: agent.client.findings() == [], what="no difference between store and node")
    return str(failure.value.details())


def test_the_saved_spec_is_information_only(agent: AgentProcess, original: Path, tmp_path: Path) -> None:
    spec = json.loads(content(original, "spec.dump"))
    everything = ["CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_NET_ADMIN"]
    spec["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), everything)
    spec["linux"]["maskedPaths"] = spec["linux"]["readonlyPaths"] = []
    spec["linux"]["namespaces"] = []
    spec["linux"]["resources"] = {"devices": [{"allow": True, "access": "rwm"}]}
    spec["mounts"].append({"destination": "/node", "type": "bind", "source": "/", "options": ["rbind", "rw"]})
    spec["hooks"] = {"prestart": [{"path": "/bin/touch", "args": ["touch", str(tmp_path / "hooked")]}]}
    container_id = restored(agent, forged(original, tmp_path, {"spec.dump": json.dumps(spec).encode()}))
    wait_for_lines(agent, container_id, 2)
    status = agent.client.output(container_id, "cat", "/proc/1/status")
    (bounding,) = [line.split()[1] for line in status.splitlines() if line.startswith("CapBnd:")]
    assert int(bounding, 16) & (1 << 21 | 1 << 16 | 1 << 12) == 0
    assert agent.client.exec(container_id, "ls", "/node").exit_code != 0
    assert not (tmp_path / "hooked").exists()


def test_forged_rights_are_refused(agent: AgentProcess, original: Path, tmp_path: Path) -> None:
    core = entries(original, tmp_path, "checkpoint/core-1.img", criu.Core)
    core[0].thread_core.creds.cap_eff[0] |= 1 << 21
    assert "CAP_SYS_ADMIN" in refused(agent, changed(original, tmp_path, "checkpoint/core-1.img", [*core]))
    core = entries(original, tmp_path, "checkpoint/core-1.img", criu.Core)
    core[0].mtype = 3 if core[0].mtype != 3 else 1
    assert "its processes cannot run on" in refused(
        agent, changed(original, tmp_path, "checkpoint/core-1.img", [*core])
    )
    (name,) = [name for name in members(original) if name.startswith("checkpoint/mountpoints-")]
    mounts = entries(original, tmp_path, name, criu.Mount)
    mounts[-1].ext_key = "/etc/shadow"
    assert "belongs elsewhere" in refused(agent, changed(original, tmp_path, name, [*mounts]))


def test_the_path_of_an_open_file_leads_to_no_file_of_the_node(
    agent: AgentProcess, original: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the node's\n")
    for path in (str(secret), f"/../../../../../../../..{secret}", f"/proc/1/root{secret}"):
        files = entries(original, tmp_path, "checkpoint/files.img", criu.File)
        (word,) = [file for file in files if file.type == 1 and file.reg.name == "/word"]
        word.reg.name = path
        word.reg.ClearField("size")
        archive = changed(original, tmp_path, "checkpoint/files.img", [*files])
        try:
            container_id = restored(agent, archive)
        except grpc.RpcError as error:
            assert error.code() in REFUSALS, error.details()
        else:
            wait_for_lines(agent, container_id, 4)
            assert "the node's" not in lines_of(agent, container_id)
        remove_all_pods(agent.client)


def test_truncated_and_random_images(agent: AgentProcess, original: Path, tmp_path: Path) -> None:
    pages = content(original, "checkpoint/pages-1.img")
    told = refused(agent, forged(original, tmp_path, {"checkpoint/pages-1.img": pages[: len(pages) // 2]}))
    assert "pages-1.img is cut off" in told
    kinds = ("core-1", "pstree", "files", "mm-1", "fs-1", "pagemap-1", "ids-1", "inventory")
    for name in (f"checkpoint/{kind}.img" for kind in kinds):
        saved = content(original, name)
        cut, noise = saved[: len(saved) - 3], saved[:8] + bytes(255 - byte for byte in saved[8:])
        for broken in (cut, noise):
            assert refused(agent, forged(original, tmp_path, {name: broken}))


def test_a_restore_without_end_is_ended(agent: AgentProcess, original: Path) -> None:
    for stops in (False, True):
        image = image_of(agent, original)
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox, "crun")
        container_id = agent.client.create(sandbox_id, container_config("main", image=image), sandbox)
        os.truncate(agent.data / "containers" / container_id / "checkpoint" / "pages-1.img", 4096)
        with ThreadPoolExecutor(1) as pool:
            starting = pool.submit(agent.client.start, container_id)
            log = agent.run / "containers" / container_id / "restore.log"
            wait_for(lambda path=log: path.exists() and path.stat().st_size > 1 << 20, what="CRIU reading without end")
            if stops:
                agent.client.stop_sandbox(sandbox_id)
            with pytest.raises(grpc.RpcError) as failure:
                starting.result()
        assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION, failure.value.details()
        assert stops or "64 MiB of log" in failure.value.details()
        assert agent.client.status(container_id).state == cri_pb2.CONTAINER_EXITED
        remove_all_pods(agent.client)
        wait_for(lambda: agent.client.findings() == [], what="no difference between store and node")
        remove_image(agent, image)


def remove_image(agent: AgentProcess, name: str) -> None:
    request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=name))
    agent.client.call("RemoveImage", request)


def test_files_and_removed_names_stay_below_the_root(agent: AgentProcess, original: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, link in (("way", str(outside)), ("way/file", ""), ("../../../outside/file", "")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
            archive.addfile(member)
    try:
        restored(agent, forged(original, tmp_path, {"rootfs-diff.tar": made.getvalue()}))
    except grpc.RpcError as error:
        assert error.code() in REFUSALS, error.details()
    remove_all_pods(agent.client)
    names = [f"../../../../../../../../../..{outside}/kept"]
    assert "deleted.files" in refused(agent, forged(original, tmp_path, {"deleted.files": json.dumps(names).encode()}))
    assert [path.name for path in outside.iterdir()] == ["kept"]
