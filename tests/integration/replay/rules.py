"""How a kubelet reads each answer: what must be there, and where the recorded agent and ours must agree."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from google.protobuf.json_format import MessageToDict

from proto.runtime.v1 import cri_pb2
from tests.integration.replay.player import Exchange, Played
from tests.integration.replay.recording import Json

ID = re.compile(r"[0-9a-f]{64}")


def check(played: Played, exchange: Exchange) -> None:
    """Assert that one answer is right."""
    expected_code = exchange.entry.code
    assert bool(exchange.code) == bool(expected_code), (exchange.code, exchange.message, "recorded:", expected_code)
    rule = RULES.get(exchange.entry.method)
    if rule is not None:
        rule(played, exchange)


def _given(message: Any, field: str) -> dict[str, str]:
    return dict(getattr(message, field))


def _version(_: Played, exchange: Exchange) -> None:
    answer = exchange.answer
    assert answer["runtime_name"] == "podkeel"
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", answer["runtime_version"])
    assert (answer["version"], answer["runtime_api_version"]) == ("0.1.0", "v1")


def _status(_: Played, exchange: Exchange) -> None:
    conditions = {condition["type"]: condition for condition in exchange.answer["status"]["conditions"]}
    assert conditions["RuntimeReady"]["status"] and conditions["NetworkReady"]["status"]
    names = [handler.get("name", "") for handler in exchange.answer["runtime_handlers"]]
    assert "" in names and len(names) >= 2
    assert exchange.answer["features"]["supplemental_groups_policy"]
    assert bool(exchange.answer.get("info")) == exchange.request.verbose


def _runtime_config(_: Played, exchange: Exchange) -> None:
    # cgroupfs has the value after the default, so it must be said.
    assert exchange.answer["linux"]["cgroup_driver"] == "CGROUPFS"


def _filesystem(_: Played, exchange: Exchange) -> None:
    for kind in ("image_filesystems", "container_filesystems"):
        (usage,) = exchange.answer[kind]
        assert int(usage["timestamp"]) > 0
        assert usage["fs_id"]["mountpoint"].startswith("/")
        assert "used_bytes" in usage and "inodes_used" in usage


def _new_id(key: str) -> Callable[[Played, Exchange], None]:
    def rule(_: Played, exchange: Exchange) -> None:
        if not exchange.entry.code:
            assert ID.fullmatch(exchange.answer[key])

    return rule


def _create(played: Played, exchange: Exchange) -> None:
    _new_id("container_id")(played, exchange)
    if exchange.entry.code:
        # kubelet takes the reason from the beginning of a message with this code.
        assert exchange.code in ("UNKNOWN", "INVALID_ARGUMENT")
        if exchange.code == "UNKNOWN":
            assert exchange.message.startswith("RROUnsupported")


def _start(_: Played, exchange: Exchange) -> None:
    if exchange.entry.code:
        assert "/no/such" in exchange.message


def _pull(_: Played, exchange: Exchange) -> None:
    assert exchange.code == "NOT_FOUND"
    assert exchange.request.image.image in exchange.message


def _sandbox(played: Played, ours: Json, theirs: Json) -> None:
    config = played.sandboxes[ours["id"]]
    assert ours["id"] == theirs["id"]
    assert ours["metadata"] == MessageToDict(config.metadata, preserving_proto_field_name=True)
    assert ours.get("labels", {}) == _given(config, "labels")
    assert ours.get("annotations", {}) == _given(config, "annotations")
    assert ours.get("state") == theirs.get("state")
    assert int(ours["created_at"]) > 10**18
    assert ours.get("runtime_handler") == theirs.get("runtime_handler")


def _sandbox_status(played: Played, exchange: Exchange) -> None:
    ours, theirs = exchange.answer["status"], exchange.expected["status"]
    _sandbox(played, ours, theirs)
    assert ours["linux"] == theirs["linux"]
    assert bool(ours["network"].get("ip")) == bool(theirs["network"].get("ip"))
    assert "additional_ips" not in ours["network"]


def _list_sandboxes(played: Played, exchange: Exchange) -> None:
    ours = {item["id"]: item for item in exchange.answer.get("items", [])}
    theirs = {item["id"]: item for item in exchange.expected.get("items", [])}
    assert ours.keys() == theirs.keys()
    for sandbox_id, item in ours.items():
        _sandbox(played, item, theirs[sandbox_id])


def _same_state(played: Played, ours: Json, theirs: Json) -> None:
    allowed = {theirs.get("state")}
    if ours["id"] in played.ended_alone and theirs.get("state") == "CONTAINER_RUNNING":
        allowed.add("CONTAINER_EXITED")  # it was quicker here
    assert ours.get("state") in allowed


def _container(played: Played, ours: Json, theirs: Json) -> None:
    config = played.containers[ours["id"]]
    assert ours["id"] == theirs["id"]
    assert ours.get("metadata") == theirs.get("metadata")
    assert ours.get("labels", {}) == _given(config, "labels")
    assert ours.get("annotations", {}) == _given(config, "annotations")
    assert ours["image_id"] == theirs["image_id"]
    assert "@sha256:" in ours["image_ref"]
    assert int(ours["created_at"]) > 10**18
    _same_state(played, ours, theirs)


def _list_containers(played: Played, exchange: Exchange) -> None:
    ours = {item["id"]: item for item in exchange.answer.get("containers", [])}
    theirs = {item["id"]: item for item in exchange.expected.get("containers", [])}
    assert ours.keys() <= theirs.keys()
    missing = theirs.keys() - ours.keys()
    assert not missing or (exchange.request.filter.HasField("state") and missing <= played.ended_alone)
    for container_id, item in ours.items():
        _container(played, item, theirs[container_id])
        assert item["pod_sandbox_id"] == theirs[container_id]["pod_sandbox_id"]


def _container_status(played: Played, exchange: Exchange) -> None:
    ours, theirs = exchange.answer["status"], exchange.expected["status"]
    _container(played, ours, theirs)
    config = played.containers[ours["id"]]
    assert ours["image_ref"] == theirs["image_ref"]
    assert ours["image"]["image"] == theirs["image"]["image"] == config.image.user_specified_image
    assert ours["log_path"] == theirs["log_path"]
    assert ours["stop_signal"] == theirs["stop_signal"]
    _check_mounts(ours.get("mounts", []), config)
    assert _limits_of(ours) == _limits_of(theirs)
    assert _user_of(ours) == _user_of(theirs), (ours["user"], theirs["user"])
    if ours.get("state") == theirs.get("state"):
        _check_times(ours)
    if ours.get("state") == theirs.get("state") == "CONTAINER_EXITED":
        for key in ("reason", "exit_code"):
            assert ours.get(key) == theirs.get(key), key
    if theirs.get("reason") == "StartError":
        assert "/no/such" in ours["message"]
    else:
        assert not ours.get("message")


def _check_mounts(shown: list[Json], config: cri_pb2.ContainerConfig) -> None:
    given = [MessageToDict(mount, preserving_proto_field_name=True) for mount in config.mounts]
    assert len(shown) == len(given)
    for ours, asked in zip(shown, given, strict=True):
        if "image" in asked:
            assert "sha256:" in ours["image"]["image"]
            assert ours["image"]["user_specified_image"] == asked["image"]["user_specified_image"]
        for key in ("container_path", "host_path", "readonly", "recursive_read_only", "propagation"):
            assert ours.get(key) == asked.get(key), key


def _check_times(ours: Json) -> None:
    created, started, finished = (int(ours.get(key, 0)) for key in ("created_at", "started_at", "finished_at"))
    state = ours.get("state", "CONTAINER_CREATED")
    if state == "CONTAINER_CREATED":
        assert started == finished == 0
    elif state == "CONTAINER_RUNNING":
        assert created < started and finished == 0
    else:
        assert created < started <= finished


def _limits_of(status: Json) -> Json:
    limits = dict(status["resources"]["linux"])
    limits.pop("hugepage_limits", None)  # all of them 0 here, which the recorded agent left out
    if str(limits.get("oom_score_adj", "")).startswith("-"):
        del limits["oom_score_adj"]  # the recorded agent shows what it was allowed to set: nothing
    return limits


def _user_of(status: Json) -> tuple[str, str, set[str]]:
    user = status["user"]["linux"]
    return user.get("uid", "0"), user.get("gid", "0"), set(user["supplemental_groups"])


def _image_status(_: Played, exchange: Exchange) -> None:
    ours, theirs = exchange.answer.get("image"), exchange.expected.get("image")
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        for key in ("id", "repo_tags", "repo_digests", "uid", "username", "pinned"):
            assert ours.get(key) == theirs.get(key), key
        assert int(ours["size"]) > 0


def _update_container(_: Played, exchange: Exchange) -> None:
    linux, kernel = exchange.request.linux, exchange.notes
    if "memory.max" in kernel:
        assert kernel["memory.max"] == str(linux.memory_limit_in_bytes)
        assert kernel["cpu.max"] == f"{linux.cpu_quota} {linux.cpu_period}"
    else:
        assert kernel["memory.limit_in_bytes"] == str(linux.memory_limit_in_bytes)
        assert kernel["cpu.cfs_quota_us"] == str(linux.cpu_quota)
        assert kernel["cpu.shares"] == str(linux.cpu_shares)


def _stream(_: Played, exchange: Exchange) -> None:
    # A token of 64 bits has at least 11 characters in the densest alphabet that a URL takes.
    path = exchange.entry.method.lower()
    assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/{path}/[A-Za-z0-9_-]{{11,}}", exchange.answer["url"])


def _descriptors(_: Played, exchange: Exchange) -> None:
    found = {descriptor["name"]: descriptor for descriptor in exchange.answer["descriptors"]}
    assert len(found) == len(exchange.answer["descriptors"])
    assert all(descriptor["help"] for descriptor in found.values())
    assert {"container_cpu_usage_seconds_total", "container_memory_working_set_bytes"} <= found.keys()


def _same_answer(_: Played, exchange: Exchange) -> None:
    assert exchange.answer == exchange.expected


RULES: dict[str, Callable[[Played, Exchange], None]] = {
    "Version": _version,
    "Status": _status,
    "RuntimeConfig": _runtime_config,
    "ImageFsInfo": _filesystem,
    "RunPodSandbox": _new_id("pod_sandbox_id"),
    "PodSandboxStatus": _sandbox_status,
    "ListPodSandbox": _list_sandboxes,
    "CreateContainer": _create,
    "StartContainer": _start,
    "ContainerStatus": _container_status,
    "ListContainers": _list_containers,
    "UpdateContainerResources": _update_container,
    "ImageStatus": _image_status,
    "PullImage": _pull,
    "ListContainerStats": _same_answer,  # asked before there were any, as the other
    "ListPodSandboxStats": _same_answer,
    "ListMetricDescriptors": _descriptors,
    "ExecSync": _same_answer,
    "Exec": _stream,
    "Attach": _stream,
    "PortForward": _stream,
    "StopContainer": _same_answer,
    "RemoveContainer": _same_answer,
    "StopPodSandbox": _same_answer,
    "RemovePodSandbox": _same_answer,
    "UpdatePodSandboxResources": _same_answer,
}
