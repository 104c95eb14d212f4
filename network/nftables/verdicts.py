"""Predicts the verdict of an nftables chain for one packet, from its rules in JSON (libnftables-json(5))."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, NamedTuple

Rule = Sequence[Mapping[str, Any]]
_DEEPEST = 16
# Statements that never stop a packet. Others (quotas, limits, sets that count) allow only some packets to continue.
_IN_PASSING = frozenset(
    ("counter", "log", "mangle", "notrack", "flow", "dup", "secmark", "ct helper", "ct timeout", "ct expectation")
)


class Verdict(enum.Enum):
    """The verdict on a packet. ``UNSURE``: a rule before the one that drops the packet might accept it."""

    PASSED = "passed"
    UNSURE = "unsure"
    DROPPED = "dropped"


class Packet(NamedTuple):
    """A packet that is forwarded. ``answer``: it answers an earlier packet; else it is the first of its flow.

    A link is empty if it is not known.
    """

    from_link: str
    to_link: str
    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    answer: bool

    def fact(self, asked: Mapping[str, Any]) -> str | None:
        """The value of the field that a rule reads; None if it is not known."""
        protocol = "ip" if self.source.version == 4 else "ip6"
        known = {
            ("meta", "", "iif"): self.from_link or None,
            ("meta", "", "iifname"): self.from_link or None,
            ("meta", "", "oif"): self.to_link or None,
            ("meta", "", "oifname"): self.to_link or None,
            ("meta", "", "nfproto"): f"ipv{self.source.version}",
            ("ct", "", "state"): "established" if self.answer else "new",
            ("payload", protocol, "saddr"): str(self.source),
            ("payload", protocol, "daddr"): str(self.destination),
        }
        if not isinstance(asked, dict) or len(asked) != 1:
            return None
        ((kind, fields),) = asked.items()
        if not isinstance(fields, dict):
            return None
        looked_in = str(fields.get("protocol", ""))
        if kind == "payload" and looked_in in ("ip", "ip6") and looked_in != protocol:
            return ""
        return known.get((kind, looked_in, str(fields.get("key", fields.get("field", "")))))


class Chains:
    """The chains of one table: their rules by name, and the policies of those with a hook."""

    def __init__(self, listing: Sequence[Mapping[str, Any]]) -> None:
        self.policies: dict[str, str] = {}
        self.rules: dict[str, list[Rule]] = {}
        for entry in listing:
            if (chain := entry.get("chain")) is not None:
                self.rules.setdefault(chain["name"], [])
                if chain.get("hook") == "forward":
                    self.policies[chain["name"]] = chain.get("policy", "accept")
            elif (rule := entry.get("rule")) is not None:
                self.rules.setdefault(rule["chain"], []).append(rule["expr"])

    def verdict(self, chain: str, packet: Packet) -> Verdict:
        """The verdict of the hooked chain on the packet."""
        journey = _Journey(self.rules, packet)
        dropped = journey.through(chain, 0)
        if dropped is None:
            dropped = self.policies[chain] == "drop"
        if not dropped:
            return Verdict.PASSED
        return Verdict.UNSURE if journey.may_have_passed else Verdict.DROPPED


class _Journey:
    def __init__(self, rules: Mapping[str, Sequence[Rule]], packet: Packet) -> None:
        self._rules = rules
        self._packet = packet
        self.may_have_passed = False

    def through(self, chain: str, depth: int) -> bool | None:
        """Whether the packet is dropped (True) or passes (False); None if the chain returns without a verdict."""
        if depth > _DEEPEST:
            self.may_have_passed = True
            return None
        for rule in self._rules.get(chain, ()):
            matches, statement = self._read(rule)
            if matches is False or statement is None:
                continue
            end, dropped = self._outcome(statement, depth)
            if matches is None:  # it is unknown whether the rule matches
                self.may_have_passed |= dropped is False or (end and dropped is None)
            elif end:
                return dropped
        return None

    def _outcome(self, statement: tuple[str, str], depth: int) -> tuple[bool, bool | None]:
        """Whether the rule ends the packet's path through this chain, and whether the packet is dropped then."""
        kind, target = statement
        if kind in ("jump", "goto"):
            dropped = self.through(target, depth + 1)
            return kind == "goto" or dropped is not None, dropped
        if kind == "return":
            return True, None
        return True, kind == "drop"

    def _read(self, rule: Rule) -> tuple[bool | None, tuple[str, str] | None]:
        """Whether the rule matches the packet (None: unknown), and its effect then (None: no verdict)."""
        matches: bool | None = True
        statement: tuple[str, str] | None = None
        answers_only = False
        for expression in rule:
            ((kind, content),) = expression.items()
            if kind == "match":
                found = self._matches(content)
            elif kind == "vmap":
                found, statement = self._look_up(content)
            elif kind == "xt" and content and content.get("type") == "match":
                answers_only |= content.get("name") in ("conntrack", "state")
                found = True if content.get("name") == "comment" or answers_only else None
            else:
                stated = _statement(kind, content)
                # nft before 1.0.6 does not show the expressions that iptables made.
                in_passing = kind in _IN_PASSING or (kind == "xt" and content is not None)
                found, statement = True if stated or in_passing else None, stated or statement
            if found is False:
                return False, None
            matches = None if found is None else matches
        if answers_only:
            # Their arguments are hidden. Such rules usually accept answers and drop invalid packets.
            accepts = statement == ("accept", "")
            matches = matches if accepts and self._packet.answer else False if accepts else None
        return matches, statement

    def _look_up(self, content: Mapping[str, Any]) -> tuple[bool | None, tuple[str, str] | None]:
        """The same for a verdict map; ``accept`` if it may have an element that accepts the packet."""
        value = self._packet.fact(content["key"])
        table = content["data"].get("set") if isinstance(content["data"], dict) else None
        if not isinstance(table, list):
            return None, ("accept", "")
        unsure = False
        for key, verdict in table:
            ((kind, target),) = verdict.items()
            statement = _statement(kind, target)
            found = None if value is None else _equal(value, key)
            if found:
                return True, statement
            unsure |= found is None and statement != ("drop", "")
        return (None, ("accept", "")) if unsure else (False, None)

    def _matches(self, content: Mapping[str, Any]) -> bool | None:
        value = self._packet.fact(content["left"])
        if value is None:
            return None
        found = _equal(value, content["right"])
        if found is None or content["op"] not in ("==", "in", "!="):
            return None
        return not found if content["op"] == "!=" else found


def _statement(kind: str, content: Any) -> tuple[str, str] | None:
    match kind:
        case "accept" | "return":
            return kind, ""
        case "queue":
            return "accept", ""
        case "drop" | "reject":
            return "drop", ""
        case "jump" | "goto":
            return kind, content["target"]
        case "xt" if content and content.get("name") in ("REJECT", "DROP"):
            return "drop", ""
    return None


def _equal(value: str, wanted: object) -> bool | None:
    """Whether a rule's right side covers the value; None if its form is not supported here."""
    if isinstance(wanted, list):  # flags, any of which may be set
        return value in wanted
    if isinstance(wanted, str):
        if wanted.startswith("@"):
            return None
        return value.startswith(wanted[:-1]) if wanted.endswith("*") else value == wanted
    return _within(value, wanted) if isinstance(wanted, dict) else None


def _within(value: str, wanted: Mapping[str, Any]) -> bool | None:
    """The same for a set, an element of one with a comment or counter, a prefix or a range."""
    if isinstance(element := wanted.get("elem"), dict):
        return _equal(value, element.get("val"))
    if isinstance(members := wanted.get("set"), list):
        answers = [_equal(value, member) for member in members]
        return True if True in answers else None if None in answers else False
    try:
        if (prefix := wanted.get("prefix")) is not None:
            return bool(value) and ip_address(value) in ip_network(f"{prefix['addr']}/{prefix['len']}")
        if (ends := wanted.get("range")) is not None:
            first, last = (int(ip_address(end)) for end in ends)
            return bool(value) and first <= int(ip_address(value)) <= last
    except ValueError:
        pass
    return None
