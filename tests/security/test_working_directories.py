"""Working directories that links lead out of containers that see the node's processes (as in CVE-2024-21626)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from host import processes
from host.errors import InvalidArgumentError
from host.processes import ProcessName
from proto.runtime.v1 import cri_pb2
from runtime.containers.bundle.confinement import verify
from runtime.oci.working_directory import become
from runtime.specgen.builder import build
from tests.integration.agent.hardening import PRELUDE, PYTHON, Attacker, init_pid, like_kubelets, with_python
from tests.security.conftest import pod_config
from tests.support.agent import PATIENCE, AgentProcess, running_agent, wait_for
from tests.support.pods import log_lines, remove_all_pods
from tests.unit.spec.requests import container, request

SECRET = "of the node\n"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file of the node that only root may read."""
    file = tmp_path / "marker"
    file.write_text(SECRET)
    file.chmod(0o600)
    return file


def with_host_pids(config: cri_pb2.ContainerConfig) -> cri_pb2.ContainerConfig:
    """A container that sees all processes, and has no capability to affect them."""
    context = config.linux.security_context
    context.namespace_options.pid = cri_pb2.NODE
    context.no_new_privs = True
    context.capabilities.drop_capabilities.append("ALL")
    return config


def start(
    agent: AgentProcess, handler: str, config: cri_pb2.ContainerConfig, *, user_namespace: bool = False
) -> Attacker:
    sandbox = pod_config(agent, user_namespace=user_namespace)
    options = config.linux.security_context.namespace_options
    sandbox.linux.security_context.namespace_options.pid = options.pid
    options.userns_options.CopyFrom(sandbox.linux.security_context.namespace_options.userns_options)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    return Attacker(agent, sandbox, sandbox_id, container_id)


def outside(file: Path) -> str:
    """A file of the node, through the root of a process that is outside of every container."""
    return f"/proc/{os.getpid()}/root{file}"


def replace_work(attacker: Attacker, target: str) -> None:
    """Replace the working directory by a link from outside, as the container could."""
    work = Path(f"/proc/{init_pid(attacker.agent, attacker.container_id)}/root/work")
    work.rmdir()
    work.symlink_to(target)


@pytest.mark.parametrize("target", ["/proc/{pid}/root{folder}", "/proc/{pid}/cwd", "/proc/self/fd/6", "proc/1"])
def test_no_command_runs_in_a_directory_behind_a_link_out_of_the_container(
    quiet_log: AgentProcess, handler: str, user_namespace: bool, marker: Path, target: str
) -> None:
    config = with_host_pids(like_kubelets("main", working_dir="/work"))
    attacker = start(quiet_log, handler, config, user_namespace=user_namespace)
    assert quiet_log.client.output(attacker.container_id, "pwd") == "/work\n"
    replace_work(attacker, target.format(pid=os.getpid(), folder=marker.parent))
    if handler == "runc" and target == "proc/1":
        return  # a regular folder in its /proc, which is allowed
    with pytest.raises(grpc.RpcError) as refused:
        quiet_log.client.exec(attacker.container_id, "cat", "marker")
    assert SECRET not in (refused.value.details() or "")
    if handler == "crun":
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "the link /work in its working directory /work" in (refused.value.details() or "")


# Swaps the working directory with a link out of the container, as fast as it can.
SWAP = """
os.makedirs("{folder}/work", exist_ok=True)
os.symlink("{target}", "{folder}/link")
print("ready", flush=True)
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    libc.renameat2(-100, b"{folder}/work", -100, b"{folder}/link", 2)
print("ended", flush=True)
"""


def swapping(folder: str, target: str, seconds: float) -> list[str]:
    code = SWAP.format(folder=folder, target=target, seconds=seconds)
    return [PYTHON, "-I", "-c", PRELUDE + code]


def test_no_command_runs_outside_while_the_container_swaps_its_directory(
    quiet_log: AgentProcess, handler: str, marker: Path
) -> None:
    command = swapping("/x", outside(marker.parent), 60 * PATIENCE)
    config = with_host_pids(with_python(like_kubelets("main", *command, working_dir="/x/work")))
    config.log_path = "main.log"
    attacker = start(quiet_log, handler, config)
    log = Path(attacker.sandbox.log_directory) / "main.log"
    wait_for(lambda: "ready" in "".join(log_lines(log)), what="the first swap")
    outcomes = set()
    for _ in range(60):
        try:
            answer = quiet_log.client.exec(attacker.container_id, "cat", "marker")
        except grpc.RpcError as error:
            assert error.code() is not grpc.StatusCode.FAILED_PRECONDITION, error.details()
            outcomes.add("refused")
        else:
            assert answer.stdout == b""
            outcomes.add("ran")
    assert outcomes == {"ran", "refused"}, "the swaps were never seen"


def test_no_container_starts_outside_while_another_swaps_a_folder_of_its_volume(
    quiet_log: AgentProcess, handler: str, marker: Path, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    command = swapping("/volume", outside(marker.parent), 10 * PATIENCE)
    config = with_host_pids(with_python(like_kubelets("main", *command)))
    config.mounts.add(container_path="/volume", host_path=str(volume))
    attacker = start(quiet_log, handler, config)
    wait_for(lambda: (volume / "link").is_symlink() or (volume / "work").is_symlink(), what="the first swap")
    outcomes, inside = set(), (volume / "work").stat().st_dev
    for number in range(40):
        victim = with_host_pids(like_kubelets(f"victim{number}", working_dir="/volume/work"))
        victim.mounts.add(container_path="/volume", host_path=str(volume))
        try:
            container_id = quiet_log.client.create(attacker.sandbox_id, victim, attacker.sandbox)
        except grpc.RpcError as error:
            outcomes.add("refused")
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
        else:
            outcomes.add("made")
            pid = init_pid(quiet_log, container_id)
            assert not Path(f"/proc/{pid}/cwd/marker").exists()
            assert Path(f"/proc/{pid}/cwd").stat().st_dev == inside
            quiet_log.client.remove(container_id)
    assert "refused" in outcomes, "the swaps were never seen"


def test_a_created_container_with_a_directory_outside_is_detected(tmp_path: Path) -> None:
    """The race above sometimes causes this: a process in a new mount namespace with a directory in another one."""
    spec = build(request(tmp_path, config=container(working_dir="/work")))
    for directory, seen in ((f"/proc/{os.getpid()}/cwd", True), ("/", False)):
        script = f"cd {directory} && echo ready && exec sleep 100"
        with subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                init = ProcessName(process.pid, processes.start_time(process.pid) or 0)
                if seen:
                    with pytest.raises(InvalidArgumentError, match="'/work' led out of the container"):
                        verify(init, spec)
                else:
                    verify(init, spec)
            finally:
                process.kill()


@pytest.mark.parametrize("own_root", [False, True], ids=["", "after chroot"])
def test_commands_run_in_their_directory_in_pods_with_host_pid(
    quiet_log: AgentProcess, handler: str, user_namespace: bool, own_root: bool
) -> None:
    jail = "mkdir -p /jail/bin; cp /bin/busybox /jail/bin; exec chroot /jail /bin/busybox sleep 1000"
    command = ("sh", "-c", jail if own_root else "exec sleep 1000")
    config = like_kubelets("main", *command, working_dir="/app/current")
    config.linux.security_context.namespace_options.pid = cri_pb2.NODE
    attacker = start(quiet_log, handler, config, user_namespace=user_namespace)
    script = (
        "printf '#!/bin/sh\\npwd; echo $0; ls /proc/self/fd\\n' > run.sh; chmod +x run.sh; ln -s /app/current /app/n"
    )
    assert attacker.shell(script) == ""
    output = quiet_log.client.output(attacker.container_id, "./run.sh").split()
    assert output[0] == "/app/current"
    assert output[1].endswith("run.sh")
    assert output[2:] == ["0", "1", "2", "3"]  # 3 is that of ls
    # Replace its release folder, as deployments do.
    assert attacker.shell("mv /app/current /app/old; mkdir /app/new; ln -s new /app/current; rm /app/n") == ""
    assert quiet_log.client.output(attacker.container_id, "pwd") == "/app/new\n"
    assert attacker.shell("echo still; rm -r /app/current") == "still\n"
    with pytest.raises(grpc.RpcError) as gone:
        quiet_log.client.exec(attacker.container_id, "pwd")
    if handler == "crun":
        assert gone.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "working directory /app/current cannot be used (No such file or directory)" in gone.value.details()


@pytest.fixture(scope="module")
def open_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    """An agent whose default handler is vulnerable: crun with the descriptor closed that the agent passes."""
    real = shutil.which("crun")
    if real is None:
        pytest.skip("crun is not installed")
    folder = tmp_path_factory.mktemp("open")
    program = folder / "open-crun"
    program.write_text(f'#!/bin/sh\nexec 6<&-\nexec {real} "$@"\n')
    program.chmod(0o755)
    options = f'\n[runtime.handlers.open]\npath = "{program}"\n'
    with running_agent(folder, busybox, options=options, runtime="open") as agent:
        if check(agent)["open"]["state"] == "ok":
            pytest.skip("this crun itself checks where it goes")
        yield agent
        remove_all_pods(agent.client)


def check(agent: AgentProcess) -> dict[str, dict[str, str]]:
    """The findings of ``podkeel check`` for each runtime handler."""
    command = agent.command("check", "--format", "json", *agent.flags)
    answer = json.loads(subprocess.run(command, capture_output=True, check=False).stdout)
    return {item["name"].removeprefix("runtime "): item for item in answer["checks"]}


def test_check_reports_vulnerable_handlers_and_the_remedy(agent: AgentProcess, open_agent: AgentProcess) -> None:
    found = check(open_agent)
    assert found["open"]["state"] == "fail"
    assert "Debian 13" in found["open"]["remedy"]
    if "runc" in found:
        assert found["runc"]["state"] == "ok"  # Debian 12's runc has the fix
    ours = check(agent)["crun"]
    assert ours["state"] == "warn"
    assert "the agent does so for it" in ours["detail"]


def test_a_vulnerable_handler_runs_no_commands_in_pods_with_host_pid(open_agent: AgentProcess) -> None:
    private = start(open_agent, "", like_kubelets("main", working_dir="/work"))
    assert open_agent.client.output(private.container_id, "pwd") == "/work\n"
    at_root = start(open_agent, "", with_host_pids(like_kubelets("main")))
    assert open_agent.client.output(at_root.container_id, "pwd") == "/\n"
    shared = start(open_agent, "", with_host_pids(like_kubelets("main", working_dir="/work")))
    with pytest.raises(grpc.RpcError) as refused:
        open_agent.client.exec(shared.container_id, "pwd")
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "install crun 1.14.1" in (refused.value.details() or "")


def test_a_directory_closed_to_root_is_opened_with_the_user_s_rights(tmp_path: Path) -> None:
    """As on NFS and FUSE. Only the one thread has these rights."""
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    folder = tmp_path / "home"
    folder.mkdir(mode=0o750)
    os.chown(folder, 12345, 54321)
    found: dict[str, str] = {}

    def look(name: str, uid: int, gid: int, groups: list[int]) -> None:
        become((uid, gid, groups))
        try:
            found[name] = str(os.listdir(folder))  # noqa: PTH208 - a system call of this thread
        except PermissionError:
            found[name] = "refused"

    for arguments in (("owner", 12345, 1, []), ("member", 1, 1, [54321]), ("other", 1, 1, [])):
        thread = threading.Thread(target=look, args=arguments)
        thread.start()
        thread.join()
    assert found == {"owner": "[]", "member": "[]", "other": "refused"}
    assert list(folder.iterdir()) == []
    assert 54321 not in os.getgroups()


@pytest.mark.parametrize("work", ["/volume", "/volume/inner", "/made"])
def test_no_working_directory_is_created_below_a_volume_through_a_link_out(
    quiet_log: AgentProcess, handler: str, tmp_path: Path, work: str
) -> None:
    config = with_host_pids(like_kubelets("main", working_dir=work))
    config.mounts.add(container_path="/volume", host_path=str(tmp_path))
    if handler == "crun" or work != "/volume/inner":
        attacker = start(quiet_log, handler, config)
        assert quiet_log.client.output(attacker.container_id, "pwd") == f"{work}\n"
        return
    with pytest.raises(grpc.RpcError) as refused:
        start(quiet_log, handler, config)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "working_dir '/volume/inner' is in a volume" in (refused.value.details() or "")
    assert list(tmp_path.iterdir()) == []
