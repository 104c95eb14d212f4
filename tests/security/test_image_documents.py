"""Images are not trusted: no manifest or config can stop the agent or its lists."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from host.untrusted_json import DEEPEST
from images.oci.layer_limit import MAX_LAYERS
from proto.runtime.v1 import cri_pb2
from tests.integration.agent.refusals import refused
from tests.support.agent import PATIENCE, AgentProcess
from tests.support.image_builder import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, descriptor, digest_of
from tests.support.pods import container_config, sandbox_config
from tests.support.scripted_registry import Answer, ScriptedRegistry, run_scripted_registry, small_image

HUGE_USER = "99999999999999999999"
NESTED = "[" * 3000 + "]" * 3000


@pytest.fixture
def scripted() -> Iterator[ScriptedRegistry]:
    with run_scripted_registry() as running:
        yield running


def pull(agent: AgentProcess, name: str, user: str = "", password: str = "") -> str:
    auth = cri_pb2.AuthConfig(username=user, password=password)
    request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=name), auth=auth)
    return str(agent.client.call("PullImage", request).image_ref)


def remove(agent: AgentProcess, name: str) -> None:
    agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=name)))


def status(agent: AgentProcess, name: str) -> cri_pb2.ImageStatusResponse:
    request = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=name), verbose=True)
    answer: cri_pb2.ImageStatusResponse = agent.client.call("ImageStatus", request)
    return answer


def peak_memory(agent: AgentProcess) -> int:
    """The highest memory usage of the agent so far, in bytes."""
    assert agent.process is not None
    lines = Path(f"/proc/{agent.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10


def forget_peak(agent: AgentProcess) -> None:
    assert agent.process is not None
    Path(f"/proc/{agent.process.pid}/clear_refs").write_text("5")


def test_a_manifest_that_could_be_an_index_is_refused(quiet_log: AgentProcess, scripted: ScriptedRegistry) -> None:
    image, _, blobs = small_image()
    index = {"manifests": [descriptor(OCI_MANIFEST, image)]}
    both = {**json.loads(image), **index}
    for document, content_type, media_type in (
        (both, OCI_MANIFEST, OCI_MANIFEST),
        (both, OCI_INDEX, OCI_INDEX),
        (both, "application/json", None),
        (json.loads(image), OCI_INDEX, OCI_MANIFEST),
        (json.loads(image), OCI_INDEX, None),
        ({"schemaVersion": 2, **index}, OCI_MANIFEST, OCI_INDEX),
    ):
        content = json.dumps({**document, "mediaType": media_type}).encode()
        name = scripted.offer("both", content, content_type, *blobs)
        refused("INVALID_ARGUMENT", name, "ambiguous", call=partial(pull, quiet_log, name))
    entry = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor(OCI_INDEX, image)]})
    scripted.offer("both", image, "application/json", *blobs)
    name = scripted.offer("both", entry.encode(), OCI_INDEX)
    refused("INVALID_ARGUMENT", name, "ambiguous", call=lambda: pull(quiet_log, name))


def test_a_manifest_of_25000_layers_is_refused_at_once(quiet_log: AgentProcess, scripted: ScriptedRegistry) -> None:
    layers = [
        {"mediaType": OCI_LAYER, "digest": digest_of(str(number).encode()), "size": 1} for number in range(25_000)
    ]
    config = {"rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}}
    manifest, kind, blobs = small_image(config, layers=[{"digest": layer["digest"], "size": 1} for layer in layers])
    assert len(manifest) > 2 << 20
    name = scripted.offer("many", manifest, kind, *blobs)
    forget_peak(quiet_log)
    before = peak_memory(quiet_log)
    slowest = _slowest_version_during(quiet_log, name, f"at most {MAX_LAYERS}")
    assert slowest < PATIENCE
    assert peak_memory(quiet_log) - before < 64 << 20
    assert not scripted.requests("/blobs/"), "no layer may be asked for"
    manifest, kind, blobs = small_image(config, layers=layers[: MAX_LAYERS + 1])
    name = scripted.offer("many", manifest, kind, *blobs)
    refused("INVALID_ARGUMENT", name, str(MAX_LAYERS + 1), call=lambda: pull(quiet_log, name))
    assert not scripted.requests("/blobs/")


def _slowest_version_during(agent: AgentProcess, name: str, words: str) -> float:
    """The duration of the slowest Version call during a pull, which must fail with ``words``."""
    slowest = 0.0
    done = threading.Event()

    def ask() -> None:
        nonlocal slowest
        while not done.is_set():
            begin = time.monotonic()
            agent.client.call("Version", cri_pb2.VersionRequest())
            slowest = max(slowest, time.monotonic() - begin)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        refused("INVALID_ARGUMENT", name, words, call=lambda: pull(agent, name))
    finally:
        done.set()
        thread.join()
    return slowest


def test_a_config_of_many_values_is_refused_in_little_memory(
    quiet_log: AgentProcess, scripted: ScriptedRegistry
) -> None:
    labels = {f"{number}": "" for number in range(550_000)}
    name = scripted.offer_image("labels", {"config": {"Labels": labels}})
    forget_peak(quiet_log)
    before = peak_memory(quiet_log)
    slowest = _slowest_version_during(quiet_log, name, "values")
    assert slowest < PATIENCE
    assert peak_memory(quiet_log) - before < 64 << 20


def test_nested_documents_are_refused(quiet_log: AgentProcess, scripted: ScriptedRegistry) -> None:
    image, kind, blobs = small_image()
    for content in (f'{{"schemaVersion": 2, "config": {NESTED}}}', f'{{"annotations": {NESTED}, ' + image.decode()[1:]):
        name = scripted.offer("nested", content.encode(), kind, *blobs)
        refused("INVALID_ARGUMENT", name, f"nests more than {DEEPEST}", call=partial(pull, quiet_log, name))
    config = f'{{"config": {{"Labels": {NESTED}}}, "rootfs": {{"diff_ids": []}}}}'.encode()
    manifest = {**json.loads(image), "config": descriptor(OCI_CONFIG, config)}
    name = scripted.offer("nested", json.dumps(manifest).encode(), kind, config)
    refused("INVALID_ARGUMENT", name, f"nests more than {DEEPEST}", call=lambda: pull(quiet_log, name))


@pytest.mark.parametrize("user", [HUGE_USER, str(2**63), "\u0661", "\u00b2", "-1", "9" * 4000])
def test_users_out_of_the_cri_s_range_do_not_fail_lists(
    quiet_log: AgentProcess, scripted: ScriptedRegistry, user: str
) -> None:
    agent = quiet_log
    name = scripted.offer_image("user", {"config": {"User": f"{user}:5", "Cmd": ["sh"]}})
    image_id = pull(agent, name)
    try:
        listed = agent.client.call("ListImages", cri_pb2.ListImagesRequest()).images
        streamed = [
            image
            for answer in agent.client.stream("StreamImages", cri_pb2.StreamImagesRequest())
            for image in answer.images
        ]
        for images in (listed, streamed):
            (found,) = [image for image in images if image.id == image_id]
            assert (found.username, found.HasField("uid")) == (user, False)
        answer = status(agent, name)
        assert answer.image.username == user
        assert json.loads(answer.info["info"])["imageSpec"]["config"]["User"] == f"{user}:5"
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        config = container_config("main", "sh", image=name)
        message = refused("INVALID_ARGUMENT", user[:50], call=lambda: agent.client.create(sandbox_id, config, sandbox))
        assert "user" in message
    finally:
        remove(agent, name)


def test_the_largest_user_number_is_reported(quiet_log: AgentProcess, scripted: ScriptedRegistry) -> None:
    name = scripted.offer_image("user", {"config": {"User": str(2**63 - 1)}})
    pull(quiet_log, name)
    assert status(quiet_log, name).image.uid.value == 2**63 - 1
    remove(quiet_log, name)


def test_bytes_that_are_no_text_do_not_fail_a_verbose_status(
    quiet_log: AgentProcess, scripted: ScriptedRegistry
) -> None:
    image, kind, (config, layer) = small_image()
    config = config[:-1] + b', "comment": "\xff\xfe"}'
    manifest = {**json.loads(image), "config": descriptor(OCI_CONFIG, config)}
    name = scripted.offer("bytes", json.dumps(manifest).encode(), kind, config, layer)
    pull(quiet_log, name)
    assert json.loads(status(quiet_log, name).info["info"])["imageSpec"]["comment"] == "\ufffd\ufffd"
    remove(quiet_log, name)


def test_documents_have_limits(quiet_log: AgentProcess, scripted: ScriptedRegistry) -> None:
    image, kind, blobs = small_image()
    name = scripted.offer("large", image[:-1] + b" " * (4 << 20) + b"}", kind, *blobs)
    refused("INVALID_ARGUMENT", "larger than 4194304", call=lambda: pull(quiet_log, name))

    def endless(_: object) -> Answer:
        return Answer((b" " * 65536 for _ in range(10_000)), kind)

    scripted.answers["/v2/large/manifests/latest"] = endless
    refused("INVALID_ARGUMENT", "larger than 4194304", call=lambda: pull(quiet_log, name))
    assert scripted.sent["/v2/large/manifests/latest"] < 64 << 20
    config = blobs[0][:-1] + b" " * (8 << 20) + b"}"
    manifest = {**json.loads(image), "config": descriptor(OCI_CONFIG, config)}
    name = scripted.offer("large", json.dumps(manifest).encode(), kind, config)
    refused("INVALID_ARGUMENT", "larger than 8388608", call=lambda: pull(quiet_log, name))


ODD_CONFIGS: dict[str, dict[str, object]] = {
    "NUL in a variable": {"Env": ["A=\x00"]},
    "NUL in a command": {"Entrypoint": ["sh\x00", "-c", "true"]},
    "NUL in a working directory": {"WorkingDir": "/a\x00b"},
    "NUL in a user": {"User": "a\x00b"},
    "NUL in a volume": {"Volumes": {"/a\x00b": {}}},
    "no such signal": {"StopSignal": "SIGFOO"},
    "signal beyond numbers": {"StopSignal": "99999999999999999999"},
    "NUL in a signal": {"StopSignal": "SIG\x00TERM"},
    "group beyond numbers": {"User": "0:99999999999999999999"},
    "long working directory": {"WorkingDir": "/" + "a/" * 5000},
    "long volume": {"Volumes": {"/" + "a" * 300: {}}},
    "many volumes": {"Volumes": {f"/v{number}": {} for number in range(20_000)}},
    "long variable": {"Env": ["A=" + "x" * 300_000]},
}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_no_value_of_a_config_causes_an_internal_error(
    quiet_log: AgentProcess, scripted: ScriptedRegistry, name: str
) -> None:
    agent = quiet_log
    reference = scripted.offer_image("odd", {"config": {"Cmd": ["/bin/true"], **ODD_CONFIGS[name]}})
    pull(agent, reference)
    try:
        status(agent, reference)
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        config = container_config("main", image=reference)
        try:
            container_id = agent.client.create(sandbox_id, config, sandbox)
            agent.client.start(container_id)
        except grpc.RpcError as error:
            assert error.code().name in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), error.details()
    finally:
        remove(agent, reference)


def test_large_configs_are_not_kept_in_memory(quiet_log: AgentProcess, scripted: ScriptedRegistry) -> None:
    agent = quiet_log
    assert agent.process is not None
    status_file = Path(f"/proc/{agent.process.pid}/status")
    names = []
    try:
        for number in range(6):
            text = f"{number}" * (7 << 20)
            names.append(scripted.offer_image(f"large{number}", {"config": {"Labels": {"text": text}}, "comment": "x"}))
            pull(agent, names[-1])
            if number == 0:
                forget_peak(agent)
                before = memory(status_file)
        assert memory(status_file) - before < 32 << 20
        info = json.loads(status(agent, names[3]).info["info"])
        assert info["imageSpec"]["config"]["Labels"]["text"] == "3" * (7 << 20)
    finally:
        for name in names:
            remove(agent, name)


def memory(status_file: Path) -> int:
    """The present memory usage of the process, from /proc/<pid>/status, in bytes."""
    lines = status_file.read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) << 10
