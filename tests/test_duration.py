"""Durations as Go writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tursi.duration import parse

UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600}

digits = st.text("0123456789", min_size=1, max_size=6)
numbers = st.one_of(
    digits,
    st.builds("{}.".format, digits),
    st.builds(".{}".format, digits),
    st.builds("{}.{}".format, digits, digits),
)
parts = st.lists(st.tuples(numbers, st.sampled_from(sorted(UNITS))), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10m", 600),
        ("-1m", -60),
        ("1h30m", 5400),
        ("300ms", 0.3),
        ("0", 0),
        ("-0", 0),
        ("+5s", 5),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("1.s", 1),
        ("1us", 1e-6),
        ("1m1m", 120),
    ],
)
def test_what_go_takes(text: str, seconds: float) -> None:
    assert parse(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        *("", "5", "-", "+", "s", ".", ".s", "1.2.3s", "1 s", " 1s", "1s ", "1d", "1S", "--1s"),
        *("1s-1s", "1h30", "1mss", "3000000h", "1e3s", "\N{FULLWIDTH DIGIT ONE}s", "00"),
        *("0" * 200 + "1s", "NaN", "inf"),
    ],
)
def test_what_go_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no duration|292 years"):
        parse(text)


@given(st.sampled_from(["", "-", "+"]), parts)
def test_the_grammar(sign: str, given_parts: list[tuple[str, str]]) -> None:
    text = sign + "".join(number + unit for number, unit in given_parts)
    seconds = sum(float(number) * UNITS[unit] for number, unit in given_parts)
    assert parse(text) == pytest.approx(-seconds if sign == "-" else seconds)


@given(st.text("0123456789.-+nuµmsh", max_size=12))
def test_whatever_else_is_a_value_error(text: str) -> None:
    try:
        parse(text)
    except ValueError:
        # Without a unit only nothing is taken.
        assert text not in {"0", "-0", "+0"}
    else:
        assert text[-1] in "smh" or text.lstrip("+-") == "0"
