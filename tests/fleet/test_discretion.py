from __future__ import annotations

import pytest

from tursi.fleet.discretion import discreet


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("There is no folder /srv/models/mini.", "There is no folder [path]."),
        ("/srv/m/config.json isn't valid JSON.", "[path]/config.json isn't valid JSON."),
        (
            "[Errno 13] Permission denied: '/srv/my models/config.json'",
            "[Errno 13] Permission denied: '[path]/config.json'",
        ),
        ("(/home/alice) and /home/alice/x.", "([path]) and [path]."),
        (
            "see https://hub.co/org/name for it",
            "see https://hub.co/org/name for it",
        ),
        ("org/name has 3/4 and/or none", "org/name has 3/4 and/or none"),
        ("loading, 50 %", "loading, 50 %"),
    ],
)
def test_paths_are_not_told(text: str, told: str) -> None:
    assert discreet(text) == told


def test_known_folders_may_have_spaces() -> None:
    text = "/srv/my models/mini has no weights; /srv/my models/mini/a.json is broken"
    told = discreet(text, "/srv/my models/mini", None, "org/name")
    assert told == "[folder] has no weights; [folder]/a.json is broken"
