"""Why a deployment is as it is, told from what is known of it.

Pure: status, events and crashes in, sentences out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from tursi.config import Workers
from tursi.fleet.words import ago, ahead, clause, clock, count, duration, moment, noun, times
from tursi.model import (
    Crash,
    DeploymentStatus,
    Desired,
    Event,
    FailureClass,
    Load,
    Phase,
    Progress,
    Story,
    WorkerStatus,
    mebibytes,
)

MAX_EVENTS = 10
_MAX_REQUESTS = 5
_MAX_REFUSED = 3
_MAX_LISTED = 5
_REFUSED_SECONDS = 3600.0
_HELD_SECONDS = 120.0
_COMING = frozenset({Phase.QUEUED, Phase.LOADING, Phase.WARMING})
_ANEW = frozenset({"create", "replace", "import", "rollback"})
"""Kinds of what makes a generation."""
_FORGIVING = _ANEW | {"restart", "worker.reset"}
"""Kinds of what makes refused requests be let in again."""

_PASSING = {
    f"worker.{phase.value}"
    for phase in Phase
    if phase not in {Phase.READY, Phase.QUARANTINED, Phase.FAILED, Phase.WEDGED}
} | {"resolve"}
"""What lies between the events that matter."""
_WISHES = _ANEW | {"canary", "promote", "start", "stop", "scale", "schedule", "restart"}
"""Kinds of what operators do."""
_MOVES = _ANEW | {"load", "unload", "promote", "start"}
"""Kinds of what brings one into memory, and out of it."""

_DOING: Mapping[Phase, str] = {
    Phase.STOPPED: "stopped",
    Phase.QUEUED: "waiting for its turn to load",
    Phase.SPAWNING: "starting its process",
    Phase.LOADING: "loading the model",
    Phase.WARMING: "running the model for the first time",
    Phase.READY: "ready",
    Phase.SUSPECT: "suspected to hang",
    Phase.DRAINING: "finishing its last requests",
    Phase.STOPPING: "ending",
    Phase.KILLING: "being killed",
    Phase.SETTLING: "giving back its memory",
    Phase.BACKOFF: "waiting before it is started again",
    Phase.QUARANTINED: "in quarantine",
    Phase.FAILED: "down, and not tried again",
    Phase.WEDGED: "stuck: not even SIGKILL ends its process",
}
_FETCHING: Mapping[Phase, str] = {
    Phase.QUEUED: "looking for its files",
    Phase.BACKOFF: "waiting before the hub is asked again for its files",
    Phase.FAILED: "down for want of its files, and not tried again",
}
_STAGES: Mapping[str, str] = {
    # Those that the phase doesn't name already.
    "import": "importing its libraries",
    "read": "reading its weights",
    "measure": "comparing it with the unquantized model",
    "quantize": "quantizing it",
}
_BY_BYTES = ("download", "read")
_ADVICE: Mapping[FailureClass, str] = {
    FailureClass.CONFIGURATION: "Deploy it with other settings, or another model",
    FailureClass.WEIGHTS: "Download the model again, or deploy another revision",
    FailureClass.NOT_FOUND: "Look whether the model's folder has all its files",
    FailureClass.REFUSED: "Deploy a model with safetensors weights and without code of its own",
    FailureClass.ENVIRONMENT: "Look whether the device and its driver are there",
    FailureClass.RESOURCE: "Free memory, or deploy it with a smaller dtype or fewer replicas",
    FailureClass.OUT_OF_MEMORY: (
        "Free memory, allow it more, or deploy it with a smaller dtype or fewer replicas"
    ),
    FailureClass.CRASH: "A library crashed: another version, dtype or device may not",
    FailureClass.GPU_CONTEXT: "If it goes on, look at the GPU with nvidia-smi and the kernel log",
    FailureClass.HUNG: "The stacks in there show where it stood",
    FailureClass.HOST: "Look at the limits on processes and open files",
    FailureClass.PROTOCOL: "Look whether the daemon and its workers are the same version of Tursi",
    FailureClass.EXTERNAL_KILL: "Somebody or something outside Tursi did that",
}


def tell(
    status: DeploymentStatus,
    events: Sequence[Event],
    crashes: Sequence[Crash],
    settings: Workers,
    now: float,
    *,
    suspects: Mapping[str, str] = MappingProxyType({}),
    loading: Sequence[str] = (),
    staying: Sequence[str] = (),
    paused: str | None = None,
) -> Story:
    """``events`` are the last ones in ascending order, ``crashes`` newest first.

    ``suspects`` are the devices that may be failing, each with a sentence on it,
    ``loading`` the deployments that are being loaded, ``staying`` what has the memory that
    it waits for, a clause each, ``paused`` says why nothing is started at all.
    """
    lead = _lead(status)
    troubled = _troubled(status, lead)
    crash = _cause(troubled, crashes)
    sentences = (
        _state(status, lead, events, now),
        *_generations(status, events, now),
        *_moved(status, events, now),
        *_happened(status, troubled, crash, crashes, events, settings, now),
        *_evidence(status, crash),
        *_devices(status, crash, suspects),
        *_refused(events, now),
        *_turn(status, lead, loading, staying, paused),
        *_next(status, lead, settings, now),
        *_others(status, lead, now),
    )
    chain = [event for event in events if event.kind not in _PASSING]
    shown = crash or (crashes[0] if crashes else None)
    return Story(sentences, tuple(chain[-MAX_EVENTS:]), shown.id if shown else None)


def _lead(status: DeploymentStatus) -> WorkerStatus | None:
    """The replica that the deployment looks like."""
    current = [each for each in status.workers if each.generation == status.generation]
    phase = Phase.QUEUED if _is_too_large(status) else status.phase
    alike = [each for each in current if each.phase is phase]
    return min(alike, key=lambda each: (each.since, each.replica), default=None)


def _is_too_large(status: DeploymentStatus) -> bool:
    """Whether it could wait for ever for the memory that it needs."""
    return status.phase is Phase.FAILED and any(
        each.phase is Phase.QUEUED and each.generation == status.generation
        for each in status.workers
    )


def _troubled(status: DeploymentStatus, lead: WorkerStatus | None) -> WorkerStatus | None:
    """The replica whose trouble is to be told: the leading one's own, or else any."""
    if lead is not None and lead.failure is not None:
        return lead
    return next((each for each in status.workers if each.failure is not None), None)


def _cause(troubled: WorkerStatus | None, crashes: Sequence[Crash]) -> Crash | None:
    """The crash that it has not recovered from."""
    if troubled is None:
        return None
    for crash in crashes:
        if (crash.generation, crash.replica) == (troubled.generation, troubled.replica):
            return crash if crash.failure is troubled.failure else None
    return None


# -- what it is -----------------------------------------------------------------------


def _state(
    status: DeploymentStatus, lead: WorkerStatus | None, events: Sequence[Event], now: float
) -> str:
    if _is_asleep(status):
        # Whoever has been unloaded is told of that next.
        return f"{status.name} is not loaded."
    since = lead.since if lead else _last_wish_at(status, events)
    doing = _DOING[status.phase]
    if _is_too_large(status):
        doing = "too large for this machine as it is configured"
    failed = [event.at for event in events if event.kind == "fetch.failed"]
    # Of a generation that could not take over, the workers are gone although it had its files.
    gone = status.phase is Phase.FAILED and status.stable is not None and not failed
    running = status.desired is Desired.RUNNING
    if lead is None and running and status.phase in _FETCHING and not gone:
        doing = _fetching(status)
        if status.phase is not Phase.QUEUED and failed:
            since = max(since, failed[-1])
    told = _progress(status.progress) if status.phase in _COMING else ""
    who = status.name
    if status.ready and status.phase is not Phase.READY and status.stable is not None:
        # What it is about isn't what serves.
        who = f"{who} serves generation {status.stable}; generation {status.generation}"
    sentence = f"{who} is {doing}{told}, since {moment(since, now)}"
    if status.phase is Phase.READY:
        sentence += f": {status.ready} of {count(status.replicas, 'replica')} serving"
        if status.max_replicas is not None:
            sentence += f" (from {status.min_replicas} to {status.max_replicas} as needed)"
        sentence += f", {count(status.in_flight, 'request')} in flight"
    if status.queued:
        sentence += f", {count(status.queued, 'request')} waiting"
    return f"{sentence}."


def _fetching(status: DeploymentStatus) -> str:
    if status.phase is not Phase.QUEUED or not status.progress:
        return _FETCHING[status.phase]
    if status.progress.stage == "download":
        return "fetching its files from the hub"
    return "asking the hub for its files"


def _last_wish_at(status: DeploymentStatus, events: Sequence[Event]) -> float:
    wish = _last_wish(events)
    return wish.at if wish else status.updated_at


def _last_wish(events: Sequence[Event]) -> Event | None:
    return next((event for event in reversed(events) if event.kind in _WISHES), None)


def _is_asleep(status: DeploymentStatus) -> bool:
    """Whether it is out of memory and comes back when that is wanted."""
    return status.phase is Phase.STOPPED and status.desired is Desired.RUNNING


def _progress(progress: Progress | None) -> str:
    if progress is None:
        return ""
    found = []
    if progress.stage in _STAGES:
        found.append(_STAGES[progress.stage])
    if progress.done is not None and progress.total:
        found.append(f"{100 * min(progress.done / progress.total, 1):.0f} %")
        if progress.unit == "bytes" and progress.stage in _BY_BYTES:
            found.append(f"{mebibytes(int(progress.done))} of {mebibytes(int(progress.total))}")
        if progress.part and progress.parts and progress.parts > 1:
            found.append(f"file {progress.part} of {progress.parts}")
    return f" ({', '.join(found)})" if found else ""


# -- its generations ------------------------------------------------------------------


def _generations(status: DeploymentStatus, events: Sequence[Event], now: float) -> Iterator[str]:
    canary = status.canary
    if canary is not None:
        answered = ""
        if canary.requests:
            answered = f", and {canary.errors} of {count(canary.requests, 'request')} failed"
        yield (
            f"Generation {canary.generation} is a canary with {canary.weight} % of the requests; "
            f"it is {_DOING[canary.phase]}{answered}."
        )
        if canary.reason:
            yield canary.reason if canary.reason.endswith(".") else f"{canary.reason}."
        yield (
            f"`tursi promote {status.name}` lets it take over, `tursi rollback {status.name}` "
            "gives it up."
        )
    if status.in_place:
        yield (
            f"There is no room for two generations: the old one makes room for generation "
            f"{status.generation}, and requests wait meanwhile. If it can't be loaded, the old one "
            "is loaded again."
        )
    turns = [event for event in events if event.kind in {"serve", "generation.failed", *_WISHES}]
    if turns and turns[-1].kind == "generation.failed" and canary is None:
        last = turns[-1]
        cause = f": {clause(last.cause)}" if last.cause else ""
        message = clause(last.message)
        yield f"{message[:1].upper()}{message[1:]}, since {moment(last.at, now)}{cause}."
    scaled = [event for event in events if event.kind in {"autoscale", "autoscale.held"}]
    if scaled and scaled[-1].kind == "autoscale.held" and now - scaled[-1].at < _HELD_SECONDS:
        yield f"{clause(scaled[-1].message)}: {clause(scaled[-1].cause or 'no reason is known')}."


# -- how it came into memory, or went ---------------------------------------------------


def _moved(status: DeploymentStatus, events: Sequence[Event], now: float) -> Iterator[str]:
    if status.desired is Desired.STOPPED:
        return
    last = next((event for event in reversed(events) if event.kind in _MOVES), None)
    if _is_asleep(status) and (last is None or last.kind != "unload"):
        yield "Nobody has asked for it since the daemon began."
    elif last is not None and last.kind in {"load", "unload"}:
        done = f"{last.kind}ed" if last.kind == "unload" or status.ready else "asked for"
        yield f"It was {done} {ago(last.at, now)}: {clause(last.cause or last.message)}."


# -- what happened ----------------------------------------------------------------------


def _happened(
    status: DeploymentStatus,
    troubled: WorkerStatus | None,
    crash: Crash | None,
    crashes: Sequence[Crash],
    events: Sequence[Event],
    settings: Workers,
    now: float,
) -> Iterator[str]:
    if crash is not None and troubled is not None:
        yield from _crashed(status, crash, now)
        yield from _again(troubled, crash, crashes, settings, now)
        return
    wish = _last_wish(events)
    if status.phase in {Phase.READY, Phase.STOPPED} or status.desired is Desired.STOPPED:
        if wish is not None:
            yield f"The last order came {ago(wish.at, now)}: {clause(wish.message)}."
        if not crashes:
            yield "None of its workers has ended unasked."
        else:
            last = crashes[0]
            yield (
                f"The last time that a worker ended unasked was {ago(last.at, now)}, while "
                f"{last.phase.value}: {clause(last.reason)} (crash {last.id})."
            )
        return
    if status.reason:
        yield f"The reason: {clause(status.reason)}."
    if wish is not None:
        yield f"It began {ago(wish.at, now)}: {clause(wish.message)}."


def _crashed(status: DeploymentStatus, crash: Crash, now: float) -> Iterator[str]:
    if crash.ready_at is None:
        seconds = crash.at - crash.spawned_at
        after = f"{duration(seconds)} after" if seconds >= 1 else "right after"
        lived = f"{after} its start, before it was ready"
    else:
        seconds = crash.at - crash.ready_at
        lived = f"after {duration(seconds)} in service" if seconds >= 1 else "as soon as it served"
    which = f"The worker of replica {crash.replica}" if status.replicas > 1 else "Its worker"
    # Where the daemon has ended it, it was for this reason.
    ended = "was killed" if crash.intent else "ended"
    if crash.failure is FailureClass.HUNG:
        lived += ", because it hung"
    yield f"{which} {ended} {ago(crash.at, now)}, {lived}: {clause(crash.reason)}."
    if crash.requests:
        shown = ", ".join(crash.requests[:_MAX_REQUESTS])
        more = len(crash.requests) - _MAX_REQUESTS
        also = f" and {more} more" if more > 0 else ""
        yield f"It held {count(len(crash.requests), 'request')} then: {shown}{also}."


def _again(
    troubled: WorkerStatus, crash: Crash, crashes: Sequence[Crash], settings: Workers, now: float
) -> Iterator[str]:
    if troubled.failures > 0:
        quarantine = ""
        if troubled.phase not in {Phase.QUARANTINED, Phase.FAILED}:
            row = " in a row" if troubled.failures == 1 else ""
            quarantine = f"; {settings.max_failures}{row} lead to quarantine"
        which = (
            "its first failure"
            if troubled.failures == 1
            else f"failure {troubled.failures} in a row"
        )
        yield f"That was {which}{quarantine}."
    alike = (crash.generation, crash.replica)
    earlier = [
        each for each in crashes if (each.generation, each.replica) == alike and each.id < crash.id
    ][: max(troubled.failures - 1, 0)]
    if not earlier:
        return
    if len(earlier) == 1 and earlier[0].reason == crash.reason:
        yield f"The one before had the same reason (crash {earlier[0].id})."
    elif all(each.reason == crash.reason for each in earlier):
        numbers = ", ".join(str(each.id) for each in reversed(earlier))
        yield f"Each time the reason was the same ({noun(len(earlier), 'crash')} {numbers})."
    else:
        told = "; ".join(
            f"{ago(each.at, now)} {clause(each.reason)} (crash {each.id})" for each in earlier[:3]
        )
        yield f"Before that: {told}."


# -- evidence and advice -------------------------------------------------------------------


def _evidence(status: DeploymentStatus, crash: Crash | None) -> Iterator[str]:
    if crash is None:
        return
    found = []
    if crash.error and crash.error.rstrip(".") not in crash.reason:
        found.append(f"its traceback ends with {crash.error!r}")
    if crash.peak_rss is not None:
        limit = status.limits.memory
        of = f" of the {mebibytes(limit)} that it may use" if limit else ""
        found.append(f"it used up to {mebibytes(crash.peak_rss)} of memory{of}")
    told = f": {', '.join(found)}" if found else ""
    yield (
        f"Crash {crash.id} has the evidence{told}; `tursi crashes {status.name} {crash.id}` "
        "shows its last lines and more."
    )
    advice = _ADVICE.get(crash.failure)
    if advice is not None:
        yield f"{advice}."


def _devices(
    status: DeploymentStatus, crash: Crash | None, suspects: Mapping[str, str]
) -> Iterator[str]:
    """What is to be said of the device, where that may be the cause."""
    used = {status.device, *(each.device for each in status.workers)}
    lost = crash is not None and crash.failure is FailureClass.GPU_CONTEXT
    for device, sentence in suspects.items():
        if lost or device in used:
            yield sentence


def _refused(events: Sequence[Event], now: float) -> Iterator[str]:
    """Requests that are held to be what workers end of."""
    since = max((event.at for event in events if event.kind in _FORGIVING), default=0.0)
    refused = [
        event
        for event in events
        if event.kind == "request.refused" and event.at >= max(since, now - _REFUSED_SECONDS)
    ]
    for event in refused[-_MAX_REFUSED:]:
        cause = f": {clause(event.cause)}" if event.cause else ""
        message = clause(event.message)
        yield f"{message[:1].upper()}{message[1:]} since {moment(event.at, now)}{cause}."


def _turn(
    status: DeploymentStatus,
    lead: WorkerStatus | None,
    loading: Sequence[str],
    staying: Sequence[str],
    paused: str | None,
) -> Iterator[str]:
    """What it waits for, where that lies with others."""
    if lead is None or status.phase is not Phase.QUEUED:
        return
    others = [name for name in loading if name != status.name]
    if status.reason:
        if staying:
            yield f"What has the memory stays: {_listed(staying)}."
    elif paused is not None:
        yield paused
    elif others:
        yield f"It waits for what is being loaded just now: {_listed(others)}."


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LISTED
    also = f" and {more} more" if more > 0 else ""
    return f"{', '.join(names[:_MAX_LISTED])}{also}"


# -- what comes next -----------------------------------------------------------------------


def _next(
    status: DeploymentStatus, lead: WorkerStatus | None, settings: Workers, now: float
) -> Iterator[str]:
    again = "deploying it again with `tursi up`"
    at = status.next_try_at
    when = f"at {clock(at, now)}, {ahead(at, now)}" if at is not None else "soon"
    match status.phase:
        case Phase.BACKOFF:
            yield f"The next try is {when}; {again} doesn't wait for that."
        case Phase.QUARANTINED:
            yield (
                f"A single try follows {when}. If that one serves for "
                f"{duration(settings.good_seconds)} all is forgotten, if it fails the quarantine "
                f"goes on, and after three such failures it is given up. {again.capitalize()} "
                "forgets the failures and tries at once."
            )
        case Phase.FAILED if _is_too_large(status):
            yield "It is loaded as soon as models may take enough memory (memory.limit_bytes)."
        case Phase.FAILED:
            yield f"Nothing is tried by itself any more; {again} does."
        case Phase.LOADING if lead is not None:
            stall = duration(settings.load_stall_seconds)
            yield f"If nothing moves for {stall}, it is ended and tried again."
        case Phase.SUSPECT:
            yield (
                "It gets nothing new meanwhile. If it gives signs of life again all is well, "
                "if not it is killed within seconds, with its stacks taken, and started again."
            )
        case Phase.STOPPED:
            yield _wakes(status)
        case Phase.WEDGED:
            yield "Another attempt to kill it is made every 30 s; only the kernel can let it go."
        case Phase.READY if lead is not None and lead.failures:
            good_at = lead.since + settings.good_seconds
            yield (
                f"It has failed {times(lead.failures)} in a row before; that is forgotten at "
                f"{clock(good_at, now)}, {ahead(good_at, now)}, if nothing happens until then."
            )
        case _:
            pass


def _wakes(status: DeploymentStatus) -> str:
    """What brings one back that rests."""
    if status.desired is Desired.STOPPED:
        return "It stays so until somebody starts it, such as by deploying it again."
    if status.load is Load.ON_DEMAND:
        return "The next request for it loads it."
    return f"`tursi load {status.name}` loads it."


def _others(status: DeploymentStatus, lead: WorkerStatus | None, now: float) -> Iterator[str]:
    others = [
        each
        for each in status.workers
        if each is not lead and not (status.phase is Phase.READY and each.phase is Phase.READY)
    ]
    for each in others:
        who = f"Replica {each.replica}"
        if each.generation is not None and each.generation != status.generation:
            who += f" of generation {each.generation}"
        sentence = (
            f"{who} is {_DOING[each.phase]}{_progress(each.progress)}, "
            f"since {moment(each.since, now)}"
        )
        if each.reason and each.phase is not Phase.READY:
            sentence += f": {clause(each.reason)}"
        if each.next_try_at is not None:
            sentence += (
                f"; its next try is at {clock(each.next_try_at, now)}, "
                f"{ahead(each.next_try_at, now)}"
            )
        yield f"{sentence}."
