from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from network.nftables.verdicts import Chains, Packet, Verdict

_ACCEPT: dict[str, Any] = {"accept": None}
_DROP: dict[str, Any] = {"drop": None}
_COUNTER: dict[str, Any] = {"counter": {"packets": 0, "bytes": 0}}
_OUT = Packet("pods0", "eth0", ip_address("10.88.0.2"), ip_address("192.0.2.1"), False)
_BACK = Packet("eth0", "pods0", ip_address("192.0.2.1"), ip_address("10.88.0.2"), True)


def _match(left: dict[str, Any], right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def _meta(key: str, right: Any, op: str = "==") -> dict[str, Any]:
    return _match({"meta": {"key": key}}, right, op)


def _source(right: Any, protocol: str = "ip") -> dict[str, Any]:
    return _match({"payload": {"protocol": protocol, "field": "saddr"}}, right)


def _xt(name: str, kind: str = "match") -> dict[str, Any]:
    return {"xt": {"type": kind, "name": name}}


def _map(key: str, data: Any) -> dict[str, Any]:
    return {"vmap": {"key": {"meta": {"key": key}}, "data": data}}


def _commented(value: str) -> dict[str, Any]:
    return {"elem": {"val": value, "comment": "of somebody"}}


def _verdict(packet: Packet, *rules: list[dict[str, Any]], policy: str = "drop", **others: Any) -> Verdict:
    listing: list[dict[str, Any]] = [
        {"table": {"name": "filter"}},
        {"chain": {"name": "FORWARD", "hook": "forward", "policy": policy}},
        *({"chain": {"name": name}} for name in others),
        *({"rule": {"chain": "FORWARD", "expr": rule}} for rule in rules),
        *({"rule": {"chain": name, "expr": rule}} for name, found in others.items() for rule in found),
    ]
    return Chains(listing).verdict("FORWARD", packet)


@pytest.mark.parametrize(
    ("rules", "verdict"),
    [
        ([], Verdict.DROPPED),
        ([[_COUNTER, _ACCEPT]], Verdict.PASSED),
        ([[_meta("iifname", "pods0"), _ACCEPT]], Verdict.PASSED),
        ([[_meta("iifname", "pod*"), _ACCEPT]], Verdict.PASSED),
        ([[_meta("iifname", {"set": ["lo", "pods0"]}), _ACCEPT]], Verdict.PASSED),
        ([[_meta("iifname", "docker0"), _ACCEPT]], Verdict.DROPPED),
        ([[_meta("iifname", "docker0", "!="), _ACCEPT]], Verdict.PASSED),
        ([[_source({"prefix": {"addr": "10.88.0.0", "len": 16}}), _ACCEPT]], Verdict.PASSED),
        ([[_source({"range": ["10.88.0.0", "10.88.0.1"]}), _ACCEPT]], Verdict.DROPPED),
        ([[_source("10.88.0.2"), _ACCEPT]], Verdict.PASSED),
        ([[_source("@friends"), _ACCEPT]], Verdict.UNSURE),
        ([[_source("fd00::2", "ip6"), _ACCEPT]], Verdict.DROPPED),
        ([[_match({"ct": {"key": "state"}}, ["established", "related"], "in"), _ACCEPT]], Verdict.DROPPED),
        ([[_match({"&": [{"meta": {"key": "mark"}}, 16384]}, 16384), _ACCEPT]], Verdict.UNSURE),
        ([[_match({"payload": {"protocol": "tcp", "field": "dport"}}, 80), _DROP], [_ACCEPT]], Verdict.PASSED),
        ([[_xt("conntrack"), _COUNTER, _ACCEPT]], Verdict.DROPPED),
        ([[_xt("comment"), _ACCEPT]], Verdict.PASSED),
        ([[_xt("set"), _ACCEPT]], Verdict.UNSURE),
        ([[_xt("conntrack"), _DROP], [_ACCEPT]], Verdict.PASSED),
        ([[_xt("REJECT", "target")], [_ACCEPT]], Verdict.DROPPED),
        ([[_xt("LOG", "target")], [_ACCEPT]], Verdict.PASSED),
        ([[{"limit": {"rate": 1}}, _ACCEPT]], Verdict.UNSURE),
        ([[{"log": None}, {"reject": None}]], Verdict.DROPPED),
        ([[{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": {"set": [["pods0", _ACCEPT]]}}}]], Verdict.PASSED),
        ([[{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": {"set": [["lo", _ACCEPT]]}}}]], Verdict.DROPPED),
        ([[_map("iifname", "@links")]], Verdict.UNSURE),
        ([[_map("iifname", {"set": [[_commented("pods0"), _ACCEPT]]})]], Verdict.PASSED),
        ([[_map("mark", {"set": [[1, _ACCEPT]]})]], Verdict.UNSURE),
        ([[_map("mark", {"set": [[1, _DROP]]})], [_ACCEPT]], Verdict.PASSED),
        ([[_meta("iifname", {"set": [_commented("pods0"), "lo"]}), _ACCEPT]], Verdict.PASSED),
        ([[_meta("iif", "pods0"), _ACCEPT]], Verdict.PASSED),
        ([[_meta("oif", "lo"), _ACCEPT]], Verdict.DROPPED),
        ([[{"ct count": {"val": 1000, "inv": True}}, _DROP], [_ACCEPT]], Verdict.PASSED),
        ([[{"quota": {"val": 100, "val_unit": "mbytes", "inv": True}}, _DROP], [_ACCEPT]], Verdict.PASSED),
        ([[{"set": {"op": "add", "elem": "x", "set": "@s"}}, _DROP], [_ACCEPT]], Verdict.PASSED),
        ([[{"xt": None}, _ACCEPT]], Verdict.UNSURE),
        ([[{"xt": None}, _DROP], [_ACCEPT]], Verdict.PASSED),
    ],
)
def test_what_a_chain_does_with_what_a_pod_sends(rules: list[list[dict[str, Any]]], verdict: Verdict) -> None:
    assert _verdict(_OUT, *rules) is verdict


def test_answers_pass_by_rules_for_answers() -> None:
    for rule in ([_xt("conntrack"), _ACCEPT], [_match({"ct": {"key": "state"}}, ["established"], "in"), _ACCEPT]):
        assert _verdict(_BACK, rule) is Verdict.PASSED


def test_ways_through_other_chains() -> None:
    jump = [{"jump": {"target": "user"}}]
    goto = [{"goto": {"target": "user"}}]
    assert _verdict(_OUT, jump, user=[[_ACCEPT]]) is Verdict.PASSED
    assert _verdict(_OUT, jump, [_ACCEPT], user=[[{"return": None}], [_DROP]]) is Verdict.PASSED
    assert _verdict(_OUT, goto, [_ACCEPT], user=[[{"return": None}]]) is Verdict.DROPPED
    assert _verdict(_OUT, [_xt("set"), *jump], user=[[_ACCEPT]]) is Verdict.UNSURE
    assert _verdict(_OUT, [_xt("set"), *jump], user=[[_DROP]], policy="accept") is Verdict.PASSED
    assert _verdict(_OUT, jump, user=[jump]) is Verdict.UNSURE  # round and round
    assert _verdict(_OUT, [{"jump": {"target": "gone"}}], policy="accept") is Verdict.PASSED


def test_where_a_rule_may_end_a_chain_before_the_packet_is_dropped() -> None:
    perhaps = _meta("mark", 1)
    back, away = [perhaps, {"return": None}], [perhaps, {"goto": {"target": "user"}}]
    assert _verdict(_OUT, back, [_DROP], policy="accept") is Verdict.UNSURE
    assert _verdict(_OUT, away, [_DROP], policy="accept", user=[[_COUNTER]]) is Verdict.UNSURE
    assert _verdict(_OUT, away, [_DROP], policy="accept", user=[[_DROP]]) is Verdict.DROPPED
    assert _verdict(_OUT, [{"jump": {"target": "user"}}], [_ACCEPT], user=[back, [_DROP]]) is Verdict.UNSURE


def test_a_node_without_a_default_route() -> None:
    nowhere = _OUT._replace(to_link="")
    assert _verdict(nowhere, [_meta("oifname", "eth0"), _ACCEPT]) is Verdict.UNSURE
    assert _verdict(nowhere, [_meta("oifname", "eth0"), _DROP], [_ACCEPT]) is Verdict.PASSED
