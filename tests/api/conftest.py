"""Both ways of a request: past twisted.web, and through it."""

from __future__ import annotations

import conversation
import pytest


@pytest.fixture(params=[True, False], ids=["hot", "ordinary"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with the hot path and without."""
    monkeypatch.setattr(conversation, "hot_path", request.param)
