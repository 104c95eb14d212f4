"""The image calls over a real registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, Pod, refused
from tests.support.agent import AgentProcess, wait_for
from tests.support.cri import CriClient
from tests.support.image_builder import BuiltImage, busybox_image, digest_of, entry, make_tar
from tests.support.pods import container_config
from tests.support.registry import Registry


def _spec(reference: str) -> cri_pb2.ImageSpec:
    return cri_pb2.ImageSpec(image=reference)


def _pull(client: CriClient, reference: str) -> str:
    return str(client.call("PullImage", cri_pb2.PullImageRequest(image=_spec(reference))).image_ref)


def _status(client: CriClient, reference: str) -> cri_pb2.Image | None:
    answer = client.call("ImageStatus", cri_pb2.ImageStatusRequest(image=_spec(reference)))
    return answer.image if answer.HasField("image") else None


def _remove(client: CriClient, reference: str) -> None:
    client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=_spec(reference)))


def _listed(client: CriClient, reference: str = "") -> list[cri_pb2.Image]:
    wanted = cri_pb2.ImageFilter(image=_spec(reference)) if reference else None
    images = list(client.call("ListImages", cri_pb2.ListImagesRequest(filter=wanted)).images)
    streamed = client.stream("StreamImages", cri_pb2.StreamImagesRequest(filter=wanted))
    assert images == [image for part in streamed for image in part.images]
    return images


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    """An image with a layer that no other has."""
    return busybox_image({"User": "1000"}, [make_tar([entry("own", "x" * 300_000)])])


@pytest.fixture
def client(agent: AgentProcess, built: BuiltImage) -> Iterator[CriClient]:
    yield agent.client
    _remove(agent.client, built.id)


def test_one_id_everywhere(client: CriClient, registry: Registry, built: BuiltImage) -> None:
    reference = registry.push(built, "conformance/one")
    assert _status(client, reference) is None
    assert _listed(client, reference) == []
    assert _pull(client, reference) == built.id
    image = _status(client, reference)
    assert image is not None
    repository = reference.rpartition(":")[0]
    digest = f"{repository}@{digest_of(built.blobs()[1])}"
    assert (image.id, list(image.repo_tags), list(image.repo_digests)) == (built.id, [reference], [digest])
    assert (image.uid.value, image.username, image.pinned) == (1000, "", False)
    assert image.size > 300_000
    assert image.spec.image == built.id
    forms = (reference, digest, f"{reference}@{digest_of(built.blobs()[1])}", built.id, built.id[7:], built.id[7:20])
    for form in forms:
        assert _status(client, form) == image, form
        assert _listed(client, form) == [image], form
    assert image in _listed(client)
    assert _status(client, repository) == image  # without a tag it is the latest
    assert _status(client, f"{repository}:other") is None


def test_verbose_status_has_the_configuration(client: CriClient, registry: Registry, built: BuiltImage) -> None:
    reference = registry.push(built, "conformance/verbose")
    _pull(client, reference)
    request = cri_pb2.ImageStatusRequest(image=_spec(reference), verbose=True)
    assert '"User":"1000"' in client.call("ImageStatus", request).info["info"].replace(" ", "")


def test_verbose_status_is_valid_for_any_configuration(client: CriClient, registry: Registry) -> None:
    half_a_pair = "\ud83d"  # which JSON can hold, but no protobuf message and no terminal
    odd = BuiltImage((make_tar([entry("odd", "")]),), {"Labels": {"odd": half_a_pair}, "Env": [f"A={half_a_pair}"]})
    reference = registry.push(odd, "conformance/odd")
    _pull(client, reference)
    request = cri_pb2.ImageStatusRequest(image=_spec(reference), verbose=True)
    information = json.loads(client.call("ImageStatus", request).info["info"])
    assert information["imageSpec"]["config"]["Labels"] == {"odd": "\ufffd"}


def test_pull_by_digest_keeps_no_tag(client: CriClient, registry: Registry, built: BuiltImage) -> None:
    reference = registry.push(built, "conformance/digest")
    digest = f"{reference.rpartition(':')[0]}@{digest_of(built.blobs()[1])}"
    assert _pull(client, digest) == built.id
    image = _status(client, digest)
    assert image is not None
    assert (list(image.repo_tags), list(image.repo_digests)) == ([], [digest])
    assert _status(client, reference) is None


def test_removal_takes_all_names(client: CriClient, registry: Registry, built: BuiltImage) -> None:
    references = [registry.push(built, f"conformance/{name}", tag) for name in ("a", "b") for tag in ("1", "2")]
    assert {_pull(client, reference) for reference in references} == {built.id}
    image = _status(client, built.id)
    assert image is not None
    assert sorted(image.repo_tags) == sorted(references)
    assert len(image.repo_digests) == 2
    for _ in range(2):
        _remove(client, references[2])
        assert all(_status(client, reference) is None for reference in (*references, built.id))


def test_removal_many_times_at_once(client: CriClient, registry: Registry, built: BuiltImage) -> None:
    reference = registry.push(built, "conformance/many")
    _pull(client, reference)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: _remove(client, name), [reference, built.id] * 4))
    assert _status(client, reference) is None
    _remove(client, "registry.invalid/never/was:1")


def test_pull_at_once_is_one(client: CriClient, registry: Registry, built: BuiltImage) -> None:
    reference = registry.push(built, "conformance/together")
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: _pull(client, reference), range(4))) == {built.id}
    assert len(_listed(client, reference)) == 1


def test_tag_that_moves(client: CriClient, registry: Registry, built: BuiltImage) -> None:
    other = busybox_image({"User": "33"})
    reference = registry.push(other, "conformance/moves")
    _pull(client, reference)
    try:
        registry.push(built, "conformance/moves")
        assert _pull(client, reference) == built.id
        old = _status(client, other.id)
        assert old is not None
        assert list(old.repo_tags) == []
        assert len(old.repo_digests) == 1
    finally:
        _remove(client, other.id)


def test_containers_outlive_their_image(pod: Pod, client: CriClient, registry: Registry, built: BuiltImage) -> None:
    reference = registry.push(built, "conformance/used")
    _pull(client, reference)
    container_id = pod.start(container_config("main", *SLEEP, image=reference))
    before = client.status(container_id)
    assert before.image_ref == f"{reference.rpartition(':')[0]}@{digest_of(built.blobs()[1])}"
    _remove(client, reference)
    assert client.output(container_id, "wc", "-c", "/own").split()[0] == "300000"
    after = client.status(container_id)
    assert (after.image_id, after.image_ref, after.image) == (before.image_id, before.image_ref, before.image)
    with refused(grpc.StatusCode.NOT_FOUND, "used"):
        pod.create(container_config("other", *SLEEP, image=reference))


def test_image_in_use_is_listed_by_its_id_after_its_name_moved(
    pod: Pod, client: CriClient, registry: Registry, built: BuiltImage
) -> None:
    """Who removes what no container in the list names must not hit the images of containers."""
    reference = registry.push(built, "conformance/renamed")
    _pull(client, reference)
    config = container_config("main", *SLEEP, image=built.id)
    config.image.user_specified_image = reference
    container_id = pod.create(config)
    odd = container_config("odd", *SLEEP, image=built.id)
    odd.image.user_specified_image = "no reference at all!"
    pod.create(odd)

    def listed() -> list[str]:
        items = client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
        return [item.image.image for item in items]

    assert listed() == [reference, "no reference at all!"]
    other = busybox_image({"User": "34"})
    registry.push(other, "conformance/renamed")
    _pull(client, reference)
    try:
        assert listed() == [built.id, "no reference at all!"]
        assert client.status(container_id).image.image == reference
    finally:
        _remove(client, other.id)
    assert listed() == [reference, "no reference at all!"]


def _used(client: CriClient) -> tuple[int, int]:
    answer = client.call("ImageFsInfo", cri_pb2.ImageFsInfoRequest())
    (images,), (containers,) = answer.image_filesystems, answer.container_filesystems
    assert images.timestamp > 0
    assert images.fs_id.mountpoint.startswith("/")
    assert containers.fs_id.mountpoint.startswith("/")
    return images.used_bytes.value, images.inodes_used.value


def test_filesystem_usage_rises_and_falls(client: CriClient, registry: Registry, built: BuiltImage) -> None:
    reference = registry.push(built, "conformance/usage")
    before = _used(client)
    _pull(client, reference)
    during = _used(client)
    assert during[0] >= before[0] + 300_000
    assert during[1] > before[1]
    _remove(client, reference)
    wait_for(lambda: _used(client) == before, what="the fall of the usage")


def test_errors(client: CriClient, registry: Registry) -> None:
    for reference in (f"{registry.host}/no/such:1", f"{registry.host}/conformance/one:nosuchtag"):
        with refused(grpc.StatusCode.NOT_FOUND, reference):
            _pull(client, reference)
    with refused(grpc.StatusCode.UNKNOWN, "^RegistryUnavailable"):
        _pull(client, "127.0.0.1:9/no/such:1")
    for reference in ("", "host.example/UPPER", "a b", "http://host/name", "name:bad tag"):
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            _pull(client, reference)
    for absent in ("0" * 64, f"sha256:{'0' * 64}", "no/such:1", f"no/such@sha256:{'0' * 64}"):
        for _ in range(2):
            _remove(client, absent)
        assert _status(client, absent) is None
        assert _listed(client, absent) == []
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        _status(client, "")
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        _remove(client, "")
