from __future__ import annotations

import pytest

from cri.streaming.httpstream import turns


@pytest.fixture(autouse=True)
def one_turn_is_enough(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine any call may take longer than a turn, and be cut in two: only tests of turns want that."""
    if request.path.stem != "test_turns":
        monkeypatch.setattr(turns, "SECONDS", 600.0)
