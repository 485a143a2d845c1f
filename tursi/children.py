"""The daemon's child processes: what a worker and a fetcher are started with."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tursi import mark, sandbox
from tursi.config import Configuration
from tursi.model import Folders, Limits, LoadOrder
from tursi.plan import Key
from tursi.supervision import cgroup
from tursi.supervision.containment import Encloser
from tursi.supervision.logs import LifeLog
from tursi.supervision.monitor import WorkerMonitor
from tursi.supervision.oneshot import OneShot, Running
from tursi.supervision.worker import Observer, Worker
from tursi.wire import Frame

WORKER_COMMAND = (sys.executable, "-I", "-u", "-m", "tursi.inference")

_HOOK_LOG = 256 * 1024

_KEPT_VARIABLES = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES",
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE",
)  # fmt: skip
"""What children inherit of the daemon's environment: no token, no notify socket, nothing else."""

_FETCHER_VARIABLES = (
    "HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET",
    "XDG_CACHE_HOME", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy",
    "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
"""What the fetcher gets besides: the way to the hub, and its token."""


_CREDENTIAL = "hub_token"
"""The name that the hub's token has among the credentials of systemd."""


class Children:
    """Makes workers and starts fetchers, of an environment and with a command.

    ``configuration`` is to be replaced whenever it changes.
    """

    def __init__(
        self,
        configuration: Configuration,
        folders: Folders,
        reactor: Any,
        *,
        environment: Mapping[str, str] = os.environ,
        worker_command: tuple[str, ...] = WORKER_COMMAND,
    ) -> None:
        self.configuration = configuration
        self.encloser = Encloser()
        self.monitor = WorkerMonitor(reactor)
        self._folders = folders
        self._reactor = reactor
        self._given = environment
        self._worker_command = worker_command
        self._one_shot = OneShot(reactor)

    def contain(self) -> None:
        """Find out how workers can be confined here; before any child is started."""
        groups, because = None, None
        try:
            groups = cgroup.join()
        except cgroup.NotDelegated as reason:
            because = str(reason)
        self.encloser = Encloser(
            groups=groups,
            because=because,
            landlock=sandbox.landlock_version(),
            deny_sockets=sandbox.sockets_deniable(),
            temporary=self._folders.state / "tmp",
        )

    @property
    def fetcher_environment(self) -> dict[str, str]:
        """What a fetcher inherits; a token among systemd's credentials is told by its place."""
        found = self._inherited(_KEPT_VARIABLES) | self._inherited(_FETCHER_VARIABLES)
        if folder := self._given.get("CREDENTIALS_DIRECTORY"):
            token = Path(folder, _CREDENTIAL)
            if token.exists():
                found["HF_TOKEN_PATH"] = str(token)
        return found

    def make_worker(
        self,
        *,
        name: str,
        key: Key,
        order: LoadOrder,
        limits: Limits,
        observer: Observer,
        place: Callable[[str], str],
    ) -> Worker:
        """A worker that has not been started."""
        threads = str(order.threads)
        return Worker(
            name=name,
            deployment=key.deployment,
            replica=key.replica,
            generation=key.generation,
            order=order,
            command=self._worker_command,
            environment={
                # As the driver counts GPUs, by which the daemon reckons.
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                **self._inherited(_KEPT_VARIABLES),
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                mark.STATE: str(self._folders.state),
            },
            logs=self._folders.logs / key.deployment,
            settings=self.configuration.workers,
            requests=self.configuration.requests,
            monitor=self.monitor,
            reactor=self._reactor,
            random=random.random,
            now=time.time,
            observer=observer,
            limits=limits,
            encloser=self.encloser,
            place=place,
        )

    def spawn_fetcher(
        self,
        name: str,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        receive: Callable[[Frame], None],
    ) -> Running:
        """Start a fetcher; ``receive`` gets its frames."""
        settings = self.configuration.workers
        # What isn't there yet can't be allowed.
        with suppress(OSError):
            self._folders.cache.mkdir(parents=True, exist_ok=True)
        return self._one_shot.run(
            name,
            arguments,
            {**environment, mark.STATE: str(self._folders.state)},
            receive,
            LifeLog(
                self._folders.state / "fetches" / f"{name}.log",
                clock=time.time,
                size=settings.log_bytes,
                rate=settings.log_bytes_per_second,
            ),
            self.encloser.enclose_fetcher(self._folders.cache, arguments, environment),
        )

    def spawn_hook(self, name: str, arguments: tuple[str, ...]) -> Running:
        """Start a program of the user's."""
        return self._one_shot.run(
            f"hook {name}",
            arguments,
            {**self._inherited(_KEPT_VARIABLES), mark.STATE: str(self._folders.state)},
            lambda _: None,
            LifeLog(
                self._folders.state / "hooks" / f"{name}.log",
                clock=time.time,
                size=_HOOK_LOG,
                rate=_HOOK_LOG,
            ),
        )

    def _inherited(self, names: tuple[str, ...]) -> dict[str, str]:
        return {name: self._given[name] for name in names if name in self._given}
