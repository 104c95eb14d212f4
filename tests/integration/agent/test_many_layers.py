"""Images of as many layers as the kernel mounts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from images.oci.layer_limit import MAX_LAYERS
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.image_builder import BuiltImage, busybox_layer, entry, make_tar
from tests.support.pods import container_config, sandbox_config


@pytest.fixture(scope="module")
def images(shared_agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, str]]:
    """Images of 130 layers, as containerd starts them, and of the most; by their numbers of layers."""
    folder: Path = tmp_path_factory.mktemp("images")
    layers = (busybox_layer(), *(make_tar([entry(f"layer/{number}", "x")]) for number in range(MAX_LAYERS - 1)))
    names = {}
    for number in (130, MAX_LAYERS):
        names[number] = f"layers:{number}"
        BuiltImage(layers[:number]).write_docker(folder / f"{number}.tar", names[number])
        request = agent_pb2.ImportImageRequest(path=str(folder / f"{number}.tar"))
        shared_agent.client.call("ImportImage", request, timeout=300)
    yield names
    for name in names.values():
        shared_agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=name)))


@pytest.mark.parametrize("user_namespace", [False, True], ids=["node's users", "user namespace"])
@pytest.mark.parametrize("number", [130, MAX_LAYERS])
@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_images_of_many_layers_run(
    agent: AgentProcess, images: dict[int, str], handler: str, number: int, user_namespace: bool
) -> None:
    sandbox = sandbox_config(agent)
    config = container_config("main", "sleep", "1000", image=images[number])
    config.mounts.add(container_path="/again", image=cri_pb2.ImageSpec(image=images[number]), readonly=True)
    if user_namespace:
        options = sandbox.linux.security_context.namespace_options
        options.userns_options.mode = cri_pb2.POD
        options.userns_options.uids.add(host_id=400_000, container_id=0, length=65536)
        options.userns_options.gids.add(host_id=400_000, container_id=0, length=65536)
        config.linux.security_context.namespace_options.CopyFrom(options)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    for root in ("", "/again"):
        listed = agent.client.output(container_id, "sh", "-c", f"ls {root}/layer | wc -l; stat -c %u {root}/layer/0")
        assert listed.split() == [str(number - 1), "0"]
    folders = {path.name for path in (agent.run / "containers" / container_id).iterdir() if path.is_dir()}
    assert folders - {"devices"} == {"images", "rootfs"}, "no folder of links or of mapped layers stays"
