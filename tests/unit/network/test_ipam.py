from __future__ import annotations

import time
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.errors import InvalidArgumentError, LimitError, WrongStateError
from network.ipam import AddressPool, IPAddress, Ipam, gateway_of, parse_ranges


def _pool(cidr: str, quarantine: float = 60) -> AddressPool:
    return AddressPool(ip_network(cidr), quarantine)


def test_network_gateway_and_broadcast_are_never_given_out() -> None:
    pool = _pool("10.0.0.0/29")
    given_out = [str(pool.allocate()) for _ in range(5)]
    assert given_out == [f"10.0.0.{number}" for number in (2, 3, 4, 5, 6)]
    assert pool.allocate() is None
    assert str(gateway_of(pool.network)) == "10.0.0.1"


def test_the_last_ipv6_address_is_an_address() -> None:
    pool = _pool("fd00::/126")
    assert [str(pool.allocate()), str(pool.allocate()), pool.allocate()] == ["fd00::2", "fd00::3", None]


def test_a_released_address_rests_and_one_never_used_does_not() -> None:
    pool = _pool("10.0.0.0/30")
    address = pool.allocate()
    assert address is not None
    pool.release(address)
    assert pool.allocate() is None
    unused = _pool("10.0.0.0/30")
    address = unused.allocate()
    assert address is not None
    unused.free_unused(address)
    assert unused.allocate() == address


def test_rotation_comes_back_to_the_beginning() -> None:
    pool = _pool("10.0.0.0/29", quarantine=0)
    seen = []
    for _ in range(7):
        address = pool.allocate()
        assert address is not None
        seen.append(str(address))
        pool.release(address)
    assert seen == [f"10.0.0.{number}" for number in (2, 3, 4, 5, 6, 2, 3)]


def test_a_clock_that_was_set_back_frees_rather_than_blocks() -> None:
    pool = _pool("10.0.0.0/30")
    pool.restore(ip_address("10.0.0.2"), 1.0, time.time() + 10_000)
    assert str(pool.allocate()) == "10.0.0.2"


def test_rotation_continues_after_the_last_assigned_address() -> None:
    pool = _pool("10.0.0.0/24")
    pool.restore(ip_address("10.0.0.9"), 20.0, None)
    pool.restore(ip_address("10.0.0.5"), 30.0, None)
    pool.restore(ip_address("10.0.0.7"), 10.0, None)
    assert str(pool.allocate()) == "10.0.0.6"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=80))
def test_no_address_is_ever_held_twice(steps: list[tuple[bool, int]]) -> None:
    pool = _pool("10.0.0.0/28", quarantine=0)
    held: list[IPAddress] = []
    for take, position in steps:
        if take:
            address = pool.allocate()
            assert (address is None) == (len(held) == 13)
            if address is not None:
                assert address not in held
                assert address in pool.network
                held.append(address)
        elif held:
            pool.release(held.pop(position % len(held)))
    assert pool.taken == len(held)


def test_families_come_in_the_order_of_the_ranges_and_all_or_nothing() -> None:
    book = Ipam(parse_ranges(["fd00::/64", "10.0.0.0/30"]), 60)
    assert [str(address) for _, address in book.allocate()] == ["fd00::2", "10.0.0.2"]
    with pytest.raises(LimitError, match=r"10\.0\.0\.0/30 \(1 in use, 0 in quarantine\)"):
        book.allocate()
    book.use(parse_ranges(["fd00::/64"]))
    assert [str(address) for _, address in book.allocate()] == ["fd00::4"]
    assert {str(network) for network in book.in_use()} == {"fd00::/64", "10.0.0.0/30"}


def test_ranges_that_overlap_older_ones_give_nothing_out_twice() -> None:
    book = Ipam(parse_ranges(["10.0.0.0/28"]), 60)
    held = [address for _ in range(5) for _, address in book.allocate()]
    old, resting = ip_network("10.0.0.0/28"), held.pop(1)
    book.release(old, resting)
    book.use(parse_ranges(["10.0.0.0/29"]))
    with pytest.raises(LimitError):
        book.allocate()
    book.release(old, held.pop())
    book.use(parse_ranges(["10.0.0.0/27"]))  # the gateway is the same: it may be
    for _ in range(24):
        held += [address for _, address in book.allocate()]
    assert len(set(held)) == len(held)
    assert resting not in held
    assert max(held) == ip_address("10.0.0.30")


def test_a_range_whose_gateway_is_a_pod_is_refused() -> None:
    book = Ipam(parse_ranges(["10.0.0.0/24"]), 0)
    book.restore("10.0.0.0/24", "10.0.0.9", 1.0, None)
    before = book.current
    with pytest.raises(
        WrongStateError, match=r"a pod has its gateway.s address 10\.0\.0\.9, from the earlier range 10\.0\.0\.0/24"
    ):
        book.use(parse_ranges(["10.0.0.8/29"]))
    assert book.current == before
    book.release(before[0], ip_address("10.0.0.9"))
    book.use(parse_ranges(["10.0.0.8/29"]))
    assert [str(address) for _, address in book.allocate()] == ["10.0.0.10"]


@pytest.mark.parametrize(
    ("cidrs", "named"),
    [
        ([], "0 ranges"),
        (["10.0.0.0/33"], "10.0.0.0/33"),
        (["10.0.0.1/24"], "10.0.0.1/24"),
        (["10.0.0.0/31"], "too small"),
        (["fd00::/127"], "too small"),
        (["224.0.0.0/24"], "multicast"),
        (["fe80::/64"], "link-local"),
        (["127.0.0.0/24"], "loopback"),
        (["10.0.0.0/8", "10.1.0.0/16"], "overlap"),
        (["10.0.0.0/16"] * 17, "17 ranges"),
    ],
)
def test_bad_ranges_are_refused_by_name(cidrs: list[str], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        parse_ranges(cidrs)
