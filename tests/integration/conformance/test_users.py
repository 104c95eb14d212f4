"""Users, groups and supplemental groups."""

from __future__ import annotations

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.conftest import MakeImage
from tests.integration.conformance.support import Pod, refused
from tests.support.agent import AgentProcess
from tests.support.pods import container_config

MERGE = cri_pb2.SupplementalGroupsPolicy.Merge
STRICT = cri_pb2.SupplementalGroupsPolicy.Strict


def _ids(pod: Pod, config: cri_pb2.ContainerConfig) -> tuple[int, int, set[int]]:
    """What the process has, after a look that the status says the same."""
    config.command[:] = ["sh", "-c", "id -u; id -g; id -G"]
    status = pod.finished(config)
    with open(status.log_path) as log:
        uid, gid, groups = (line.split(" ", 3)[3].split() for line in log)
    user = status.user.linux
    assert (user.uid, user.gid) == (int(uid[0]), int(gid[0]))
    assert set(user.supplemental_groups) | {user.gid} == {int(group) for group in groups}
    return int(uid[0]), int(gid[0]), {int(group) for group in groups}


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (0, 0, {0})),
        ("1000", (1000, 1000, {1000, 29, 100})),
        ("user", (1000, 1000, {1000, 29, 100})),
        ("1000:33", (1000, 33, {33, 29, 100})),
        ("user:daemon", (1000, 1, {1, 29, 100})),
        ("user:33", (1000, 33, {33, 29, 100})),
        ("4321", (4321, 0, {0})),
        ("4321:5432", (4321, 5432, {5432})),
    ],
)
def test_user_of_the_image(pod: Pod, image: MakeImage, user: str, expected: tuple[int, int, set[int]]) -> None:
    reference = image("user", {"User": user})
    assert _ids(pod, container_config("main", image=reference)) == expected


def test_configuration_goes_before_the_image(pod: Pod, image: MakeImage) -> None:
    reference = image("user", {"User": "user:daemon"})
    by_id = container_config("id", image=reference)
    by_id.linux.security_context.run_as_user.value = 33
    assert _ids(pod, by_id) == (33, 33, {33})
    by_name = container_config("name", image=reference)
    by_name.linux.security_context.run_as_username = "www-data"
    assert _ids(pod, by_name) == (33, 33, {33})
    with_group = container_config("group", image=reference)
    with_group.linux.security_context.run_as_user.value = 1000
    with_group.linux.security_context.run_as_group.value = 5000
    assert _ids(pod, with_group) == (1000, 5000, {5000, 29, 100})


@pytest.mark.parametrize(("policy", "expected"), [(MERGE, {1000, 29, 100, 2000}), (STRICT, {1000, 2000})])
def test_supplemental_groups(pod: Pod, policy: cri_pb2.SupplementalGroupsPolicy, expected: set[int]) -> None:
    config = container_config("main")
    context = config.linux.security_context
    context.run_as_user.value = 1000
    context.supplemental_groups.extend([2000, 2000])
    context.supplemental_groups_policy = policy
    assert _ids(pod, config)[2] == expected


def test_missing_users_are_refused(pod: Pod, image: MakeImage) -> None:
    named = container_config("named", "id")
    named.linux.security_context.run_as_username = "nobodyhere"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "nobodyhere"):
        pod.create(named)
    group = container_config("group", "id")
    group.linux.security_context.run_as_group.value = 1000
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "run_as_group"):
        pod.create(group)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "missing"):
        pod.create(container_config("image", "id", image=image("missing", {"User": "user:missing"})))


def test_image_says_its_user(agent: AgentProcess, image: MakeImage) -> None:
    for user, uid, name in (("1000:33", 1000, ""), ("user:33", None, "user"), ("", None, ""), ("0", 0, "")):
        spec = cri_pb2.ImageSpec(image=image("said", {"User": user}))
        answer = agent.client.call("ImageStatus", cri_pb2.ImageStatusRequest(image=spec)).image
        assert answer.HasField("uid") == (uid is not None)
        assert (answer.uid.value, answer.username) == (uid or 0, name)


def test_non_root_user_in_a_pod_namespace_owns_its_terminal(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "echo hello > /dev/stdout; echo end", tty=True, stdin=True)
    config.linux.security_context.run_as_user.value = 1000
    text = pod.printed(config)
    assert text.replace("\r", "") == "hello\nend\n"
