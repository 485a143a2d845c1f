"""What the OpenAPI document promises is kept, whatever is sent."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import schemathesis
from conversation import INFO, hot_or_not
from fake_fleet import End, FakeFleet, Head, Passage
from fake_keys import ADMIN, FakeKeys
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from tursi.api import Front, Keys
from tursi.api.fleet import Sink
from tursi.config import Configuration, Http, Requests
from tursi.errors import TursiError
from tursi.faces import TABLE
from tursi.faces.route import Context
from tursi.fleet import Work
from tursi.model import Role, Task, Usage
from tursi.tasks import (
    Choice,
    Classifications,
    ClassifyRequest,
    Embeddings,
    EmbedRequest,
    Fill,
    FillMaskRequest,
    Fills,
    Generated,
    GenerateRequest,
    Label,
    Similarities,
    SimilarityRequest,
    TaskRequest,
    TaskResult,
)

reactor: Any = _reactor
EXAMPLES = 12
"""Of each operation; the same ones each time."""
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.response_headers_conformance,
]


def compute(request: TaskRequest) -> TaskResult:
    """Some result of the right form."""
    usage = Usage(3, 2, 1)
    match request:
        case EmbedRequest():
            count = len(request.inputs)
            return Embeddings(struct.pack("<2f", 0.5, 2) * count, count, 2, usage)
        case SimilarityRequest():
            return Similarities((0.5,) * len(request.sentences), usage)
        case ClassifyRequest():
            return Classifications(((Label("good", 0.75),),) * len(request.inputs), usage)
        case FillMaskRequest():
            return Fills((((Fill(0.5, 7, "a", "a b"),),),) * len(request.inputs), usage)
        case GenerateRequest():
            count = max(1, len(request.prompts)) * request.n
            choices = tuple(Choice(index, "text", "stop") for index in range(count))
            return Generated(choices, usage)
    raise AssertionError(request)


class AnsweringFleet(FakeFleet):
    """Answers requests as a worker does, with results that nothing computed."""

    def submit(self, model: str, work: Work, sink: Sink) -> Passage:
        passage = Passage(model, work, sink)
        route = TABLE.named(work.route)
        assert route is not None
        for task in sorted(route.tasks):
            context = Context("small", Task(task), work.request_id, 1_700_000_000)
            try:
                call = route.decode(work.body, work.content_type, context)
                if call.stream:
                    sink.head(Head(200, "text/event-stream", {}))
                    sink.body(call.opening() + call.closing(Usage(3, 2, 1)))
                    sink.end(End())
                    return passage
                answer = call.whole(compute(call.request))
            except TursiError as error:
                answer = route.error(error)
                if error.param == "model" or answer.status >= 500:
                    continue
            break
        headers = dict(answer.headers or {})
        sink.head(Head(answer.status, answer.content_type, headers))
        sink.body(answer.body)
        sink.end(End())
        return passage

    async def backup(self) -> Path:
        number, name = tempfile.mkstemp()
        os.close(number)
        return Path(name)


@pytest.fixture
def served() -> Iterator[str]:
    """The URL of a site that answers everything."""
    configuration = Configuration(http=hot_or_not(Http()), requests=Requests())
    store = FakeKeys()
    keys = Keys(store, reactor)
    keys.ring.load(store.held)
    site = Front(AnsweringFleet(), INFO, configuration, reactor, keys).site(tuple(Role))
    listening = reactor.listenTCP(0, site, interface="127.0.0.1")
    yield f"http://127.0.0.1:{listening.getHost().port}"
    pytest_twisted.blockon(listening.stopListening())
    for channel in list(site.channels):
        channel.abort()
    while site.channels:
        pytest_twisted.blockon(deferLater(reactor, 0.01))


@schemathesis.serializer("application/x-tar")
def _as_it_is(context: Any, value: Any) -> bytes:
    return str(value).encode("utf-8", "replace")


def explore(url: str) -> list[str]:
    """Ask for everything that the document at ``url`` has; the operations."""
    import requests

    headers = {"Authorization": f"Bearer {ADMIN}"}
    session = requests.Session()
    document = session.get(f"{url}/openapi.json", timeout=30).json()
    schema = schemathesis.openapi.from_dict(document)
    seen = []
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr] # an Err would raise here
        seen.append(operation.label)

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            if case.query:
                # A stream ends only with its client.
                case.query.pop("follow", None)
            response = case.call(base_url=url, headers=headers, session=session, timeout=30)
            case.validate_response(response, checks=CHECKS)

        check()
    return seen


@pytest.mark.usefixtures("both_paths")
@pytest_twisted.ensureDeferred
async def test_every_operation_keeps_its_promises(served: str) -> None:
    seen = await deferToThread(explore, served)
    assert len(seen) > 30
