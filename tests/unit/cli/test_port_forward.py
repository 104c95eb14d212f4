from __future__ import annotations

import pytest

from cli.streams.port_forward import Forward, parse_forward
from host.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("text", "forward"), [("8080:80", Forward(8080, 80)), ("80", Forward(80, 80)), (":80", Forward(0, 80))]
)
def test_ports(text: str, forward: Forward) -> None:
    assert parse_forward(text) == forward


@pytest.mark.parametrize("text", ["", "http", "1:2:3", "80:", "8080:0", "0", "65536", "-1:80", "8\u0660"])
def test_what_names_no_ports(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_forward(text)
