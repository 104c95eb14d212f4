"""Images as volumes."""

from __future__ import annotations

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.conftest import MakeImage
from tests.integration.conformance.support import SLEEP, Pod, refused
from tests.support.pods import container_config

PATH = "/mnt/image-volume"


@pytest.fixture
def image_id(pod: Pod, image: MakeImage) -> str:
    """An image by its id, as PullImage answers it and kubelet passes it on."""
    spec = cri_pb2.ImageSpec(image=image("volume", {"User": "1000"}))
    return str(pod.agent.client.call("PullImage", cri_pb2.PullImageRequest(image=spec)).image_ref)


def _config(
    name: str, image_id: str, *command: str, sub_path: str = "", readonly: bool = True
) -> cri_pb2.ContainerConfig:
    config = container_config(name, *command)
    image = cri_pb2.ImageSpec(image=image_id, user_specified_image="volume:latest")
    config.mounts.add(container_path=PATH, readonly=readonly, image=image, image_sub_path=sub_path)
    return config


def test_content_is_there_read_only_and_can_be_executed(pod: Pod, image_id: str) -> None:
    client = pod.agent.client
    container_id = pod.start(_config("main", image_id, *SLEEP))
    assert client.output(container_id, "ls", "-A", f"{PATH}/bin/sh") == f"{PATH}/bin/sh\n"
    answer = client.exec(container_id, "touch", f"{PATH}/test-write")
    assert answer.exit_code != 0
    assert b"Read-only file system" in answer.stderr
    assert "busybox" in client.output(container_id, f"{PATH}/bin/ls", f"{PATH}/bin")


def test_status_shows_the_id_of_the_image(pod: Pod, image_id: str) -> None:
    (mount,) = pod.agent.client.status(pod.create(_config("main", image_id, *SLEEP))).mounts
    assert (mount.container_path, mount.readonly, mount.host_path) == (PATH, True, "")
    assert (mount.image.image, mount.image.user_specified_image) == (image_id, "volume:latest")
    assert mount.image.image_ref == image_id


def test_path_below_the_image(pod: Pod, image_id: str) -> None:
    container_id = pod.start(_config("main", image_id, *SLEEP, sub_path="etc"))
    assert pod.agent.client.output(container_id, "ls", f"{PATH}/passwd") == f"{PATH}/passwd\n"
    assert pod.agent.client.exec(container_id, "ls", f"{PATH}/etc/passwd").exit_code != 0


def test_what_cannot_be_is_refused(pod: Pod, image_id: str) -> None:
    with refused(grpc.StatusCode.UNKNOWN, "^ImageVolumeMountFailed.*not-existing"):
        pod.create(_config("missing", image_id, *SLEEP, sub_path="not-existing"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "readonly"):
        pod.create(_config("writable", image_id, *SLEEP, readonly=False))
    with refused(grpc.StatusCode.UNKNOWN, "^ImageVolumeMountFailed"):
        pod.create(_config("absent", "no/such:1", *SLEEP))
    assert not pod.agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
