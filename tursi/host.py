"""The machine: what it has, and how much of it the daemon may use."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path

import msgspec

from twisted.logger import Logger

from tursi.config import Configuration
from tursi.model import Host

log = Logger()

_MANY_FILES = 65536
"""Open files beyond which there is no use for more."""
_OWN_FILES = 512
"""Open files for everything but connections of clients."""
_FEW = 16


def host(environment: Mapping[str, str]) -> Host:
    """What this machine has."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Host(
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=len(os.sched_getaffinity(0)),
        files=None if files == resource.RLIM_INFINITY else files,
        gpus=tuple(f"cuda:{index}" for index in range(_gpus(environment))),
    )


def _gpus(environment: Mapping[str, str]) -> int:
    """How many GPUs workers can see."""
    here = len([*Path("/dev").glob("nvidia[0-9]*")])
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    return here if chosen is None else min(here, len([*filter(None, chosen.split(","))]))


def fitting(configuration: Configuration) -> Configuration:
    """``configuration`` with no more connections than there may be descriptors for.

    Without one left nobody could be let in, on the control socket neither.
    """
    http = configuration.http
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    most = max(_FEW, (files - _OWN_FILES) // (len(http.listeners) + 1))
    if most >= http.max_connections:
        return configuration
    log.warn(
        "http.max_connections is taken as {fitting}: the system allows this process only {files} "
        "open files (LimitNOFILE=, ulimit -n)",
        fitting=most,
        files=files,
    )
    return msgspec.structs.replace(
        configuration, http=msgspec.structs.replace(http, max_connections=most)
    )
