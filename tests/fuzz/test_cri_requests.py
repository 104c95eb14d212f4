"""Every call of the CRI with random messages: the agent refuses or executes it, but never fails internally.

A round that fails prints its seed; set ``PODKEEL_FUZZ_SEED`` to repeat it.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from host.files.mounts import mount_table
from proto.runtime.v1 import cri_pb2
from tests.fuzz.messages import TEXTS, Messages
from tests.support.agent import BUSYBOX, AgentProcess, running_agent
from tests.support.fuzz import rounds, seconds
from tests.support.pods import container_config, remove_all_pods, sandbox_config

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

METHODS: dict[str, MethodDescriptor] = {
    method.name: method for service in cri_pb2.DESCRIPTOR.services_by_name.values() for method in service.methods
}
# Calls that create objects are more frequent than those that only report.
WEIGHTS = {
    "RunPodSandbox": 12,
    "CreateContainer": 30,
    "StartContainer": 6,
    "UpdateContainerResources": 6,
    "ExecSync": 4,
}
REASONS = re.compile("RegistryUnavailable|SignatureValidationFailed|RROUnsupported|ImageVolumeMountFailed")
CALL_SECONDS = 30.0


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("fuzzed"), busybox) as agent:
        yield agent


class Client:
    """Sends random requests to an agent with one pod and one container, and checks the answers."""

    def __init__(self, agent: AgentProcess, seed: int) -> None:
        self.agent = agent
        self.random = random.Random(seed)
        self.folder = agent.folder / "volumes"
        (self.folder / "there").mkdir(parents=True, exist_ok=True)
        (self.folder / "file").touch()
        self.sandbox = sandbox_config(agent)
        self.sandbox_id = agent.client.run_sandbox(self.sandbox, self.random.choice(("crun", "runc")))
        config = container_config("main", "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done")
        self.container_id = agent.client.create(self.sandbox_id, config, self.sandbox)
        agent.client.start(self.container_id)
        self.ids = [self.sandbox_id, self.container_id, self.container_id[:13], "f" * 64, "", "x", "\0", "f" * 1000]
        self.messages = Messages(self.random, self._pools())
        self.codes: dict[str, int] = {}

    def _pools(self) -> dict[str, Sequence[Any] | Callable[[random.Random], Any]]:
        """Values that cannot harm the node: only paths of the test, and a registry without a listener."""
        agent, folder = self.agent, str(self.folder)
        paths = (
            f"{folder}/there",
            f"{folder}/file",
            f"{folder}/file/x",
            f"{folder}/new/ö",
            "relative",
            "",
            f"{folder}/\0",
        )
        images = (
            BUSYBOX,
            "busybox",
            "127.0.0.1:1/x:1",
            "127.0.0.1:1/x@sha256:00",
            "127.0.0.1:1/X",
            "::",
            "127.0.0.1:1/ö",
        )
        inside = ("/data", "/", "/etc/x", "data", "", "/a/../b", "/dev", "/dev/shm", "/proc", "/sys/x", "/ö", "/bin/sh")
        resources = (0, 1, -1, 2, 1000, 1024, 100_000, 10**6, 64 << 20, 2**63 - 1, -(2**63))
        ids = lambda generator: generator.choice(self.ids)  # noqa: E731 - the list grows
        return {
            "id": ids,
            "container_id": ids,
            "pod_sandbox_id": ids,
            "target_id": ids,
            "image": images,
            "user_specified_image": images,
            "image_ref": images,
            "host_path": paths,
            "Device.host_path": ("/dev/null", "/dev/zero", "/dev/pts", "/nope", "", "dev/null"),
            "Device.container_path": ("/dev/x", "/dev/null", "x", "", "/"),
            "container_path": inside,
            "working_dir": (*inside, "/proc/self/fd/3"),
            "log_directory": (str(agent.logs), f"{agent.logs}/ö:x", "", "relative", f"{agent.logs}/../logs"),
            "log_path": ("0.log", "a:b", "../x", "ö/ö.log", "d/e/f.log", "", "\n", ".", "x" * 300),
            "location": (f"{folder}/checkpoint.tar", "", "relative"),
            "path": paths,
            "cgroup_parent": ("", agent.cgroup_parent, f"{agent.cgroup_parent}/ö", "relative", "/a/../b", "/x.slice"),
            "runtime_handler": ("", "crun", "runc", "nope", "ö"),
            "sysctls": (
                "net.ipv4.ip_forward",
                "net/core/somaxconn",
                "kernel.shmmax",
                "kernel.panic",
                "x",
                "",
                "fs.mqueue.ö",
            ),
            "localhost_ref": (f"{folder}/file", "", f"{folder}/missing", "x"),
            "localhost_profile": (f"{folder}/file", "", "x"),
            "pod_cidr": ("", "x", agent.subnet, f"{agent.subnet},fd00::/64", "10.0.0.0/33", "::/0"),
            "timeout": (0, 0, 1, -1, -(2**63)),
            "stop_timeout": (0, 1),
            "cmd": (*TEXTS, "true", "sh", "-c", "/bin/sh", "exit 3"),
            "command": ("true", "sleep", "1000", "sh", *TEXTS),
            "server_address": ("127.0.0.1:1", "http://127.0.0.1:1", "ö"),
            "hugepage_limits": (),
            **dict.fromkeys(
                ("cpu_period", "cpu_quota", "cpu_shares", "memory_limit_in_bytes", "memory_swap_limit_in_bytes"),
                resources,
            ),
        }

    def request(self, method: MethodDescriptor) -> Message:
        """A request of that method as from kubelet, with some fields changed."""
        request = GetMessageClass(method.input_type)()
        if isinstance(request, cri_pb2.RunPodSandboxRequest):
            request.config.CopyFrom(sandbox_config(self.agent))
        elif isinstance(request, cri_pb2.CreateContainerRequest):
            request.pod_sandbox_id = self.sandbox_id
            request.sandbox_config.CopyFrom(self.sandbox)
            request.config.CopyFrom(container_config(f"c{self.random.randrange(1 << 32)}", "sleep", "1000"))
        elif isinstance(request, cri_pb2.ExecSyncRequest):
            request.timeout = 2
        else:
            for field in method.input_type.fields:
                if field.name.endswith("_id") and self.random.random() < 0.8:
                    wanted = self.sandbox_id if "sandbox" in field.name else self.container_id
                    setattr(request, field.name, wanted)
        self.messages.change(request, self.random.choice((1, 1, 2, 3, 8)))
        if isinstance(request, cri_pb2.PullImageRequest) and "127.0.0.1:1" not in request.image.image:
            request.image.image = "127.0.0.1:1/" + request.image.image
        if isinstance(request, cri_pb2.RemoveImageRequest) and "busybox" in request.image.image:
            request.image.image = "127.0.0.1:1/x:1"  # other tests need the real images
        return request

    def send(self, name: str) -> None:
        """Make one call of that method. Half of the created containers are started as well."""
        made = self._call(name, self.request(METHODS[name]))
        if made:
            self.ids.append(made)
        if made and name == "CreateContainer" and self.random.random() < 0.5:
            self._call("StartContainer", cri_pb2.StartContainerRequest(container_id=made))

    def _call(self, name: str, request: Message) -> str:
        """The id of the object that the call made, if any. Fails the test for an internal error."""
        method = METHODS[name]
        code, details, response = grpc.StatusCode.OK, "", None
        try:
            if name == "GetContainerEvents":
                call: Any = self.agent.client.stream(name, request, 5.0)
                call.initial_metadata()
                call.cancel()
            elif method.server_streaming:
                list(self.agent.client.stream(name, request, CALL_SECONDS))
            else:
                response = self.agent.client.call(name, request, CALL_SECONDS)
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
        told = f"{name}: {code.name}: {details}\n{request}"
        if code is grpc.StatusCode.UNKNOWN:
            assert REASONS.match(details), told
        assert code is not grpc.StatusCode.INTERNAL, told
        assert code is not grpc.StatusCode.DEADLINE_EXCEEDED or name == "ExecSync", told
        assert code is grpc.StatusCode.OK or details, told
        assert "Traceback" not in details, told
        self.codes[code.name] = self.codes.get(code.name, 0) + 1
        return getattr(response, "container_id", "") or getattr(response, "pod_sandbox_id", "")


def test_no_request_causes_an_internal_error(fuzzed: AgentProcess) -> None:
    agent = fuzzed
    names = [name for name in METHODS for _ in range(WEIGHTS.get(name, 1))]
    codes: dict[str, int] = {}
    mounted = {entry.target for entry in mount_table()}
    for number in rounds(seconds(20)):
        seed = int(os.environ.get("PODKEEL_FUZZ_SEED", number))
        log = agent.log.stat().st_size
        client = Client(agent, seed)
        try:
            for name in METHODS if seed % 2 else client.random.choices(names, k=60):
                client.send(name)
            assert agent.tracebacks(log) == []
            agent.client.call("Version", cri_pb2.VersionRequest())
            remove_all_pods(agent.client)
            assert agent.client.findings() == []
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        for code, count in client.codes.items():
            codes[code] = codes.get(code, 0) + count
    assert {entry.target for entry in mount_table()} <= mounted
    assert list((agent.run / "containers").iterdir()) == []
    print(codes)  # shown by -rP
    assert sum(codes.values()) > 40
