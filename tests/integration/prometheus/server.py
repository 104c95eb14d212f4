"""Debian's Prometheus with its own data folder and loopback port, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.integration.prometheus.manifests import PROMETHEUS, RULE_FILES
from tests.support.agent import wait_for
from tests.support.ports import free_port


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    address: str
    log: Path

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of an answer of the HTTP API; a refused query is an AssertionError with Prometheus' words."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def is_ready(self) -> bool:
        """Whether it answers queries."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5):
            return True
        return False

    def vector(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an instant query."""
        result = self.get("query", query=query)
        assert result["resultType"] == "vector", (query, result)
        return [(sample["metric"], float(sample["value"][1])) for sample in result["result"]]

    def has_series(self, selector: str) -> bool:
        """Whether a selector finds anything now."""
        return bool(self.vector(selector))


def configuration(target: str) -> dict[str, Any]:
    """Our prometheus.yml with this target, every two seconds: a scrape may take as long, and machines may be busy."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"}
    assert config["rule_files"] == list(RULE_FILES)
    config["rule_files"] = [str(PROMETHEUS / name) for name in RULE_FILES]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [target]}]
    return config


@contextlib.contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Prometheus with our configuration and rules, scraping the agent at ``target``; it ends with the block."""
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(configuration(target)))
    address, log = f"127.0.0.1:{free_port()}", folder / "prometheus.log"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command += [f"--web.listen-address={address}", "--storage.tsdb.retention.time=1d", "--log.level=warn"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        server = Prometheus(address, log)

        def is_up() -> bool:
            assert process.poll() is None, f"prometheus ended:\n{log.read_text()}"
            return server.is_ready()

        wait_for(is_up, 30, what="Prometheus is ready")
        yield server
    finally:
        process.kill()  # its data is thrown away: it need not be written first
        process.wait()
