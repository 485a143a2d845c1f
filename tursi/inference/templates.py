"""Limits on chat templates: programs that come with a model, rendered for each chat.

jinja2's sandbox keeps them from files and from Python's inside, but not from
computing for hours or taking all memory, which would cost every other request of
the worker.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

SECONDS = 2.0
"""Of processor time for one chat; usual templates take a few milliseconds."""
MEMORY = 256 * 1024 * 1024
"""Bytes that the process may grow by meanwhile."""
_EVERY = 0.005
"""Seconds between two looks: not enough to fill much memory step by step."""
_NUMBER = 100_000
"""The largest number that a function may be given: widths, counts, lengths."""
_LENGTH = 4 * 1024 * 1024
"""The longest that a single operation may make a string or a list."""
_BITS = 4096
_WIDE = re.compile(r"\d{6,}|\*")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class TemplateTooCostly(TemplateError):
    """What the template does is out of proportion."""


class _Filters(dict[str, Callable[..., Any]]):
    """Filters whose arguments are looked at first."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            _check_arguments(args, kwargs)
            if name == "join":
                args = (*args[:1], _joinable(args[1]), *args[2:]) if len(args) > 1 else args
            if name == "replace":
                _check_replacement([*args, *kwargs.values()])
            return function(*args, **kwargs)

        super().__setitem__(name, limited)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which no single operation is large."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        filters = _Filters()
        for name, function in self.filters.items():
            filters[name] = function
        self.filters = filters

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute, unless the result would be large."""
        if operator == "%":
            if isinstance(left, str):
                _check_format(left)
        elif isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * abs(right)
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            _limit(bits, _BITS)
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and hasattr(other, "__len__"):
                    _limit(one * len(other), _LENGTH)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call, unless what is asked for is large."""
        _check_arguments(args, kwargs)
        # The sandbox wraps the methods that format.
        method = getattr(function, "__wrapped__", function)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name in {"format", "format_map"}:
                _check_format(owner)
            elif name == "replace":
                _check_replacement([owner, *args])
            elif name == "join" and args:
                args = (_joinable(args[0]), *args[1:])
        return super().call(context, function, *args, **kwargs)


def limit_templates() -> None:
    """Make transformers render all chat templates in such a sandbox."""
    # There is no parameter for it; the tests notice when the name has changed.
    vars(chat_template_utils)["ImmutableSandboxedEnvironment"] = LimitedEnvironment


@contextmanager
def limited(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Raise ``TemplateTooCostly`` in whatever renders for too long or grows too large.

    Looks at every line of the template and at every call of a Python function, in
    this thread.
    """
    now = time.perf_counter
    until, due = time.thread_time() + seconds, now() + _EVERY
    most = _resident() + memory

    def look(frame: FrameType, _event: str, _value: Any) -> Any:
        nonlocal due
        if now() > due:
            due = now() + _EVERY
            if time.thread_time() > until:
                raise TemplateTooCostly(f"it takes longer than {seconds:g} s of processor time")
            if _resident() > most:
                raise TemplateTooCostly(f"it takes more than {memory >> 20} MiB of memory")
        return look if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            _limit(value, _NUMBER)


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise TemplateTooCostly("it formats text to an enormous width")


def _check_replacement(values: list[Any]) -> None:
    """Of a text, what to replace in it, and by what."""
    lengths = [len(each) for each in values if isinstance(each, str)]
    if len(lengths) > 2:
        _limit(lengths[0] * lengths[2], _LENGTH * 16)


def _joinable(items: Any) -> list[Any]:
    found = list(items)
    _limit(sum(len(item) for item in found if isinstance(item, str)), _LENGTH * 16)
    return found


def _limit(size: int, most: int) -> None:
    if abs(size) > most:
        raise TemplateTooCostly("one of its operations is enormous")
