"""The wheel: its names are podkeel's alone, and the agent that is installed from it runs pods."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from hatch_build import ROOMS, below_package
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.pods import POLITE, run_container, wait_for_log

ROOT = Path(__file__).parents[3]
VERSION = re.compile(r"\d+\.\d+\.\d+(rc\d+)?(\+[0-9a-z.]+)?")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command ``podkeel`` of an environment that has the wheel, and only the dependencies from these tests' one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--no-compile", str(wheel)], check=True, capture_output=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # Files named .pth in this folder do not count there: the repository is not on the path.
    dependencies = sysconfig.get_path("purelib")
    (folder / "lib" / version / "site-packages" / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder / "bin" / "podkeel"


def test_wheel_has_no_import_name_but_podkeel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    information = next(name for name in names if name.endswith("/METADATA")).partition("/")[0]
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"podkeel", information, information.replace(".dist-info", ".data")}
    assert {name.split("/")[1] for name in names if name.count("/") > 1 and name.startswith("podkeel/")} == set(ROOMS)
    stubs = {name for name in names if name.endswith("_pb2.py")}
    assert len(stubs) == len(list((ROOT / "proto").rglob("*.proto")))
    for needed in ("seccomp_default.json", "apparmor_default.profile", "podkeel.service", "podkeel.socket", "LICENSE"):
        assert any(name.endswith(f"/{needed}") for name in names), needed


def test_wheel_has_every_module_of_the_rooms(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"podkeel/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert modules - names == set()


def test_wheel_imports_the_rooms_below_podkeel(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    rooms = "|".join(ROOMS)
    imports = re.compile(
        rf"^ *(?:from (?:{rooms})[\w.]* import|import (?:{rooms})\b)|['\"; ]from (?:{rooms})\.[\w.]+ import", re.M
    )
    sources = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith((".py", ".pyi"))}
    assert {name: found for name, source in sources.items() if (found := imports.findall(source))} == {}


@pytest.mark.parametrize(
    ("source", "mapped"),
    [
        ("from host import errors\n", "from podkeel.host import errors\n"),
        ("from  cri.x import (\n    a,\n)\n", "from  podkeel.cri.x import (\n    a,\n)\n"),
        ("import images.x as y, os\n", "import podkeel.images.x as y, os\n"),
        ("é = 1; from host.x import y\n", "é = 1; from podkeel.host.x import y\n"),
        ("def f():\n    yield from host\n", "def f():\n    yield from host\n"),
        ("x = 'from host import errors'\n", "x = 'from host import errors'\n"),
        ("from hosts import x\nfrom . import host\n", "from hosts import x\nfrom . import host\n"),
    ],
)
def test_only_imports_of_rooms_are_changed(source: str, mapped: str) -> None:
    assert below_package(source, "x.py") == mapped


@pytest.mark.parametrize("source", ["import host.errors\n", "from \\\n host import x\n", 'import_module("host.x")\n'])
def test_imports_that_cannot_be_mapped_end_the_build(source: str) -> None:
    with pytest.raises(SyntaxError, match=r"x\.py:1"):
        below_package(source, "x.py")


def test_installed_agent_runs_a_pod_without_the_repository(
    installed: Path, wheel: Path, tmp_path: Path, busybox: Path
) -> None:
    agent = AgentProcess(tmp_path)
    agent.program, agent.working_folder = installed, tmp_path
    try:
        agent.start()
        agent.import_busybox(busybox)  # by a worker, which has to find the modules too
        _, container = run_container(agent, *POLITE)
        wait_for_log(agent.client, container)
        version = agent.client.call("Version", cri_pb2.VersionRequest()).runtime_version
    finally:
        agent.reset()
    assert wheel.name.split("-")[1] == version.replace("-", "_")
    assert VERSION.fullmatch(version)
    assert agent.tracebacks() == []
    done = subprocess.run([str(installed), "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"podkeel {version}\n"
    where = (
        "import podkeel.cri.server as it, sys; print(it.__file__); print(*{n.partition('.')[0] for n in sys.modules})"
    )
    python = installed.with_name("python")
    done = subprocess.run([python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True)
    place, loaded = done.stdout.splitlines()
    assert place.startswith(str(installed.parents[1]))
    assert not set(loaded.split()) & set(ROOMS)


def test_manual_pages_have_every_command(installed: Path) -> None:
    wanted = {"podkeel": ("## image export", "**--timeout** *S*", "SEE ALSO"), "podkeel-check": ("--repair",)}
    for name, words in wanted.items():
        command = [str(installed.with_name("python")), str(ROOT / "scripts/deb/pages.py"), name, "1.2.3"]
        page = subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("\\", "")
        assert [word for word in words if word not in page] == []
