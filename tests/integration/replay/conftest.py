from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from tests.integration.replay import recording
from tests.integration.replay.player import Played, Player
from tests.integration.replay.recording import Names
from tests.support.agent import AgentProcess
from tests.support.image_builder import busybox_image, digest_of, entry, make_tar
from tests.support.pods import remove_all_pods
from tests.support.ports import free_port
from tests.support.registry import run_registry

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

# As in the recorded image, so that users and groups can be compared.
ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\nwheel:x:10:root\n",
}


@dataclass(frozen=True)
class Kubelet:
    """The world a kubelet would have made around the agent: its folders, its cgroups and a registry."""

    folder: Path
    names: dict[str, str]


@pytest.fixture(scope="session")
def kubelet(shared_agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    folder = tmp_path_factory.mktemp("kubelet")
    tree = CgroupTree.of_host("cgroupfs")
    cgroup = f"/podkeel-kubelet-{secrets.token_hex(3)}"
    image = busybox_image(more_layers=[make_tar([entry(name, text) for name, text in ACCOUNTS.items()])])
    with run_registry() as registry:
        repository, _, tag = recording.IMAGE.partition("/")[2].partition(":")
        reference = registry.push(image, repository, tag)
        spec = cri_pb2.ImageSpec(image=reference)
        pulled = shared_agent.client.call("PullImage", cri_pb2.PullImageRequest(image=spec)).image_ref
        assert pulled == image.id
        names = {
            "registry.local:5000": registry.host,
            recording.IMAGE_ID: pulled,
            recording.IMAGE_DIGEST: digest_of(image.blobs()[1]),
            "/var/lib/kubelet": f"{folder}/lib",
            "/var/log/pods": f"{folder}/logs",
            "/srv/host": f"{folder}/host",
            '"/kubepods': f'"{cgroup}/kubepods',
            **{f'"host_port": {port}': f'"host_port": {free_port()}' for port in recording.HOST_PORTS},
        }
        (folder / "host").mkdir()
        try:
            yield Kubelet(folder, names)
        finally:
            remove_all_pods(shared_agent.client)
            shared_agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=spec))
            tree.remove(cgroup)


@pytest.fixture(scope="session")
def standalone(shared_agent: AgentProcess, kubelet: Kubelet) -> Played:
    return _play(shared_agent, kubelet, "standalone")


@pytest.fixture(scope="session")
def cluster(shared_agent: AgentProcess, kubelet: Kubelet) -> Played:
    return _play(shared_agent, kubelet, "cluster")


def _play(agent: AgentProcess, kubelet: Kubelet, name: str) -> Played:
    """The recording begins on a node without pods, and ends on one."""
    remove_all_pods(agent.client)
    played = Player(agent, name, Names(kubelet.names), kubelet.folder / "lib").play()
    assert agent.client.findings() == []
    return played
