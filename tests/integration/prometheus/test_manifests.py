"""The rules and the dashboard alone: promtool's checks, and what people expect of such files."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cri.telemetry.monitoring import NODE_ERRORS
from tests.integration.prometheus.manifests import (
    FOLDER,
    PROMETHEUS,
    RULE_FILES,
    dashboard,
    dashboard_queries,
    metric_of,
    panels,
    rule_queries,
    rules,
    selectors,
)


def promtool(*words: str | Path, folder: Path = PROMETHEUS) -> str:
    done = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_configuration_of_a_node() -> None:
    assert "2 rule files found" in promtool("check", "config", "prometheus.yml")


def test_configuration_of_a_cluster(tmp_path: Path) -> None:
    """Debian builds Prometheus without the discovery of Kubernetes: another one replaces it here."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus-cluster.yml").read_text())
    for job in config["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs") == [{"role": "node"}]
        job["static_configs"] = [{"targets": ["node1:10250"]}]
        for key in ("ca_file", "cert_file", "key_file"):
            (tmp_path / key).touch()
            job["tls_config"][key] = str(tmp_path / key)
        address = next(rule for rule in job["relabel_configs"] if rule.get("target_label") == "__address__")
        assert re.fullmatch(address["regex"], "[fd00::1]:10250")
        assert address["replacement"] == "${1}:10351"
    for name in RULE_FILES:
        (tmp_path / name).write_bytes((PROMETHEUS / name).read_bytes())
    (tmp_path / "cluster.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", "cluster.yml", folder=tmp_path)


def test_both_configurations_have_the_jobs_that_rules_and_dashboard_name() -> None:
    expressions = " ".join(query.expression for query in itertools.chain(rule_queries(), dashboard_queries()))
    named = set(re.findall(r'job=~?"([^"]+)"', expressions))
    for name in ("prometheus.yml", "prometheus-cluster.yml"):
        config = yaml.safe_load((PROMETHEUS / name).read_text())
        jobs = {job["job_name"]: job for job in config["scrape_configs"]}
        assert set(jobs) == {job for names in named for job in names.split("|")}
        assert jobs["podkeel-containers"]["metrics_path"] == "/metrics/cadvisor"
        assert all(job["honor_labels"] for job in jobs.values())


def test_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULE_FILES)


def test_rules_fire_where_they_should() -> None:
    promtool("test", "rules", "rules.test.yml")


def test_every_alert_is_tested() -> None:
    tested = set(re.findall(r'alertname="(\w+)"', (PROMETHEUS / "rules.test.yml").read_text()))
    assert tested == {rule["alert"] for rule in rules("alert")}


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: str(rule["alert"]))
def test_an_alert_names_the_problem_and_the_remedy(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert len(annotations["summary"]) < 130
    assert annotations["description"].endswith(".")
    file, _, anchor = annotations["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    assert anchor in sections(FOLDER.parent / file)


def test_runbook_has_no_section_without_an_alert() -> None:
    assert sections(PROMETHEUS / "RUNBOOK.md") == {rule["alert"].lower() for rule in rules("alert")}


def test_commands_of_the_runbook_exist() -> None:
    from cli.arguments.parser import build_parser

    text = (PROMETHEUS / "RUNBOOK.md").read_text()
    commands = set(re.findall(r"`podkeel ([a-z-]+)", text)) | set(re.findall(r"^podkeel ([a-z-]+)", text, re.MULTILINE))
    assert {"check", "explain", "ps", "image"} <= commands
    known = build_parser().format_help()
    assert [name for name in sorted(commands) if not re.search(rf"^    {name}\b", known, re.MULTILINE)] == []


def sections(path: Path) -> set[str]:
    """Anchors of the sections of a Markdown file."""
    return {line[3:].strip().lower() for line in path.read_text().splitlines() if line.startswith("## ")}


def test_recorded_series_that_are_used_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules("record")}
    queries = [*rule_queries(), *dashboard_queries()]
    used = {metric_of(found) for query in queries for found in selectors(query.expression) if ":" in metric_of(found)}
    assert used <= recorded
    assert recorded - used == set(), "no query asks for these"


def test_errors_that_are_the_node_s_have_series_from_the_start() -> None:
    (errors,) = (rule["expr"] for rule in rules("record") if rule["record"] == "method:podkeel_call_errors:increase10m")
    named = re.search(r'code=~"([^"]+)"', errors)
    assert named is not None
    assert set(named[1].split("|")) == {code.name for code in NODE_ERRORS}


def test_selectors_are_found_in_queries() -> None:
    query = """sum by (pod, le) (rate(a_total{x=~"b{1}|c",
      y!=""}[5m])) / ignoring (kind) (d:e:f > 0.1e2) and time() - g < 900 or absent(up{job="h"}) unless j offset 5m"""
    assert selectors(query) == {'a_total{x=~"b{1}|c", y!=""}', "d:e:f", "g", 'up{job="h"}', "j"}


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    every = dashboard()["panels"]
    ids = [panel["id"] for panel in every]
    assert len(set(ids)) == len(ids)
    taken: dict[tuple[int, int], str] = {}
    for panel in every:
        place = panel["gridPos"]
        assert place["w"] > 0
        assert place["h"] > 0
        assert 0 <= place["x"] <= 24 - place["w"]
        cells = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        for cell in itertools.product(*cells):
            assert taken.setdefault(cell, panel["title"]) == panel["title"], "these two overlap"
    titles = [panel["title"] for panel in every]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: str(panel["title"]))
def test_panel_can_be_read(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    # What Grafana knows by these names; `none` is a plain number.
    units = {"none", "s", "bytes", "Bps", "percentunit", "reqps", "ops"}
    assert panel["fieldConfig"]["defaults"]["unit"] in units
    letters = [target["refId"] for target in panel["targets"]]
    assert len(set(letters)) == len(letters) > 0
    for source in (panel, *panel["targets"]):
        assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert target["legendFormat"]
        assert target["instant"] is not target["range"]
        assert target["range"] == (panel["type"] == "timeseries")


def test_legends_name_labels_that_are_left() -> None:
    """A sum by some labels has no others to show."""
    for panel in panels():
        for target in panel["targets"]:
            shown = set(re.findall(r"{{\s*(\w+)\s*}}", target["legendFormat"]))
            outermost = re.match(r"(?:sum|count|max|min) by \(([^)]*)\)|(?:sum|count|max|min)\(", target["expr"])
            if outermost is not None:
                left = {label.strip() for label in (outermost[1] or "").split(",")}
                assert shown <= left, panel["title"]


def test_variables_of_the_dashboard() -> None:
    model = dashboard()
    variables = {variable["name"]: variable for variable in model["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "namespace"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for name in ("instance", "namespace"):
        assert variables[name]["datasource"]["uid"] == "${datasource}"
        assert variables[name]["multi"]
        assert variables[name]["includeAll"]
    text = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    used = set(re.findall(r"\$(\w+)", text))
    assert used == {"instance", "namespace", "__rate_interval"}
    # Several nodes can be chosen at once: only a regular expression takes that.
    assert re.findall(r'\w+(?:=|!=)"\$', text) == []
    assert model["uid"]
    assert model["schemaVersion"] >= 36
    assert "id" not in model or model["id"] is None, "that of one Grafana"
