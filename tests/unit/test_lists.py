"""Items of a list in the messages of a stream."""

from __future__ import annotations

import pytest

from proto.wire import STREAM_BYTES, STREAM_ITEMS, in_messages


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([], []),
        ([1], [1]),
        ([1] * (STREAM_ITEMS * 2 + 1), [STREAM_ITEMS, STREAM_ITEMS, 1]),
        ([STREAM_BYTES // 2] * 5, [2, 2, 1]),
        ([1, STREAM_BYTES + 1, 1], [1, 1, 1]),
    ],
)
def test_items_are_few_and_small_in_each_message(items: list[int], messages: list[int]) -> None:
    made = [bytes([number % 256]) * size for number, size in enumerate(items)]
    found = list(in_messages(made))
    assert b"".join(found) == b"".join(made)
    ends = [sum(messages[: number + 1]) for number in range(len(messages))]
    assert found == [b"".join(made[end - count : end]) for end, count in zip(ends, messages, strict=True)]
