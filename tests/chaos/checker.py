"""What a chaos run has seen, and whether that is what Tursi promises (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Role(Enum):
    """What a deployment is there for."""

    CALM = "never hit"
    HIT = "hit"
    CHURN = "changed all the time"
    LAZY = "loaded on demand"
    TURNED = "rolled out and back"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a client; times are monotonic seconds."""

    deployment: str
    began: float
    ended: float
    status: int
    """Of the answer; 0 where there was none."""
    note: str = ""
    """The error's code, or what went wrong."""
    right: bool = True
    """Whether an answer of 200 was the one to this very request, and whole."""
    stream: bool = False
    """Whether it came in pieces: what has begun can't be sent again."""
    again: bool = False
    """Whether a refusal said when to ask again."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was done to the daemon or to a worker."""

    kind: str
    deployment: str
    """Empty where the daemon itself was hit."""
    at: float
    until: float
    """From then on it can do no more harm."""
    deadly: bool = True
    """Whether a worker ends by it."""


class Window(NamedTuple):
    """When the daemon was dead, from the kill until it knew its deployments again."""

    begin: float
    end: float

    def meets(self, ask: Ask) -> bool:
        """Whether the request was under way at that time."""
        return ask.began <= self.end and ask.ended >= self.begin


class Wanted(NamedTuple):
    """A deployment as somebody wants it; ``None`` stands for one that isn't there."""

    model: str
    replicas: int
    running: bool


class Outcome(Enum):
    """What became of a change."""

    ACKNOWLEDGED = "acknowledged"
    NOT_FOUND = "not found"
    UNKNOWN = "unknown"
    """The daemon died meanwhile: it was made, or it was not."""


@dataclass(frozen=True, slots=True)
class Change:
    """One operation on a deployment; those of one deployment follow each other."""

    deployment: str
    action: str
    """put, rollback, scale, stop, start or delete; ``read`` changes nothing."""
    outcome: Outcome
    model: str = ""
    replicas: int = 0
    seen: Wanted | None = None
    """What ``read`` has seen."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One operation on a pull; those of one pull follow each other."""

    pull: int
    action: str
    """start, pause, resume or cancel; ``read`` changes nothing."""
    outcome: Outcome
    state: str = ""
    """What the answer said of it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a daemon used at one time."""

    daemon: int
    """Which of the daemons that followed each other."""
    at: float
    descriptors: int
    rss: int


@dataclass(slots=True)
class History:
    """Everything that was seen."""

    roles: dict[str, Role]
    replicas: dict[str, int]
    asks: list[Ask] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    """Those that were seen at once, such as a process that nobody owns."""


def apply(state: Wanted | None, change: Change) -> tuple[Wanted | None, Outcome]:
    """What ``change`` makes of ``state`` when it is carried out, and what is answered."""
    if change.action == "put":
        return Wanted(change.model, change.replicas, running=True), Outcome.ACKNOWLEDGED
    if state is None:
        return None, Outcome.NOT_FOUND
    # To be what it is already changes nothing, else it runs.
    back = state._replace(model=change.model, running=True)
    made: dict[str, Wanted | None] = {
        "scale": state._replace(replicas=change.replicas),
        "rollback": back if change.model != state.model else state,
        "stop": state._replace(running=False),
        "start": state._replace(running=True),
        "delete": None,
    }
    return made[change.action], Outcome.ACKNOWLEDGED


def lost_changes(changes: Iterable[Change]) -> list[str]:
    """What can't be explained by any order in which unknown changes were made or not."""
    possible: dict[str, set[Wanted | None]] = {}
    found = []
    for change in changes:
        before = possible.get(change.deployment, {None})
        after: set[Wanted | None] = set()
        for state in before:
            if change.action == "read":
                if change.seen == state:
                    after.add(state)
                continue
            made, answer = apply(state, change)
            if change.outcome is Outcome.UNKNOWN:
                after |= {state, made}
            elif change.outcome is answer:
                after.add(made)
        if not after:
            what = change.seen if change.action == "read" else change.outcome.value
            expected = " or ".join(sorted(map(str, before)))
            found.append(
                f"{change.deployment}: {change.action} found {what}, where {expected} was expected"
            )
            after = {change.seen} if change.action == "read" else before
        possible[change.deployment] = after
    return found


_TURNS = {
    ("pause", "running"): "paused",
    ("resume", "paused"): "running",
    ("cancel", "running"): "cancelled",
    ("cancel", "paused"): "cancelled",
}


def lost_turns(turns: Iterable[Turn]) -> list[str]:
    """What pulls are said to be that they can't be after what was acknowledged."""
    possible: dict[int, set[str]] = {}
    found = []
    for turn in turns:
        before = {"running"} if turn.action == "start" else possible.get(turn.pull, set())
        # A download ends by itself.
        before = before | ({"done"} if "running" in before else set())
        after = {_TURNS.get((turn.action, state), state) for state in before}
        if turn.outcome is Outcome.UNKNOWN:
            possible[turn.pull] = before | after
            continue
        after |= {"done"} if "running" in after else set()
        if turn.state not in after:
            expected = " or ".join(sorted(after))
            found.append(
                f"pull {turn.pull}: {turn.action} found {turn.state}, where {expected} was expected"
            )
        possible[turn.pull] = {turn.state}
    return found


class Judgement(Enum):
    """What a request's fate means."""

    ANSWERED = "answered"
    EXCUSED = "excused"
    """The daemon was dead, or both tries met a death."""
    LOST = "lost"


def judge(ask: Ask, role: Role, faults: Sequence[Fault], windows: Sequence[Window]) -> Judgement:
    """Whether the client got what it may expect; ``faults`` are those of its deployment."""
    if ask.status == 200 and ask.right:
        return Judgement.ANSWERED
    if ask.status == 200 and not (ask.stream and ask.note):
        return Judgement.LOST
    if any(window.meets(ask) for window in windows):
        return Judgement.EXCUSED
    if role is Role.LAZY and ask.status in {429, 503} and ask.again:
        # There was no room for it in time, and it may ask again.
        return Judgement.EXCUSED
    if role is Role.CHURN:
        # Who stops, changes or removes a deployment means it: only a defect is none.
        told = ask.status in {404, 429, 502, 503} and ask.note != "internal_error"
        return Judgement.EXCUSED if told else Judgement.LOST
    deaths = sum(
        fault.deadly and fault.at <= ask.ended and fault.until >= ask.began for fault in faults
    )
    # A request is sent once more after the first death, unless the answer has begun.
    needed = 1 if ask.stream else 2
    if role in {Role.HIT, Role.LAZY} and deaths >= needed and ask.status == 502:
        return Judgement.EXCUSED
    return Judgement.LOST


class Slope(NamedTuple):
    """A straight line through samples."""

    per_minute: float
    seconds: float


def slope(points: Sequence[tuple[float, float]]) -> Slope:
    """By least squares; of (seconds, value)."""
    if len(points) < 2:
        return Slope(0.0, 0.0)
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return Slope(60 * rise / spread if spread else 0.0, points[-1][0] - points[0][0])


def floor(points: Sequence[tuple[float, float]], parts: int = 6) -> list[tuple[float, float]]:
    """The least in each part of the time: what comes and goes is no growth."""
    if not points:
        return []
    began, seconds = points[0][0], points[-1][0] - points[0][0]
    least: dict[int, tuple[float, float]] = {}
    for at, value in points:
        part = min(int(parts * (at - began) / seconds), parts - 1) if seconds else 0
        if part not in least or value < least[part][1]:
            least[part] = at, value
    return [least[part] for part in sorted(least)]


WARM_SECONDS = 10.0
"""What a new daemon uses in its first seconds tells nothing."""
MEASURED_SECONDS = 60.0
"""A shorter time shows which workers were just away, and nothing else."""
MAX_DESCRIPTORS_PER_MINUTE = 10.0
MAX_RSS_PER_MINUTE = 15 * 2**20


def flat(samples: Sequence[Sample]) -> tuple[Slope, Slope, list[str]]:
    """How descriptors and RSS of the longest-lived daemon moved, and what is wrong with that."""
    by_daemon: dict[int, list[Sample]] = {}
    for sample in samples:
        by_daemon.setdefault(sample.daemon, []).append(sample)
    longest = max(by_daemon.values(), key=lambda each: each[-1].at - each[0].at, default=[])
    warm = [each for each in longest if each.at - longest[0].at >= WARM_SECONDS]
    descriptors = slope(floor([(each.at, each.descriptors) for each in warm]))
    rss = slope(floor([(each.at, each.rss) for each in warm]))
    found = []
    if warm and warm[-1].at - warm[0].at >= MEASURED_SECONDS:
        if descriptors.per_minute > MAX_DESCRIPTORS_PER_MINUTE:
            found.append(f"descriptors grow by {descriptors.per_minute:.1f} a minute")
        if rss.per_minute > MAX_RSS_PER_MINUTE:
            found.append(f"RSS grows by {rss.per_minute / 2**20:.1f} MiB a minute")
    return descriptors, rss, found


def near(ask: Ask, history: History) -> str:
    """The faults that may have to do with the fate of a request."""
    found = [
        f"{fault.kind} at {fault.at - ask.began:+.2f} s"
        for fault in history.faults
        if fault.deployment in {ask.deployment, ""}
        and fault.at <= ask.ended
        and fault.until >= ask.began
    ]
    return ", ".join(found) or "no fault near"


def slowest(history: History, count: int = 3) -> list[str]:
    """The answers that took longest, and what happened meanwhile."""
    answered = [
        ask
        for ask, fate in judged(history)
        if fate is Judgement.ANSWERED and history.roles[ask.deployment] is not Role.CHURN
    ]
    answered.sort(key=lambda ask: ask.began - ask.ended)
    return [
        f"slow: {ask.deployment} took {ask.ended - ask.began:.2f} s [{near(ask, history)}]"
        for ask in answered[:count]
    ]


def violations(history: History) -> list[str]:
    """Every promise that was broken."""
    found = list(history.violations)
    for ask, judgement in judged(history):
        if judgement is Judgement.LOST:
            what = ask.note if ask.right else "another request's answer"
            found.append(
                f"{ask.deployment} ({history.roles[ask.deployment].value}): a request of"
                f" {ask.ended - ask.began:.2f} s got {ask.status} {what}"
                f" [{near(ask, history)}]"
            )
    found += lost_changes(history.changes) + lost_turns(history.turns)
    return found + flat(history.samples)[2]


def judged(history: History) -> list[tuple[Ask, Judgement]]:
    """Each request with what its fate means."""
    by_deployment = {
        name: [fault for fault in history.faults if fault.deployment == name]
        for name in history.roles
    }
    return [
        (
            ask,
            judge(
                ask, history.roles[ask.deployment], by_deployment[ask.deployment], history.windows
            ),
        )
        for ask in history.asks
    ]


def table(history: History) -> list[str]:
    """The figures, for people."""
    lines = [f"{'deployment':<12}{'replicas':>9}{'asked':>9}{'answered':>10}{'excused':>9}"]
    lines[0] += f"{'lost':>6}{'p50 ms':>9}{'p99 ms':>9}  role"
    fates = judged(history)
    for name, role in history.roles.items():
        mine = [(ask, fate) for ask, fate in fates if ask.deployment == name]
        counts = [sum(fate is one for _, fate in mine) for one in Judgement]
        times = sorted(
            1000 * (ask.ended - ask.began) for ask, fate in mine if fate is Judgement.ANSWERED
        )
        lines.append(
            f"{name:<12}{history.replicas.get(name, 0) or '-':>9}{len(mine):>9}{counts[0]:>10}"
            f"{counts[1]:>9}{counts[2]:>6}{_quantile(times, 0.5):>9.1f}"
            f"{_quantile(times, 0.99):>9.1f}  {role.value}"
        )
    kinds = sorted({fault.kind for fault in history.faults})
    lines.append("")
    lines.append(
        "faults: "
        + (", ".join(f"{_count(history.faults, kind)} x {kind}" for kind in kinds) or "none")
    )
    outcomes = ", ".join(
        f"{sum(change.outcome is one for change in history.changes if change.action != 'read')}"
        f" {one.value}"
        for one in Outcome
    )
    reads = sum(change.action == "read" for change in history.changes)
    lost = len(lost_changes(history.changes))
    lines.append(f"changes: {outcomes}; {reads} reads; {lost} lost")
    outcomes = ", ".join(
        f"{sum(turn.action == action for turn in history.turns)} x {action}"
        for action in ("start", "pause", "resume", "cancel", "read")
    )
    pulls = len({turn.pull for turn in history.turns})
    lines.append(f"{pulls} pulls: {outcomes}; {len(lost_turns(history.turns))} lost")
    dead = sum(window.end - window.begin for window in history.windows)
    lines.append(f"daemon dead: {len(history.windows)} times, {dead:.1f} s in all")
    descriptors, rss, _ = flat(history.samples)
    lines.append(
        f"slopes over {descriptors.seconds:.0f} s: descriptors {descriptors.per_minute:+.1f} a"
        f" minute, RSS {rss.per_minute / 2**20:+.2f} MiB a minute"
    )
    return lines


def _count(faults: Sequence[Fault], kind: str) -> int:
    return sum(fault.kind == kind for fault in faults)


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)] if ordered else 0.0
