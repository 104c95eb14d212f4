"""What the tests that try to break out of containers share: containers as kubelet asks for them, with Python inside."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from runtime.specgen.security.masked_paths import MASKED_PATHS, READONLY_PATHS
from tests.support.agent import AgentProcess
from tests.support.image_builder import busybox_image, make_tar
from tests.support.pods import container_config, sandbox_config

PYTHON = os.path.realpath(sys.executable)

# ctypes without its own libc lookup, which needs a compiler's tools; errors by name, as the tests compare them.
PRELUDE = """
import ctypes, errno, json, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
def attempt(work, *arguments):
    try:
        return work(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
def answer(value):
    print(json.dumps(value), flush=True)
"""


def like_kubelets(name: str, *command: str, seccomp: bool = False, **fields: Any) -> cri_pb2.ContainerConfig:
    """A container without any privilege asked for, which kubelet masks as the runtime's default would."""
    config = container_config(name, *(command or ("sleep", "1000")), **fields)
    context = config.linux.security_context
    context.masked_paths.extend(MASKED_PATHS)
    context.readonly_paths.extend(READONLY_PATHS)
    if seccomp:
        context.seccomp.profile_type = cri_pb2.SecurityProfile.RuntimeDefault
    return config


def with_python(config: cri_pb2.ContainerConfig) -> cri_pb2.ContainerConfig:
    """Mount this interpreter and the host's libraries, read-only, so that tests can make system calls inside."""
    folders = {sys.base_prefix, "/usr/lib", "/lib", "/lib64"}
    for folder in sorted(folder for folder in folders if Path(folder).exists()):
        config.mounts.add(container_path=folder, host_path=folder, readonly=True)
    return config


@dataclass(frozen=True)
class Attacker:
    """A pod of one runtime handler, and a container in it that does what it can."""

    agent: AgentProcess
    sandbox: cri_pb2.PodSandboxConfig
    sandbox_id: str
    container_id: str

    @classmethod
    def start(cls, agent: AgentProcess, handler: str, config: cri_pb2.ContainerConfig, **pod: Any) -> Attacker:
        """A new pod with that container."""
        sandbox = sandbox_config(agent, **pod)
        sandbox_id = agent.client.run_sandbox(sandbox, handler)
        container_id = agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        return cls(agent, sandbox, sandbox_id, container_id)

    def beside(self, config: cri_pb2.ContainerConfig) -> str:
        """One more container in the same pod; its id."""
        container_id = self.agent.client.create(self.sandbox_id, config, self.sandbox)
        self.agent.client.start(container_id)
        return container_id

    def shell(self, script: str) -> str:
        """What a shell script prints, with its errors."""
        response = self.agent.client.exec(self.container_id, "sh", "-c", f"exec 2>&1\n{script}")
        return response.stdout.decode(errors="replace")

    def python(self, code: str) -> Any:
        """What ``code`` gives to ``answer``; the container must be ``with_python``."""
        response = self.agent.client.exec(self.container_id, PYTHON, "-I", "-c", PRELUDE + code)
        assert response.exit_code == 0, response.stderr.decode(errors="replace")
        return json.loads(response.stdout)


def init_pid(agent: AgentProcess, container_id: str) -> int:
    """The container's first process, as the host sees it."""
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    return int(json.loads(agent.client.call("ContainerStatus", request).info["info"])["pid"])


def confined_by_apparmor(agent: AgentProcess, container_id: str) -> bool:
    """Whether a container runs under a profile, which keeps it from looking into processes outside of it."""
    label = Path(f"/proc/{init_pid(agent, container_id)}/attr/current")
    return Path("/sys/kernel/security/apparmor").exists() and "podkeel-default" in label.read_text()


def import_image(
    agent: AgentProcess, folder: Path, name: str, entries: Sequence[Any], config: dict[str, object] | None = None
) -> str:
    """An image of busybox with one more layer of tar ``entries``; its reference."""
    archive = folder / f"{name}.tar"
    reference = f"localhost/{name}:latest"
    busybox_image(config, [make_tar(entries)]).write_oci(archive, reference)
    agent.client.call("ImportImage", agent_pb2.ImportImageRequest(path=str(archive), reference=reference))
    archive.unlink()
    return reference
