"""What the command line makes of the answer to its request for a stream."""

from __future__ import annotations

import pytest

from cli.streams.upgrade import Upgrade
from host.errors import PodkeelError

SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n"


def asked() -> Upgrade:
    upgrade = Upgrade()
    request = upgrade.request("/exec/abc", "127.0.0.1:1", ("v4.channel.k8s.io", "channel.k8s.io"))
    head, *lines = request.decode().removesuffix("\r\n\r\n").split("\r\n")
    assert head == "POST /exec/abc HTTP/1.1"
    assert sorted(line.lower() for line in lines) == [
        "connection: upgrade",
        "content-length: 0",
        "host: 127.0.0.1:1",
        "upgrade: spdy/3.1",
        "user-agent: podkeel",
        "x-stream-protocol-version: channel.k8s.io",
        "x-stream-protocol-version: v4.channel.k8s.io",
    ]
    return upgrade


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_the_first_bytes_of_the_stream_are_not_lost(step: int) -> None:
    upgrade = asked()
    data = SWITCHED + b"\x80\x03frames"
    rests = []
    for begin in range(0, len(data), step):
        rest = upgrade.receive(data[begin : begin + step])
        if rest is not None:
            rests.append(rest + data[begin + step :])
            break
    assert rests == [b"\x80\x03frames"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 14\r\n\r\nno such token\n", "no such token"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "403 Forbidden"),
        (b"HTTP/1.0 500 Oops\r\n\r\nbroken", "broken"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", "hello"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 99\r\n\r\ncut", "cut"),
        (b"", "no answer"),
        (b"HTTP/1.1 101", "refused the stream"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "refused the stream"),
        (b"x" * 70_000, "refused the stream"),
    ],
)
def test_a_refusal_has_its_reason(answer: bytes, told: str) -> None:
    upgrade = asked()
    with pytest.raises(PodkeelError, match=told):
        assert not answer or upgrade.receive(answer) is None
        upgrade.receive(b"")
    assert upgrade.answered is bool(answer)
