"""Options that every command has."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta

import click

from tursi import duration
from tursi.cli.connection import Exit, Failure
from tursi.errors import InvalidRequest
from tursi.model import check_replicas

as_json = click.option("--json", is_flag=True, help="Print JSON, as the HTTP API has it.")
"""``--json``; a command takes it as ``json: bool``."""


_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class Size(click.ParamType):  # type: ignore[type-arg]  # older ones take no argument
    """A size with its unit, as in 2GiB, 1.5G or 300MB; a bare number is in bytes."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is no size; write it like 2GiB, 512MiB or 1.5G.", param, ctx)
        number, unit, rest = found.groups()
        # As everywhere: GB are powers of 1000, GiB of 1024; G alone is memory, so GiB.
        base = 1000 if rest == "b" and unit else 1024
        return int(float(number) * base ** _UNITS[unit])


class Number(click.FloatRange):
    """A number within bounds, and neither infinite nor what isn't one at all."""

    def convert(
        self, value: float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """That number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number that can be used here.", param, ctx)
        return number


class Seconds(Number):
    """Seconds within bounds, also as a duration: 10m or 1h30m."""

    name = "seconds"

    def convert(
        self, value: float | str, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds."""
        try:
            number = float(value)
        except ValueError:
            try:
                number = duration.parse(str(value))
            except ValueError as error:
                self.fail(f"{error}; give seconds, or such as 10m.", param, ctx)
        return super().convert(number, param, ctx)


_AGO = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def since_time(text: str | None) -> str | None:
    """A point in time as the API takes it."""
    if text is None:
        return None
    try:
        if text[-1:] in _AGO and text[:-1].isdigit():
            moment = datetime.now(UTC) - timedelta(**{_AGO[text[-1]]: int(text[:-1])})
        else:
            moment = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Failure(
            f"{text!r} is no time; write it like 24h, 7d or 2026-11-26T14:00.", Exit.USAGE
        ) from None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


class Replicas(click.ParamType):  # type: ignore[type-arg]  # as above
    """A number of workers, or a range such as 1-4."""

    name = "number"

    def convert(
        self,
        value: str | tuple[int, int | None],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[int, int | None]:
        """The least, and the most if that is something else."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,4})(?:(?:-|\.\.)(\d{1,4}))?", value.strip())
        if found is None:
            self.fail(f"{value!r} is no number of workers; write it like 2, or 1-4.", param, ctx)
        least, most = int(found[1]), int(found[2]) if found[2] else None
        try:
            check_replicas(least, most)
        except InvalidRequest as error:
            self.fail(error.message, param, ctx)
        return least, most
