"""The client commands against a real agent with real containers."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import pytest

from cli.main import main
from cri.version import VERSION
from tests.support.agent import BUSYBOX, SOON, AgentProcess

SAMPLE = Path(__file__).parents[3] / "manifests/samples/hello.yaml"


class Done(NamedTuple):
    status: int
    out: str
    err: str


Podkeel = Callable[..., Done]


@pytest.fixture
def podkeel(agent: AgentProcess, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Podkeel:
    monkeypatch.setenv("PODKEEL_SOCKET", agent.address)

    def run(*arguments: object) -> Done:
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Done(status, captured.out, captured.err)

    return run


def good(done: Done) -> str:
    assert (done.status, done.err) == (0, "")
    return done.out


def manifest(
    folder: Path, name: str, *, init: str = "", image: str = BUSYBOX, command: str = "exec sleep 1000"
) -> Path:
    first = f'initContainers: [{{name: first, image: {image}, command: [sh, -c, "{init}"]}}]' if init else ""
    path = folder / f"{name}.yaml"
    path.write_text(f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  {first}
  containers:
  - {{name: {name}-main, image: {image}, imagePullPolicy: Never, command: [sh, -c, '{command}']}}
""")
    return path


def test_the_life_of_the_sample(agent: AgentProcess, podkeel: Podkeel, tmp_path: Path) -> None:
    text = SAMPLE.read_text().replace("localhost/podkeel/busybox:latest", BUSYBOX)
    (tmp_path / "hello.yaml").write_text(text)
    pods = tmp_path / "pods"
    run = good(podkeel("run", tmp_path / "hello.yaml", "--pod-dir", pods)).splitlines()
    assert [line.split()[0] for line in run] == ["sandbox", "prepare", "web", "client"]
    assert " up in " in run[0]
    address = run[0].rpartition(" ")[2]

    (listed,) = good(podkeel("pods")).splitlines()[1:]
    assert listed.split()[1:5] == ["default", "hello", "ready", address]
    assert [line.split()[1:4] for line in good(podkeel("ps")).splitlines()[1:]] == [
        ["client", "hello", "running"],
        ["web", "hello", "running"],
    ]
    assert "prepare" in good(podkeel("ps", "--all"))
    (web_id,) = [
        line for line in good(podkeel("ps", "-q")).splitlines() if good(podkeel("inspect", line)).count('"web"')
    ]

    assert good(podkeel("exec", "hello/web", "--", "cat", "/www/index.html")) == "Hello from hello\n"
    assert podkeel("exec", "web", "sh", "-c", "echo out; echo err >&2; exit 7") == Done(7, "out\n", "err\n")
    inspected = json.loads(good(podkeel("inspect", "hello")))
    assert inspected["status"]["network"]["ip"] == address
    assert json.loads(good(podkeel("inspect", web_id[:12])))["status"]["metadata"] == {"name": "web"}
    explained = good(podkeel("explain", "hello"))
    assert explained.startswith("RunPodSandbox ")
    assert "█" in explained

    assert good(podkeel("stop", "-t", 0, "client")) == "client stopped\n"
    assert "Hello from hello\n" in good(podkeel("logs", "client"))
    done = podkeel("start", "client")
    assert done.status == 1
    assert done.err.startswith("podkeel: start container client: ")
    assert good(podkeel("stop", "hello", "-t", 0)) == "pod hello stopped\n"
    assert good(podkeel("pods")).splitlines()[1].split()[3:5] == ["not", "ready"]
    assert good(podkeel("rm", "hello", "--pod-dir", pods)) == "hello removed\n"
    assert list(pods.iterdir()) == []
    assert good(podkeel("pods", "-q")) == good(podkeel("ps", "-aq")) == ""


def test_sidecars_run_beside_what_follows(podkeel: Podkeel, tmp_path: Path) -> None:
    path = manifest(tmp_path, "accompanied", init="exec sleep 1000")
    path.write_text(path.read_text().replace("{name: first,", "{name: first, restartPolicy: Always,"))
    done = podkeel("run", path, "--pod-dir", tmp_path)
    assert done.status == 0, done.err
    rows = [line.split() for line in good(podkeel("ps", "--pod", "accompanied")).splitlines()[1:]]
    assert sorted((row[1], row[3]) for row in rows) == [("accompanied-main", "running"), ("first", "running")]
    good(podkeel("rm", "accompanied", "--pod-dir", tmp_path))


def test_a_pod_of_that_name_is_there(podkeel: Podkeel, tmp_path: Path) -> None:
    path = manifest(tmp_path, "twice")
    identifier = good(podkeel("run", "-q", path, "--pod-dir", tmp_path)).strip()
    assert len(identifier) == 64
    done = podkeel("run", path, "--pod-dir", tmp_path)
    assert done.status == 1
    assert done.err == (f"podkeel: pod default/twice exists already; `podkeel rm {identifier[:13]}` removes it\n")
    good(podkeel("rm", identifier[:8], "--pod-dir", tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: manifest(folder, "broken", init="echo first; echo it broke; exit 3"),
            "podkeel: init container first ended with exit code 3, saying: first | it broke\n",
        ),
        (
            lambda folder: manifest(folder, "absent", image="localhost/absent:1"),
            "podkeel: image localhost/absent:1 is not on this node, and imagePullPolicy Never forbids to pull it\n",
        ),
    ],
)
def test_a_pod_that_fails_leaves_nothing(
    podkeel: Podkeel, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    pods = tmp_path / "pods"
    pods.mkdir()
    done = podkeel("run", make(tmp_path), "--pod-dir", pods)
    assert (done.status, done.err) == (1, message)
    assert list(pods.iterdir()) == []
    assert good(podkeel("pods", "-q")) == ""


def test_ignored_fields_of_a_manifest_are_reported(podkeel: Podkeel, tmp_path: Path) -> None:
    path = manifest(tmp_path, "vain")
    path.write_text(path.read_text() + "  restartPolicy: Always\n  nodeName: here\n")
    done = podkeel("run", path, "--pod-dir", tmp_path)
    assert done.status == 0
    assert done.err == (
        f"podkeel: {path}: spec.restartPolicy has no effect: containers that end are not started again\n"
        f"podkeel: {path}: spec.nodeName is not supported and has no effect\n"
    )
    good(podkeel("rm", "vain", "--pod-dir", tmp_path))


def test_logs(agent: AgentProcess, podkeel: Podkeel, tmp_path: Path) -> None:
    path = manifest(tmp_path, "talker", command="seq 1 5; echo oops >&2; read line </tmp/go; echo bye")
    path.write_text(path.read_text().replace("seq 1 5", "mkfifo /tmp/go; seq 1 5"))
    good(podkeel("run", path, "--pod-dir", tmp_path))
    command = agent.command("logs", "-f", "talker-main")
    with contextlib.ExitStack() as stack:
        following = stack.enter_context(subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True))
        stack.callback(following.kill)
        assert following.stdout is not None
        assert [following.stdout.readline() for _ in range(5)] == [f"{number}\n" for number in range(1, 6)]
        assert podkeel("logs", "--tail", "2", "talker-main") == Done(0, "5\n", "oops\n")
        good(podkeel("exec", "talker-main", "sh", "-c", "echo >/tmp/go"))
        out, err = following.communicate(timeout=SOON)
    assert (following.returncode, out, err) == (0, "bye\n", "oops\n")
    stamped = podkeel("logs", "--tail", "1", "--timestamps", "talker-main")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]{18}(Z|\+00:00) bye\n", stamped.out)
    assert podkeel("logs", "--tail", "-1", "talker-main").status == 1
    good(podkeel("rm", "talker", "--pod-dir", tmp_path))


def test_images(podkeel: Podkeel, busybox: Path) -> None:
    name = "localhost/cli-test:1"
    (row,) = [line for line in good(podkeel("images")).splitlines() if BUSYBOX in line]
    assert row.split()[3] == "MiB"
    identifier = good(podkeel("image", "ls", "-q")).strip()
    assert good(podkeel("image", "import", busybox, "--reference", BUSYBOX)).startswith(BUSYBOX)
    inspected = json.loads(good(podkeel("image", "inspect", "busybox")))
    assert inspected["image"]["id"] == identifier
    for command in (("image", "inspect", name), ("image", "rm", name)):
        assert podkeel(*command) == Done(1, "", f"podkeel: image {name} is not on this node\n")
    done = podkeel("image", "import", "/nonexistent.tar")
    assert done.status == 1
    assert done.err.startswith("podkeel: import /nonexistent.tar: ")
    done = podkeel("pull", "127.0.0.1:9/nothing:1")
    assert done.status == 1
    assert done.err.startswith("podkeel: pull 127.0.0.1:9/nothing:1: RegistryUnavailable")


def test_node(podkeel: Podkeel) -> None:
    assert good(podkeel("version")).splitlines()[1] == f"agent            podkeel {VERSION}, CRI v1"
    conditions = json.loads(good(podkeel("info")))["status"]["conditions"]
    assert {item["type"]: item.get("status", False) for item in conditions} == {
        "RuntimeReady": True,
        "NetworkReady": True,
    }


def test_check_asks_the_agent(agent: AgentProcess, podkeel: Podkeel) -> None:
    done = podkeel("check", "--format", "json", *agent.flags)
    answer = json.loads(done.out)
    states = {check["name"]: check["state"] for check in answer["checks"]}
    assert states["agent"] == states["nftables"] == states["overlay"] == "ok"
    assert states["runtime crun"] in ("ok", "warn")  # it warns of a crun that does not look at working directories
    assert answer["ok"] == (done.status == 0) == ("fail" not in states.values())


def test_unknown_names(podkeel: Podkeel) -> None:
    for command in (("rm", "nobody"), ("logs", "nobody"), ("exec", "nobody", "true"), ("stop", "nobody")):
        done = podkeel(*command)
        assert (done.status, done.out) == (1, "")
        assert "is called 'nobody' or has an id that begins with it" in done.err
    done = podkeel("exec", "nobody")
    assert done.err == "podkeel: say which command to run, as in `podkeel exec CONTAINER ls -l`\n"


def test_a_second_agent_on_the_same_folders_says_why_not(agent: AgentProcess) -> None:
    command = agent.command("serve", *agent.flags)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("podkeel: ")
    assert "Traceback" not in done.stderr


def test_reset_asks_for_confirmation(agent: AgentProcess, podkeel: Podkeel) -> None:
    done = podkeel("reset", *agent.flags)
    assert done.status == 1
    assert done.err.endswith("say --yes to do it\n")
    assert agent.data.exists()
