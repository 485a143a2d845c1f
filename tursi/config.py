"""The configuration: one TOML file, read once into one frozen value.

Defaults exist here and nowhere else; ``etc/tursi.toml`` shows them all, and a
test compares the two.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tursi.errors import ConfigurationError
from tursi.model import DEFAULT_PORT, MAX_KEEP_ALIVE, Role

# The upper bounds refuse "inf" and slips: every wait ends, every queue is bounded.
Positive = Annotated[float, msgspec.Meta(gt=0, le=366 * 86400)]
"""Seconds, a year at most."""
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Size = Annotated[int, msgspec.Meta(ge=1024, le=1024**4)]
"""Bytes."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file; an unknown key in it is an error."""


class Listener(_Table, frozen=True):
    """Where to listen (a Twisted endpoint string) and what to answer there."""

    endpoint: str
    roles: tuple[Role, ...]
    behind_proxy: bool = False
    """Whether all its clients come by a proxy, which adds TLS and ``X-Forwarded-For``."""


class Http(_Table, frozen=True):
    """The HTTP front."""

    listeners: tuple[Listener, ...] = (
        Listener(
            endpoint=f"tcp:{DEFAULT_PORT}:interface=127.0.0.1:backlog=1024",
            roles=(Role.INFERENCE, Role.HEALTH, Role.METRICS),
        ),
    )
    """Besides the Unix socket in the runtime folder, which has every role."""
    hosts: tuple[str, ...] = ()
    """Names to answer for besides localhost, 127.0.0.1 and [::1]."""
    origins: tuple[str, ...] = ()
    """Origins whose web pages may ask, such as ``https://chat.example.org``."""
    require_keys: bool = False
    """Whether inference on the loopback interface needs a key, as everywhere else."""
    control_group: str = ""
    """Members of this group may use the control socket, as root and the daemon's user may."""
    max_control_body: Size = 1024 * 1024
    max_inference_body: Size = 16 * 1024 * 1024
    header_seconds: Positive = 10.0
    body_seconds: Positive = 30.0
    idle_seconds: Positive = 60.0
    max_connections: Count = 1024
    max_connections_per_peer: Count = 256
    hot_path: bool = True
    """Whether plain inference requests go past ``twisted.web``."""


class Requests(_Table, frozen=True):
    """Admission of inference requests."""

    deadline_seconds: Positive = 600.0
    load_wait_seconds: Positive = 60.0
    """How long a request waits for a model that is loading."""
    scale_wait_seconds: Positive = 0.5
    """Requests that wait longer get one replica more, where there is a range of them."""
    max_queued: Count = 512
    """Requests that may wait per deployment."""
    max_in_flight: Count = 256
    """Requests that one worker holds at a time."""
    max_worker_bytes: Size = 64 * 1024 * 1024
    """Bytes of request bodies that one worker holds at a time."""
    max_stream_buffer: Size = 64 * 1024
    """Bytes that wait for one slow reader before its stream is cut."""


class Workers(_Table, frozen=True):
    """Supervision of the inference processes; all durations in seconds."""

    spawn_seconds: Positive = 15.0
    load_stall_seconds: Positive = 300.0
    load_seconds: Positive = 3600.0
    warm_seconds: Positive = 120.0
    drain_seconds: Positive = 30.0
    stop_seconds: Positive = 10.0
    kill_seconds: Positive = 5.0
    settle_seconds: Positive = 5.0
    good_seconds: Positive = 600.0
    """Time READY after which earlier failures are forgotten."""
    backoff_initial: Positive = 1.0
    backoff_max: Positive = 300.0
    backoff_jitter: Annotated[float, msgspec.Meta(ge=0, le=0.9)] = 0.2
    max_failures: Count = 5
    """Consecutive failures without a good period that end in quarantine."""
    quarantine_seconds: Positive = 900.0
    beat_seconds: Positive = 5.0
    """Without heartbeat for that long a worker gets nothing new,"""
    beat_misses: Count = 3
    """and for that many times as long it is hung."""
    first_seconds: Positive = 120.0
    """An operation that gives a first result: a batch, a piece of a prompt."""
    step_seconds: Positive = 30.0
    """One token more of everything that is being generated."""
    ping_seconds: Positive = 10.0
    ping_timeout: Positive = 5.0
    ping_misses: Count = 3
    threads: Count = 1
    """Compute threads of each worker."""
    max_batch_tokens: Count = 1024
    max_sequences: Count = 16
    """Sequences that one worker generates at a time."""
    log_bytes: Size = 8 * 1024 * 1024
    """Size of one worker life's log, half of it in each of two files."""
    log_bytes_per_second: Size = 1024 * 1024
    log_format: Literal["text", "json"] = "text"
    """Of each line in the log of a worker life."""
    log_lives: Count = 20
    """Logs of earlier lives that are kept per deployment."""


class Memory(_Table, frozen=True):
    """What models may take of this machine's memory."""

    limit_bytes: Annotated[int, msgspec.Meta(ge=0, le=1024**5)] = 0
    """For all workers together; 0 means what the machine has."""
    reserve_bytes: Annotated[int, msgspec.Meta(ge=0, le=1024**5)] = 512 * 1024 * 1024
    """Of what is free, on the host and on each GPU, so much stays so."""
    keep_alive_seconds: Annotated[float, msgspec.Meta(ge=-1, le=MAX_KEEP_ALIVE)] = 300.0
    """How long a model that is loaded on demand stays without a request; -1: for ever."""
    max_wait_seconds: Positive = 30.0
    """Requests that have waited so long for a model's turn go before all others."""
    min_residency_seconds: Positive = 10.0
    """So long a model stays at least before it makes room for another."""


class Hub(_Table, frozen=True):
    """Where models are downloaded from."""

    endpoint: str = "https://huggingface.co"
    token_file: str = ""
    """A file with the hub token; empty means what huggingface_hub would use."""
    offline: bool = False
    stall_seconds: Positive = 120.0
    cache_bytes: Annotated[int, msgspec.Meta(ge=0, le=1024**5)] = 0
    """What downloaded models may take on the disk; 0 means as much as there is."""


class Storage(_Table, frozen=True):
    """The database."""

    statistics_minutes: Count = 24 * 60
    """So many minutes the statistics by minute go back,"""
    statistics_hours: Count = 31 * 24
    """so many hours those by hour,"""
    statistics_days: Count = 2 * 366
    """and so many days those by day."""
    event_count: Count = 100_000
    worker_lives: Count = 10_000
    crashes: Count = 50
    """Crashes that are kept per deployment, with their evidence."""
    audit_count: Annotated[int, msgspec.Meta(ge=1000, le=1_000_000_000)] = 100_000


class Hook(_Table, frozen=True):
    """A program or a URL to call when something happens."""

    on: tuple[str, ...]
    """Kinds of events; ``*`` and ``?`` stand for what they do in file names."""
    command: tuple[str, ...] = ()
    """A program and its arguments; no shell."""
    url: str = ""
    seconds: Positive = 10.0
    """How long it may take."""

    def __post_init__(self) -> None:
        """Exactly one of the two, and of a kind that can be called."""
        if bool(self.command) == bool(self.url):
            raise ValueError("a hook has either a command or a url")
        if not self.on:
            raise ValueError("a hook needs the events to call it on")
        if self.command and not self.command[0].startswith("/"):
            raise ValueError("a hook's command begins with an absolute path")
        if self.url and not re.fullmatch(r"https?://[!-~]+", self.url):
            raise ValueError("a hook's url begins with http:// or https://")


Hooks = Annotated[tuple[Hook, ...], msgspec.Meta(max_length=16)]


class Log(_Table, frozen=True):
    """The daemon's own log."""

    level: Literal["debug", "info", "warn", "error"] = "info"
    format: Literal["text", "json"] = "text"
    max_bytes: Size = 16 * 1024 * 1024
    """Of the file, before another is begun."""
    old_files: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 5
    """Files that are kept besides it."""


class Configuration(_Table, frozen=True):
    """Everything that can be set in the file."""

    http: Http = Http()
    requests: Requests = Requests()
    workers: Workers = Workers()
    memory: Memory = Memory()
    hub: Hub = Hub()
    storage: Storage = Storage()
    log: Log = Log()
    hooks: Hooks = ()


def changes(old: Configuration, new: Configuration) -> list[str]:
    """The settings that differ, as they are called in the file."""
    found: list[str] = []
    for name in old.__struct_fields__:
        before, after = getattr(old, name), getattr(new, name)
        if not isinstance(before, _Table) or not isinstance(after, _Table):
            found += [name] if before != after else []
            continue
        found += [
            f"{name}.{each}"
            for each in before.__struct_fields__
            if getattr(before, each) != getattr(after, each)
        ]
    return found


def parse(text: str, source: str) -> Configuration:
    """Read the TOML ``text``; ``ConfigurationError`` names ``source`` and the key's path."""
    try:
        return msgspec.convert(tomllib.loads(text), Configuration)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{source} isn't valid TOML: {error}.") from None
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{source}: {error}") from None


def load(path: Path | None, default: Path) -> Configuration:
    """The configuration in ``path``, or in ``default`` if that exists, or all defaults."""
    chosen = path or default
    try:
        text = chosen.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None:
            return Configuration()
        raise ConfigurationError(f"There is no configuration file {chosen}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{chosen} can't be read: {error}") from None
    return parse(text, str(chosen))
