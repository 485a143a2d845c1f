"""Chat templates that would cost the worker its time or its memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import models
import pytest

from tursi.inference.templates import TemplateTooCostly, limit_templates, limited

MESSAGES = [{"role": "user", "content": "hello"}]


def render(template: str, messages: list[dict[str, Any]] = MESSAGES, seconds: float = 0.5) -> str:
    limit_templates()
    tokenizer = models.byte_level_tokenizer(template)
    with limited(seconds):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


@pytest.mark.parametrize(
    "template",
    [
        # time
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{%macro m()%}{%for a in range(99999)%}{{a}}{%endfor%}{{m()}}{%endmacro%}{{m()}}",
        "{{ 9 ** 99999999999 }}",
        "{{ lipsum(n=1000000) }}",
        # memory
        "{{ 'x' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{% set n = namespace(x='x') %}{% for a in range(60)%}{%set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for a in range(60)%}{%set n.x = n.x + n.x %}{% endfor %}",
        "{{ 'x'|center(10000000000) }}",
        "{{ 'x'.ljust(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:10000000000}'.format('x') }}",
        "{{ 'x'|tojson(indent=10000000000) }}",
        "{% set x = 'x' * 100000 %}{{ x.replace('x', x) }}",
        "{% set x = 'x' * 100000 %}{{ x|replace('x', x) }}",
        "{% set x = 'x' * 100000 %}{{ ([x] * 100000)|join }}",
        "{% set x = 'x' * 100000 %}{{ ''.join([x] * 100000) }}",
    ],
)
def test_a_bomb_is_stopped(template: str) -> None:
    began = time.thread_time()
    with pytest.raises(TemplateTooCostly):
        render(template)
    assert time.thread_time() - began < 5


def test_what_usual_templates_do_goes_on() -> None:
    template = (
        "{% for m in messages %}{{ m['role']|upper ~ ': ' ~ m['content'].strip() }}\n"
        "{{ '-' * 3 }}{{ 7 % 2 }}{{ '%s' % m.role }}{{ m|tojson(indent=2) }}"
        "{{ ['a', 'b']|join(', ') }}{{ 'a-b'.replace('-', '+') }}{{ 'a-b'|replace('-', '_') }}"
        "{{ ', '.join(['c', 'd']) }}{{ '{:>4}'.format('x') }}{{ 2 ** 10 }}{% endfor %}"
    )
    assert render(template) == (
        'USER: hello\n---1user{\n  "role": "user",\n  "content": "hello"\n}a, ba+ba_bc, d   x1024'
    )


def test_a_long_chat_is_within_the_limits() -> None:
    messages = [{"role": "user", "content": "hello " * 1000}] * 500
    assert len(render(models.CHAT_TEMPLATE, messages, 2.0)) > 3_000_000


def test_the_worker_says_that_the_template_is_to_blame(tmp_path: Path) -> None:
    from tursi.errors import InvalidRequest
    from tursi.inference.prompts import Prompts
    from tursi.inference.tokens import Tokenizer
    from tursi.tasks import GenerateRequest, Message

    bomb = "{{ 'x' * 10000000000 }}"
    tokenizer = Tokenizer(
        models.byte_level_tokenizer(bomb), vocabulary=320, limit=None, lower=False
    )
    request = GenerateRequest(messages=(Message("user", "hello"),))
    with pytest.raises(InvalidRequest, match=r"chat template refuses.*enormous"):
        Prompts(tokenizer, 256).read(request)
