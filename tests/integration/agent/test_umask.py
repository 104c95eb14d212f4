"""An agent that was started with umask 077 makes for containers what any other makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import import_image
from tests.integration.agent.test_user_namespaces import with_user_namespace
from tests.support.agent import AgentProcess, build_busybox
from tests.support.pods import container_config, sandbox_config


@pytest.fixture(scope="module")
def private_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent with umask 077."""
    agent = AgentProcess(tmp_path_factory.mktemp("private"))
    agent.umask = 0o077
    try:
        agent.start()
        agent.import_busybox(build_busybox(agent.folder))
        yield agent
    finally:
        agent.reset()


@pytest.mark.parametrize("handler", ["crun", "runc"])
@pytest.mark.parametrize("user_namespace", [False, True], ids=["node's users", "user namespace"])
def test_containers_read_what_the_agent_makes(
    private_agent: AgentProcess, tmp_path: Path, handler: str, user_namespace: bool
) -> None:
    client = private_agent.client
    handlers = client.call("Status", cri_pb2.StatusRequest()).runtime_handlers
    if not any(one.name == handler and (one.features.user_namespaces or not user_namespace) for one in handlers):
        pytest.skip(f"{handler} does not work here, or has no user namespaces")
    image = import_image(private_agent, tmp_path, "plain", [], {"WorkingDir": "/made/for/work"})
    sandbox = sandbox_config(private_agent)
    sandbox.dns_config.servers.append("192.0.2.53")
    if user_namespace:
        with_user_namespace(sandbox.linux.security_context.namespace_options)
    config = container_config("main", "sleep", "1000", image=image)
    config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    config.linux.security_context.run_as_user.value = 1000
    volume = tmp_path / "missing" / "volume"
    config.mounts.add(host_path=str(volume), container_path="/mounted/deep/here")
    sandbox_id = client.run_sandbox(sandbox, handler)
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    folders = ["/", "/made", "/made/for/work", "/mounted", "/mounted/deep", "/mounted/deep/here", "/etc", "/dev"]
    files = ["/etc/resolv.conf", "/etc/hosts", "/etc/hostname"]
    modes = client.output(container_id, "stat", "-c", "%a", *folders, *files, "/dev/shm").split()
    # Without the sticky bit that crun gives to folders of mounts.
    found = dict(zip([*folders, *files], [int(mode, 8) & 0o777 for mode in modes], strict=False))
    assert found == {**dict.fromkeys(folders, 0o755), **dict.fromkeys(files, 0o644)}
    assert modes[-1] == "1777"
    assert "192.0.2.53" in client.output(container_id, "cat", *files)
    assert volume.stat().st_mode & 0o777 == volume.parent.stat().st_mode & 0o777 == 0o755
    assert client.output(container_id, "sh", "-c", "umask").strip() == "0022"
    client.remove_sandbox(sandbox_id)


def test_private_files_have_private_modes(private_agent: AgentProcess) -> None:
    assert (private_agent.data / "podkeel.db").stat().st_mode & 0o777 == 0o600
    for name in ("layers", "content"):
        assert (private_agent.data / name).stat().st_mode & 0o777 == 0o700
