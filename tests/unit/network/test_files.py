from __future__ import annotations

from pathlib import Path

import pytest

from host.errors import InvalidArgumentError
from runtime.pods.etc_files import hosts_file, resolv_conf


def test_resolv_conf_has_what_was_given() -> None:
    assert resolv_conf(["10.96.0.10", "fd00::a"], ["a.svc", "svc"], ["ndots:5", "edns0"]) == (
        "search a.svc svc\nnameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5 edns0\n"
    )
    assert resolv_conf([], [], ["ndots:5"]) == "options ndots:5\n"


def test_without_configuration_it_is_the_nodes(tmp_path: Path) -> None:
    own = tmp_path / "resolv.conf"
    assert resolv_conf([], [], [], host_file=own) == ""
    own.write_bytes(b"nameserver 192.0.2.1 # \xff\n")
    assert resolv_conf([], [], [], host_file=own).startswith("nameserver 192.0.2.1")
    assert "192.0.2.1" not in resolv_conf(["192.0.2.2"], [], [], host_file=own)


@pytest.mark.parametrize(
    ("servers", "searches", "options"),
    [
        (["dns.example"], [], []),
        (["10.0.0.1\noptions debug"], [], []),
        ([], ["a b"], []),
        ([], [""], []),
        ([], ["a\nnameserver 6.6.6.6"], []),
        ([], [], ["ndots:5\t"]),
        ([], [f"d{number}" for number in range(33)], []),
        ([], ["x" * 200] * 11, []),
    ],
)
def test_what_would_break_the_file_is_refused(servers: list[str], searches: list[str], options: list[str]) -> None:
    with pytest.raises(InvalidArgumentError, match="DNS"):
        resolv_conf(servers, searches, options)


def test_the_largest_search_list_is_accepted() -> None:
    searches = ["x" * 63] * 32
    assert resolv_conf([], searches, []) == f"search {' '.join(searches)}\n"


def test_hosts_has_localhost_and_the_pod(tmp_path: Path) -> None:
    lines = hosts_file("web-0", ["10.88.0.5", "fd00::5"]).splitlines()
    assert lines[0].split() == ["127.0.0.1", "localhost"]
    assert [line.split() for line in lines[-2:]] == [["10.88.0.5", "web-0"], ["fd00::5", "web-0"]]
    own = tmp_path / "hosts"
    own.write_text("127.0.0.1 node\n")
    assert hosts_file("node", [], host_network=True, host_file=own) == "127.0.0.1 node\n"
