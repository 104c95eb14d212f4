"""The files of manifests/prometheus and manifests/grafana, read as the tests need them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[3] / "manifests"
PROMETHEUS = FOLDER / "prometheus"
DASHBOARD = FOLDER / "grafana/podkeel.json"
RULE_FILES = ("recording.yml", "alerts.yml")

_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_RANGE = re.compile(r"\[[^\]]*\]")
_SELECTOR = re.compile(r"(?<![\w.])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\s*\(|\w)")
_OPERATORS = {"and", "or", "unless", "offset", "bool", "by", "without", "on", "ignoring"}


@dataclass(frozen=True)
class Query:
    """A query and its place."""

    place: str
    expression: str


def rules(kind: str = "") -> list[dict[str, Any]]:
    """All rules, or those of a kind: ``alert``, ``record``."""
    groups = (group for name in RULE_FILES for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"])
    return [rule for group in groups for rule in group["rules"] if not kind or kind in rule]


def dashboard() -> dict[str, Any]:
    """The dashboard's model."""
    model: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return model


def panels() -> list[dict[str, Any]]:
    """Panels that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[Query]:
    """What the dashboard asks for, as Grafana sends it when all nodes and namespaces are chosen."""
    for panel in panels():
        for target in panel["targets"]:
            yield Query(f"{panel['title']} {target['refId']}", _filled_in(target["expr"]))
    for annotation in dashboard()["annotations"]["list"]:
        yield Query(annotation["name"], _filled_in(annotation["expr"]))


def rule_queries() -> Iterator[Query]:
    """What the rules ask for."""
    for rule in rules():
        yield Query(rule.get("alert") or rule["record"], rule["expr"])


def _filled_in(expression: str) -> str:
    for name, value in (("$__rate_interval", "5m"), ("$instance", ".*"), ("$namespace", ".*")):
        expression = expression.replace(name, value)
    assert "$" not in expression, f"{expression}: has a variable that this does not know"
    return expression


def selectors(expression: str) -> set[str]:
    """The series that a query of PromQL selects: names, with matchers where it has some."""
    masked = _STRING.sub(lambda found: '"' + "s" * (len(found[0]) - 2) + '"', expression)
    for pattern in (_GROUPING, _RANGE):
        masked = pattern.sub(lambda found: " " * len(found[0]), masked)
    found = set()
    for match in _SELECTOR.finditer(_without_braces(masked)):
        name, begin = match[1], match.start(1)
        if name in _OPERATORS:
            continue
        closing = masked.find("}", begin)
        has_matchers = masked[begin + len(name) :].lstrip().startswith("{")
        end = closing + 1 if has_matchers else begin + len(name)
        found.add(" ".join(expression[begin:end].split()))
    return found


def _without_braces(text: str) -> str:
    """The text with blanks for what is in braces, at the same offsets."""
    return re.sub(r"\{[^}]*\}", lambda found: "{" + " " * (len(found[0]) - 2) + "}", text)


def metric_of(selector: str) -> str:
    """The name in a selector."""
    return selector.partition("{")[0].strip()
