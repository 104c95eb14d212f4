from __future__ import annotations

import re
from ipaddress import ip_network

import pytest

from host.errors import InvalidArgumentError
from network.bridge.network import BuiltInNetwork
from network.nftables.ruleset import listed_elements, remove_script, table_script
from network.options import NetworkOptions


def test_tables_are_replaced_and_ranges_are_merged() -> None:
    script = table_script(
        "podkeel0",
        [ip_network("10.88.0.0/17"), ip_network("10.88.128.0/17"), ip_network("fd00::/64")],
        [ip_network("10.0.0.0/8")],
        masquerade=True,
        elements=[],
    )
    assert script.startswith(remove_script("podkeel0"))
    assert "elements = { 10.88.0.0/16 };" in script
    assert re.search(r"set unmasked4 .*10\.0\.0\.0/8", script)
    assert script.count("masquerade") == 5
    assert "{table}" not in script


def test_masquerading_can_be_switched_off() -> None:
    script = table_script("podkeel0", [ip_network("10.88.0.0/16")], [], masquerade=False, elements=[])
    assert script.count("masquerade") == 3  # what comes from the node's loopback, and a pod's way to itself


def test_listing_is_read_in_the_words_elements_are_written() -> None:
    listing = (
        b'{"nftables": [{"metainfo": {}}, {"set": {"name": "itself4", "elem": [{"concat": ["10.0.0.2", "10.0.0.2"]}]}},'
        b'{"set": {"name": "ranges4", "elem": ["10.0.0.0"]}}, {"set": {"name": "pods4"}},'
        b'{"map": {"name": "any_ports4", "elem": [[{"concat": [6, 80]}, {"concat": ["10.0.0.2", 8080]}]]}}]}'
    )
    assert listed_elements([listing]) == {
        ("itself4", "10.0.0.2 . 10.0.0.2"),
        ("any_ports4", "6 . 80 : 10.0.0.2 . 8080"),
    }


@pytest.mark.parametrize("bridge", ["", "a" * 16, "pod keel", "x;flush ruleset", "../evil", 'a"b'])
def test_a_bridge_name_that_is_none_is_refused(bridge: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"network\.bridge"):
        BuiltInNetwork(NetworkOptions(bridge=bridge), None)  # type: ignore[arg-type]  # refused before it is used
