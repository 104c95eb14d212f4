"""The Debian package: what can be looked at without building it. `make test-deb` builds and installs it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts/deb"
specification = importlib.util.spec_from_file_location("deb_build", FOLDER / "build.py")
assert specification is not None and specification.loader is not None
build = importlib.util.module_from_spec(specification)
specification.loader.exec_module(build)


def release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("b")[0]))


def locked(name: str) -> dict[str, str]:
    text = (FOLDER / name).read_text()
    found = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    assert len(re.findall(r"^\S+==", text, re.MULTILINE)) == len(found)
    blocks = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    assert [block for block in blocks if block.strip() and "--hash=sha256:" not in block] == []
    return found


@pytest.mark.parametrize("name", ["requirements.txt", "build-requirements.txt"])
def test_dependencies_are_locked_with_hashes(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["otel"]
    if name == "build-requirements.txt":
        wanted = project["build-system"]["requires"]
    versions = locked(name)
    for requirement in wanted:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,<([\d.]+))?", requirement)
        assert match is not None, requirement
        found = versions.get(match[1].lower())
        assert found is not None, f"{match[1]} is not in {name}: scripts/deb/lock.sh writes it"
        assert release(match[2]) <= release(found), requirement
        assert match[3] is None or release(found) < release(match[3]), requirement


@pytest.mark.parametrize(
    ("version", "debian"),
    [
        ("1.2.3", "1.2.3"),
        ("1.2.0rc1", "1.2.0~rc1"),
        ("1.2.0rc1+3.gabcdef0", "1.2.0~rc1+3.gabcdef0"),
        ("0.0.0+12.g1b3a4c5", "0.0.0+12.g1b3a4c5"),
        ("1.0.0+4.g0rc1", "1.0.0+4.g0rc1"),
    ],
)
def test_debian_versions_have_the_order_of_the_project(version: str, debian: str) -> None:
    assert build.debian_version(version) == debian


@pytest.mark.parametrize("unit", ["podkeel.service", "podkeel.socket"])
def test_units_name_the_paths_of_the_package(unit: str) -> None:
    text = build.installed_unit((ROOT / "manifests/systemd" / unit).read_text())
    assert "/opt/" not in text
    assert "Documentation=man:podkeel(1)" in text
    assert unit.endswith(".socket") or "\nExecStart=/usr/bin/podkeel serve\n" in text


@pytest.mark.parametrize("script", ["postinst", "prerm", "postrm"])
def test_maintainer_scripts_can_be_read_by_the_shell(script: str) -> None:
    subprocess.run(["sh", "-n", FOLDER / script], check=True)
    assert (FOLDER / script).read_text().startswith("#!/bin/sh\nset -e\n")
