"""The schema as a list of upgrades; the empty file is version 0, so there is one path only.

An upgrade that has been released is never edited: append another one.
"""

from __future__ import annotations

from typing import NamedTuple

APPLICATION_ID = 0x54757273
"""``Turs`` in the file's header, by which a foreign database is told apart."""


class Upgrade(NamedTuple):
    """Brings a file from one version to the next, statement by statement, in one transaction."""

    description: str
    statements: tuple[str, ...]


_FIRST = (
    """
    -- Which upgrades this file has gone through, and when.
    CREATE TABLE schema_history (
        version     INTEGER PRIMARY KEY,  -- the version that the upgrade leads to
        description TEXT NOT NULL,
        at          REAL NOT NULL         -- UTC epoch seconds, as every "at" and "..._at"
    ) STRICT
    """,
    """
    -- A model's files as they were found on disk. Rows never change: other files, another row.
    CREATE TABLE models (
        id       INTEGER PRIMARY KEY,
        folder   TEXT NOT NULL,           -- absolute
        revision TEXT,                    -- the hub's commit; null for a plain folder
        files    TEXT NOT NULL,           -- JSON array of names relative to the folder
        size     INTEGER                  -- bytes in all, where known
    ) STRICT
    """,
    """
    CREATE UNIQUE INDEX models_content
        ON models (folder, coalesce(revision, ''), files, coalesce(size, -1))
    """,
    """
    -- What the operator wants. A deleted deployment keeps its row, so that its history has a
    -- home and its generations are never numbered twice.
    CREATE TABLE deployments (
        name       TEXT PRIMARY KEY,
        desired    TEXT NOT NULL CHECK (desired IN ('running', 'stopped')),
        replicas   INTEGER NOT NULL CHECK (replicas >= 0),
        created_at REAL NOT NULL,         -- of its present existence
        updated_at REAL NOT NULL,
        deleted_at REAL                   -- null while it exists
    ) STRICT, WITHOUT ROWID
    """,
    """
    -- Append-only versions of a deployment, as asked for; the highest number is the current one.
    CREATE TABLE generations (
        deployment TEXT NOT NULL REFERENCES deployments (name),
        number     INTEGER NOT NULL CHECK (number >= 1),
        model      TEXT NOT NULL,         -- as the user wrote it
        task       TEXT,                  -- null: find it from the model's files
        device     TEXT NOT NULL,
        dtype      TEXT NOT NULL,
        memory     INTEGER,               -- limits of each worker, null: the default. Bytes
        cpu        REAL,                  -- cores
        threads    INTEGER,
        files      INTEGER,
        processes  INTEGER,
        created_at REAL NOT NULL,
        created_by TEXT NOT NULL,
        PRIMARY KEY (deployment, number)
    ) STRICT, WITHOUT ROWID
    """,
    """
    -- What a generation's request turned out to mean. Append-only; the newest row counts.
    CREATE TABLE resolutions (
        id         INTEGER PRIMARY KEY,
        deployment TEXT NOT NULL,
        generation INTEGER NOT NULL,
        model      INTEGER NOT NULL REFERENCES models (id),
        task       TEXT,
        device     TEXT,
        dtype      TEXT,
        at         REAL NOT NULL,
        FOREIGN KEY (deployment, generation) REFERENCES generations (deployment, number)
    ) STRICT
    """,
    "CREATE INDEX resolutions_generation ON resolutions (deployment, generation, id)",
    """
    -- One row a life of a worker, from its spawn to its end.
    CREATE TABLE workers (
        uuid              TEXT PRIMARY KEY,
        deployment        TEXT NOT NULL,
        generation        INTEGER NOT NULL,
        replica           INTEGER NOT NULL,
        boot_id           TEXT NOT NULL,  -- with pid and start time: this process, no other
        spawned_at        REAL NOT NULL,
        keeper_pid        INTEGER,
        keeper_start_time INTEGER,        -- clock ticks since boot
        worker_pid        INTEGER,
        ready_at          REAL,
        ended_at          REAL,           -- null: it runs, or a daemon died before it
        intent            TEXT,           -- why we ended it, recorded before any signal
        failure           TEXT,           -- class of an end that nobody asked for
        reason            TEXT,           -- one clause for people
        exit_status       INTEGER,
        signal            INTEGER,
        peak_rss          INTEGER,        -- bytes
        cpu_seconds       REAL,
        FOREIGN KEY (deployment, generation) REFERENCES generations (deployment, number)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX workers_deployment ON workers (deployment, spawned_at)",
    "CREATE INDEX workers_spawned ON workers (spawned_at)",
    "CREATE INDEX workers_unfinished ON workers (spawned_at) WHERE ended_at IS NULL",
    """
    -- What happened, each with its cause. Append-only; an id is never given twice.
    CREATE TABLE events (
        id         INTEGER PRIMARY KEY AUTOINCREMENT,
        at         REAL NOT NULL,
        kind       TEXT NOT NULL,
        deployment TEXT,
        worker     TEXT,
        message    TEXT NOT NULL,
        cause      TEXT
    ) STRICT
    """,
    "CREATE INDEX events_deployment ON events (deployment, id)",
    """
    -- Dossiers: the evidence of a life that ended unasked, beside what its workers row says
    -- (class, exit status or signal, intent, generation).
    CREATE TABLE crashes (
        id        INTEGER PRIMARY KEY AUTOINCREMENT,
        worker    TEXT NOT NULL UNIQUE REFERENCES workers (uuid) ON DELETE CASCADE,
        at        REAL NOT NULL,
        phase     TEXT NOT NULL,          -- the state it ended in
        load      TEXT NOT NULL,          -- JSON object: what it had to load
        traceback TEXT,                   -- its last words
        stacks    TEXT,                   -- of every thread, taken before a kill
        log       TEXT NOT NULL,          -- JSON array: the last lines of this life
        usage     TEXT NOT NULL,          -- JSON array of [at, bytes of RSS, CPU seconds]
        requests  TEXT NOT NULL,          -- JSON array: ids of the requests in flight
        versions  TEXT NOT NULL           -- JSON object: library to version
    ) STRICT
    """,
    """
    -- Rollups: what a deployment did within one minute.
    CREATE TABLE statistics (
        deployment        TEXT NOT NULL,
        minute            INTEGER NOT NULL,  -- UTC epoch minutes
        requests          INTEGER NOT NULL,
        errors            INTEGER NOT NULL,
        prompt_tokens     INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        seconds           REAL NOT NULL,     -- of all requests together
        queue_seconds     REAL NOT NULL,     -- the part of them spent waiting
        PRIMARY KEY (deployment, minute)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX statistics_minute ON statistics (minute)",
    """
    -- Bearer keys. The key itself is shown once and never stored.
    CREATE TABLE keys (
        id                  INTEGER PRIMARY KEY,
        name                TEXT NOT NULL UNIQUE,
        digest              BLOB NOT NULL UNIQUE,  -- SHA-256 of the key
        scopes              TEXT NOT NULL,         -- JSON array of infer, read, admin
        deployments         TEXT,                  -- JSON array of names; null means all
        requests_per_minute INTEGER,               -- null means no limit
        tokens_per_minute   INTEGER,               -- null means no limit
        created_at          REAL NOT NULL,
        created_by          TEXT NOT NULL,
        last_used_at        REAL,
        revoked_at          REAL
    ) STRICT
    """,
)

_TRUST = (
    # What a model may bring besides data, at the risk of whoever deploys it: 0 or 1.
    "ALTER TABLE generations ADD COLUMN allow_pickle INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE generations ADD COLUMN trust_remote_code INTEGER NOT NULL DEFAULT 0",
)

_AUDIT = (
    """
    -- Who changed what, or was refused it. Rows are only ever added, as the triggers see to.
    CREATE TABLE audit (
        id      INTEGER PRIMARY KEY AUTOINCREMENT,  -- never twice: a gap tells of a loss
        at      REAL NOT NULL,
        by      TEXT NOT NULL,                      -- in words
        action  TEXT NOT NULL,
        target  TEXT,
        status  INTEGER,                            -- of the answer; null: there was no request
        code    TEXT,                               -- of the error; null: it was done
        request TEXT,                               -- its id
        key     INTEGER,
        uid     INTEGER,
        address TEXT
    ) STRICT
    """,
    """
    CREATE TRIGGER audit_update BEFORE UPDATE ON audit
    BEGIN SELECT raise(ABORT, 'the audit is append-only'); END
    """,
    """
    -- Only the oldest entry may go, and none of the last thousand: that is retention.
    CREATE TRIGGER audit_delete BEFORE DELETE ON audit
    WHEN EXISTS (SELECT 1 FROM audit WHERE id < OLD.id)
        OR OLD.id > (SELECT max(id) FROM audit) - 1000
    BEGIN SELECT raise(ABORT, 'the audit is append-only'); END
    """,
    """
    -- INSERT OR REPLACE would delete without that trigger.
    CREATE TRIGGER audit_replace BEFORE INSERT ON audit
    WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id)
    BEGIN SELECT raise(ABORT, 'the audit is append-only'); END
    """,
)

_PULLS = (
    """
    -- Downloads that somebody asked for. Those that have neither ended nor been paused go on
    -- when the daemon starts.
    CREATE TABLE pulls (
        id       INTEGER PRIMARY KEY AUTOINCREMENT,
        model    TEXT NOT NULL,           -- as the user wrote it
        state    TEXT NOT NULL CHECK (
            state IN ('running', 'paused', 'done', 'failed', 'cancelled')),
        asked_at REAL NOT NULL,
        asked_by TEXT NOT NULL,
        ended_at REAL,
        error    TEXT,
        folder   TEXT,                    -- what came of it
        revision TEXT,                    -- the hub's commit
        size     INTEGER                  -- bytes
    ) STRICT
    """,
    "CREATE UNIQUE INDEX pulls_going ON pulls (model) WHERE state IN ('running', 'paused')",
)

_SCHEDULES = (
    """
    ALTER TABLE deployments ADD COLUMN load TEXT NOT NULL DEFAULT 'always'
        CHECK (load IN ('always', 'on_demand', 'manual'))
    """,
    # Seconds, below 0: for ever; null: as configured.
    "ALTER TABLE deployments ADD COLUMN keep_alive REAL",
)

_QUANTIZATION = (
    "ALTER TABLE generations ADD COLUMN quantization TEXT NOT NULL DEFAULT 'none'",
    # JSON object: what the worker chose, and why.
    "ALTER TABLE resolutions ADD COLUMN choices TEXT NOT NULL DEFAULT '{}'",
)

_CHANGES = (
    # The most replicas, as many as long waits make needed; null: as many as "replicas" says.
    "ALTER TABLE deployments ADD COLUMN max_replicas INTEGER",
    # The generation that is wanted; null: the one with the highest number.
    "ALTER TABLE deployments ADD COLUMN generation INTEGER",
    # The one that serves until that has taken over; null: there is none.
    "ALTER TABLE deployments ADD COLUMN stable INTEGER",
    # Percent of the requests for the wanted one beside that; null: it takes over when ready.
    "ALTER TABLE deployments ADD COLUMN canary INTEGER",
    # The generation that this one is again, after a rollback.
    "ALTER TABLE generations ADD COLUMN copy_of INTEGER",
    """
    -- What became of a generation. Append-only; the newest row counts.
    CREATE TABLE turns (
        id         INTEGER PRIMARY KEY,
        deployment TEXT NOT NULL,
        generation INTEGER NOT NULL,
        fate       TEXT NOT NULL,
        reason     TEXT,
        at         REAL NOT NULL,
        FOREIGN KEY (deployment, generation) REFERENCES generations (deployment, number)
    ) STRICT
    """,
    "CREATE INDEX turns_deployment ON turns (deployment, id)",
    # What is known of those before: which have served, and what took over from them.
    """
    INSERT INTO turns (deployment, generation, fate, at)
    SELECT deployment, generation, 'serving', min(ready_at) FROM workers
    WHERE ready_at IS NOT NULL GROUP BY deployment, generation
    """,
    """
    INSERT INTO turns (deployment, generation, fate, reason, at)
    SELECT o.deployment, o.generation, 'replaced', 'by generation ' || min(n.generation), min(n.at)
    FROM turns AS o JOIN turns AS n ON n.deployment = o.deployment AND n.generation > o.generation
    GROUP BY o.deployment, o.generation
    """,
)

_MEASUREMENTS = (
    """
    -- The most that workers of a model have had of memory, whichever deployment they were of.
    CREATE TABLE measurements (
        model            TEXT NOT NULL,   -- the hub's commit, or a digest of a folder's files
        device           TEXT NOT NULL,   -- cpu, mps, cuda; "cuda x2": two of them together
        dtype            TEXT NOT NULL,
        task             TEXT NOT NULL,   -- empty: as the model's files say
        quantization     TEXT NOT NULL,
        max_batch_tokens INTEGER NOT NULL,
        max_sequences    INTEGER NOT NULL,
        threads          INTEGER NOT NULL,
        host_load        INTEGER,         -- bytes, until the weights were there,
        host_warm        INTEGER,         -- until it was ready,
        host_busy        INTEGER,         -- and in service
        gpu_load         INTEGER,         -- the same of its GPUs together
        gpu_warm         INTEGER,
        gpu_busy         INTEGER,
        load_seconds     REAL,            -- of the last load
        at               REAL NOT NULL,
        PRIMARY KEY (
            model, device, dtype, task, quantization, max_batch_tokens, max_sequences, threads)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX measurements_at ON measurements (at)",
)

_ROLLUPS = (
    """
    -- What was done for a key within a span of time, added up. A row of span 0 is that of a
    -- minute that may still go on, and goes when it has been added to the three others.
    CREATE TABLE rollups (
        span              INTEGER NOT NULL CHECK (span IN (0, 60, 3600, 86400)),  -- seconds
        start             INTEGER NOT NULL,            -- UTC epoch seconds
        deployment        TEXT NOT NULL,               -- empty: requests that got to none
        key               INTEGER NOT NULL,            -- its id; 0: requests without one
        requests          INTEGER NOT NULL,
        served            INTEGER NOT NULL,            -- those that a worker got
        prompt_tokens     INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        seconds           REAL NOT NULL,               -- of all that were served together
        queue_seconds     REAL NOT NULL,               -- the part of them spent waiting
        batched           INTEGER NOT NULL DEFAULT 0,  -- requests that were part of a batch
        batch_size        INTEGER NOT NULL DEFAULT 0,  -- the sizes of these batches, added up
        batch_max         INTEGER NOT NULL DEFAULT 0,
        errors_client     INTEGER NOT NULL DEFAULT 0,
        errors_overload   INTEGER NOT NULL DEFAULT 0,
        errors_lost       INTEGER NOT NULL DEFAULT 0,
        errors_timeout    INTEGER NOT NULL DEFAULT 0,
        errors_cancelled  INTEGER NOT NULL DEFAULT 0,
        errors_internal   INTEGER NOT NULL DEFAULT 0,
        errors_unknown    INTEGER NOT NULL DEFAULT 0,
        samples           INTEGER NOT NULL DEFAULT 0,  -- looks at the workers' memory, in the
        rss               INTEGER NOT NULL DEFAULT 0,  -- rows without a key: bytes, added up
        rss_max           INTEGER NOT NULL DEFAULT 0,
        gpu               INTEGER NOT NULL DEFAULT 0,
        gpu_max           INTEGER NOT NULL DEFAULT 0,
        latency           BLOB,                        -- sketches; null: they have counted nothing
        first_byte        BLOB,
        queue             BLOB,
        UNIQUE (span, deployment, start, key)
    ) STRICT
    """,
    "CREATE INDEX rollups_start ON rollups (span, start)",
    *(
        f"""
        INSERT INTO rollups (span, start, deployment, key, requests, served, prompt_tokens,
            completion_tokens, seconds, queue_seconds, errors_unknown)
        SELECT {span}, minute * 60 / {span} * {span}, deployment, 0, sum(requests), sum(requests),
            sum(prompt_tokens), sum(completion_tokens), sum(seconds), sum(queue_seconds),
            sum(errors)
        FROM statistics GROUP BY deployment, minute * 60 / {span}
        """  # noqa: S608 - three numbers
        for span in (60, 3600, 86400)
    ),
    "DROP TABLE statistics",
)

_PULL_TRUST = (
    # What a pull takes besides data: 0 or 1.
    "ALTER TABLE pulls ADD COLUMN allow_pickle INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE pulls ADD COLUMN trust_remote_code INTEGER NOT NULL DEFAULT 0",
    "DROP INDEX pulls_going",
    """
    CREATE UNIQUE INDEX pulls_going ON pulls (model, allow_pickle, trust_remote_code)
        WHERE state IN ('running', 'paused')
    """,
)

_LOADED = (
    # Of what is loaded manually, whether somebody wants it in memory: 0 or 1.
    "ALTER TABLE deployments ADD COLUMN loaded INTEGER NOT NULL DEFAULT 0",
)

UPGRADES: tuple[Upgrade, ...] = (
    Upgrade("the first schema", _FIRST),
    Upgrade("pickle and remote code by generation", _TRUST),
    Upgrade("the audit", _AUDIT),
    Upgrade("pulls", _PULLS),
    Upgrade("when deployments are in memory", _SCHEDULES),
    Upgrade("quantization, and why a load was as it was", _QUANTIZATION),
    Upgrade("canaries, ranges of replicas, and what became of generations", _CHANGES),
    Upgrade("measured memory of models", _MEASUREMENTS),
    Upgrade("statistics by key, minute, hour and day", _ROLLUPS),
    Upgrade("what pulls take besides data", _PULL_TRUST),
    Upgrade("what has been loaded by hand", _LOADED),
)
"""``UPGRADES[n]`` brings version ``n`` to ``n + 1``."""
