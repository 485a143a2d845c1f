"""What a face is made of: routes, and calls that encode one answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote

import msgspec

from tursi import duration, errors
from tursi.errors import InvalidRequest, TaskNotSupported, TursiError
from tursi.model import MAX_KEEP_ALIVE, Task, Usage
from tursi.tasks import Delta, TaskRequest, TaskResult

T = TypeVar("T")

STATUS: Mapping[str, int] = {
    errors.InvalidRequest.code: 400,
    errors.ContextLengthExceeded.code: 400,
    errors.TaskNotSupported.code: 400,
    errors.KeyRequired.code: 401,
    errors.KeyRefused.code: 401,
    errors.HostRefused.code: 403,
    errors.OriginRefused.code: 403,
    errors.RoleNotOffered.code: 403,
    errors.ScopeMissing.code: 403,
    errors.DeploymentForbidden.code: 403,
    errors.PeerRefused.code: 403,
    errors.RouteNotFound.code: 404,
    errors.ModelNotFound.code: 404,
    errors.DeploymentNotFound.code: 404,
    errors.CrashNotFound.code: 404,
    errors.GenerationNotFound.code: 404,
    errors.NoCanary.code: 409,
    errors.PullNotFound.code: 404,
    errors.CatalogueEntryNotFound.code: 404,
    errors.ModelInUse.code: 409,
    errors.FilesUnavailable.code: 409,
    errors.ArchiveInvalid.code: 400,
    errors.ArchiveNewer.code: 400,
    errors.ArchiveRefused.code: 409,
    errors.KeyNotFound.code: 404,
    errors.AddressInUse.code: 409,
    errors.MethodNotAllowed.code: 405,
    errors.RequestTimeout.code: 408,
    errors.KeyExists.code: 409,
    errors.PayloadTooLarge.code: 413,
    errors.UnsupportedMediaType.code: 415,
    errors.ConfigurationError.code: 422,
    errors.PoisonRequest.code: 422,
    errors.QueueFull.code: 429,
    errors.RateLimited.code: 429,
    errors.RequestCancelled.code: 499,
    errors.WorkerLost.code: 502,
    errors.ModelLoading.code: 503,
    errors.DeploymentUnavailable.code: 503,
    errors.StartingUp.code: 503,
    errors.ShuttingDown.code: 503,
    errors.DatabaseBusy.code: 503,
    errors.DeadlineExceeded.code: 504,
    errors.DatabaseFull.code: 507,
    errors.DiskFull.code: 507,
}
"""HTTP status by error code, for the daemon and the worker alike; 500 for what isn't here."""


def status_of(error: TursiError) -> int:
    """The HTTP status of ``error``."""
    return STATUS.get(error.code, 500)


@dataclass(frozen=True, slots=True)
class Context:
    """What a codec may know besides the body."""

    deployment: str
    task: Task
    request_id: str
    created: int
    """UTC epoch seconds to put into the answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] | None = None


class Call(Protocol):
    """One decoded request: what to compute, and how to encode what comes of it."""

    @property
    def request(self) -> TaskRequest:
        """What the engine is to do."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the answer is a stream of events rather than one body."""
        ...

    def whole(self, result: TaskResult) -> Answer:
        """The complete answer (``stream`` is false)."""
        ...

    def opening(self) -> bytes:
        """The first bytes of a stream, before any token; may be empty."""
        ...

    def delta(self, delta: Delta) -> bytes:
        """The bytes for one delta; may be empty."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """The last bytes of a stream that ended well."""
        ...

    def failure(self, error: TursiError) -> bytes:
        """The last bytes of a stream that failed after it began."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A call whose answer is always one body."""

    request: TaskRequest
    encode: Callable[[Any], Answer]
    """Shapes the task's result."""

    @property
    def stream(self) -> bool:
        """Never a stream."""
        return False

    def whole(self, result: TaskResult) -> Answer:
        """The complete answer."""
        return self.encode(result)

    def opening(self) -> bytes:
        """Nothing: there is no stream."""
        return b""

    def delta(self, delta: Delta) -> bytes:  # noqa: ARG002 - the protocol's signature
        """Nothing: there is no stream."""
        return b""

    def closing(self, usage: Usage) -> bytes:  # noqa: ARG002 - the protocol's signature
        """Nothing: there is no stream."""
        return b""

    def failure(self, error: TursiError) -> bytes:  # noqa: ARG002 - the protocol's signature
        """Nothing: there is no stream."""
        return b""


class Codec(Protocol):
    """Decodes one route's bodies. Raises ``TursiError`` with the sentence for the client."""

    def __call__(self, body: bytes, content_type: str, context: Context) -> Call:
        """Decode ``body``, or raise the error to answer with."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """One path that a client may POST to."""

    name: str
    """Stable, also on the wire to the worker: ``openai.embeddings``."""
    path: str
    """``{name}`` stands for a deployment's name."""
    model: Literal["body", "path"]
    """Where the model's name is."""
    tasks: frozenset[Task]
    decode: Codec
    error: Callable[[TursiError], Answer]
    """Shapes an error before any byte of an answer has left."""
    failure: Callable[[TursiError], bytes]
    """Shapes an error as the last bytes of a stream that has begun."""
    summary: str
    body: tuple[Any, ...]
    """Types (msgspec) of which a request body has one, for the OpenAPI document."""
    reply: tuple[Any, ...]
    """Types of which a whole answer has one, for the OpenAPI document."""


class Match(NamedTuple):
    """A route found for a path, with the model's name if the path has it."""

    route: Route
    model: str | None


class Table:
    """Finds routes by path."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._by_path = {route.path: route for route in routes if route.model == "body"}
        self._by_name = {route.name: route for route in routes}
        # Longest first: /models/a/v1/chat/completions is not the model
        # "a/v1/chat/completions".
        self._patterns = [
            (_pattern(route.path), route)
            for route in sorted(routes, key=lambda route: -len(route.path))
            if route.model == "path"
        ]

    def __iter__(self) -> Iterator[Route]:
        """Every route."""
        return iter(self._by_name.values())

    def find(self, path: str) -> Match | None:
        """The route of a request path (still percent-encoded), or ``None``."""
        found = self._by_path.get(path)
        if found is not None:
            return Match(found, None)
        for pattern, candidate in self._patterns:
            matched = pattern.fullmatch(path)
            if matched:
                return Match(candidate, unquote(matched[1]))
        return None

    def named(self, name: str) -> Route | None:
        """The route that the wire calls ``name``."""
        return self._by_name.get(name)


def _pattern(path: str) -> re.Pattern[str]:
    before, _, after = path.partition("{name}")
    # A hub name may be written with its slash or with %2F.
    return re.compile(re.escape(before) + "([^/]+(?:/[^/]+)?)" + re.escape(after))


class Kept(msgspec.Struct):
    """What every body may have besides: for how long an on-demand model stays loaded after it.

    Seconds, or a duration such as "10m"; 0: unload it as soon as nobody uses it, negative:
    keep it for ever.
    """

    keep_alive: float | str | None = None


class _Model(Kept):
    model: str | msgspec.UnsetType | None = msgspec.UNSET


_ROUTES_FOR: Mapping[Task, str] = {
    Task.FEATURE_EXTRACTION: "/v1/embeddings or /models/{name}",
    Task.TEXT_GENERATION: "/v1/chat/completions, /v1/completions or /models/{name}",
}


def require_task(context: Context, tasks: frozenset[Task]) -> None:
    """``TaskNotSupported``, naming the right route, unless the model does one of ``tasks``."""
    if context.task not in tasks:
        paths = _ROUTES_FOR.get(context.task, "/models/{name}")
        raise TaskNotSupported(
            f"The model {context.deployment!r} does {context.task.value}, which this route "
            f"doesn't offer; use {paths.replace('{name}', context.deployment)}.",
            param="model",
        )


_KEPT_DECODER = msgspec.json.Decoder(Kept)
_MODEL_DECODER = msgspec.json.Decoder(_Model)


def addressed(body: bytes, model: str | None = None) -> tuple[str, float | None]:
    """The model that a JSON body is for, and for how many seconds that is to stay loaded then.

    ``model`` is its name where the path has it. Of the body nothing else is looked at:
    the rest is for the worker to judge.
    """
    if model is not None:
        # Few say it, and to look for the word takes less than to decode.
        if body.find(b'"keep_alive"') < 0:
            return model, None
        kept = _read(_KEPT_DECODER, body).keep_alive
        return model, None if kept is None else _seconds(kept)
    found = _read(_MODEL_DECODER, body)
    if not isinstance(found.model, str) or not found.model:
        raise InvalidRequest("The body must name a model in its field 'model'.", param="model")
    return found.model, None if found.keep_alive is None else _seconds(found.keep_alive)


def _seconds(kept: float | str) -> float:
    """What ``keep_alive`` says; negative means for ever."""
    try:
        seconds = kept if isinstance(kept, float) else duration.parse(kept)
    except ValueError as error:
        raise InvalidRequest(
            f"The field 'keep_alive' can't be used: {error}; give seconds, a text such as \"10m\""
            ' or "1h30m", or -1 for ever.',
            param="keep_alive",
        ) from None
    return min(seconds, float(MAX_KEEP_ALIVE))


_TOO_DEEP = "The body is nested too deeply."


def decoded(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """``body`` decoded, or ``InvalidRequest`` with one sentence that names the place."""
    found = _read(decoder, body)
    # msgspec takes the last of fields that have one name, where others take the first. As
    # floats, integers may have any number of digits.
    try:
        json.loads(body, object_pairs_hook=_once, parse_int=float)
    except RecursionError:
        raise InvalidRequest(_TOO_DEEP) from None
    return found


def _read(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The same without a look at what ``decoder`` skips, which is quick for any size."""
    if not body:
        raise InvalidRequest("The body is empty; send a JSON object.")
    try:
        # msgspec doesn't look at the UTF-8 of fields it skips.
        body.decode("utf-8")
        return decoder.decode(body)
    except UnicodeDecodeError:
        raise InvalidRequest("The body isn't valid UTF-8.") from None
    except RecursionError:
        raise InvalidRequest(_TOO_DEEP) from None
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except msgspec.DecodeError as error:
        if _HALF_A_PAIR.search(body):
            raise InvalidRequest(
                "A string in the body has half of a surrogate pair, such as \\ud800 alone."
            ) from None
        reason = str(error).removeprefix("JSON is malformed: ")
        raise InvalidRequest(f"The body isn't valid JSON: {reason}.") from None


def _once(pairs: list[tuple[str, object]]) -> None:
    """Refuse an object that has a field more than once."""
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        repeated = next(name for name in names if sum(name == each for each, _ in pairs) > 1)
        raise InvalidRequest(f"The body has the field {repeated[:200]!r} more than once.")


_HALF_A_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
_PLACE = re.compile(r"`\$([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")


def _invalid(text: str) -> InvalidRequest:
    sentence, _, place = text.partition(" - at ")
    found = _PLACE.search(place)
    path = found[1].lstrip(".") if found else ""
    missing = _MISSING.fullmatch(sentence)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequest(f"The body lacks the field '{path}'.", param=path)
    sentence = sentence[:1].lower() + sentence[1:300]
    if not path:
        return InvalidRequest(f"The body can't be used: {sentence}.")
    return InvalidRequest(f"The field '{path}' can't be used: {sentence}.", param=path)
