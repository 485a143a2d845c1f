"""The words of the domain: frozen values that every floor speaks.

Times are UTC epoch seconds (``float``), sizes are bytes, durations are seconds.
"""

from __future__ import annotations

from tursi.model.access import ALL_SCOPES, DEFAULT_PORT, ApiKey, Caller, NewKey, Role, Scope
from tursi.model.archive import ImportPlan
from tursi.model.audit import AuditEntry, AuditQuery
from tursi.model.card import ModelCard, ModelFile, ModelReport
from tursi.model.crash import Crash, Dossier, last_line
from tursi.model.deployment import (
    DTYPES,
    MAX_KEEP_ALIVE,
    MAX_REPLICAS,
    QUANTIZATIONS,
    Deployment,
    Desired,
    Fate,
    Generation,
    Load,
    Request,
    Resolution,
    Schedule,
    Trust,
    Turn,
    check_keep_alive,
    check_replicas,
    check_weight,
)
from tursi.model.fit import Fit, Gpu, Room, Verdict
from tursi.model.footprint import Build, Estimate, Footprint, Measurement, Peaks, Stage
from tursi.model.history import Event, Story
from tursi.model.limits import (
    MAX_CPU,
    MAX_FILES,
    MAX_MEMORY,
    MAX_PROCESSES,
    MAX_THREADS,
    MIN_CPU,
    MIN_FILES,
    MIN_MEMORY,
    MIN_PROCESSES,
    Host,
    Limits,
    mebibytes,
)
from tursi.model.name import deployment_name, key_name
from tursi.model.paths import Folders, folders
from tursi.model.pull import CatalogueEntry, Pull, PullState, PullStatus
from tursi.model.reference import Reference
from tursi.model.status import (
    CanaryStatus,
    Containment,
    DatabaseReport,
    DeploymentStatus,
    StorageStatus,
    WorkerStatus,
)
from tursi.model.task import Task
from tursi.model.worker import (
    FailureClass,
    Loaded,
    LoadOrder,
    Phase,
    Progress,
    Sample,
    Usage,
    WorkerLife,
)

__all__ = [
    "ALL_SCOPES",
    "DEFAULT_PORT",
    "DTYPES",
    "MAX_CPU",
    "MAX_FILES",
    "MAX_KEEP_ALIVE",
    "MAX_MEMORY",
    "MAX_PROCESSES",
    "MAX_REPLICAS",
    "MAX_THREADS",
    "MIN_CPU",
    "MIN_FILES",
    "MIN_MEMORY",
    "MIN_PROCESSES",
    "QUANTIZATIONS",
    "ApiKey",
    "AuditEntry",
    "AuditQuery",
    "Build",
    "Caller",
    "CanaryStatus",
    "CatalogueEntry",
    "Containment",
    "Crash",
    "DatabaseReport",
    "Deployment",
    "DeploymentStatus",
    "Desired",
    "Dossier",
    "Estimate",
    "Event",
    "FailureClass",
    "Fate",
    "Fit",
    "Folders",
    "Footprint",
    "Generation",
    "Gpu",
    "Host",
    "ImportPlan",
    "Limits",
    "Load",
    "LoadOrder",
    "Loaded",
    "Measurement",
    "ModelCard",
    "ModelFile",
    "ModelReport",
    "NewKey",
    "Peaks",
    "Phase",
    "Progress",
    "Pull",
    "PullState",
    "PullStatus",
    "Reference",
    "Request",
    "Resolution",
    "Role",
    "Room",
    "Sample",
    "Schedule",
    "Scope",
    "Stage",
    "StorageStatus",
    "Story",
    "Task",
    "Trust",
    "Turn",
    "Usage",
    "Verdict",
    "WorkerLife",
    "WorkerStatus",
    "check_keep_alive",
    "check_replicas",
    "check_weight",
    "deployment_name",
    "folders",
    "key_name",
    "last_line",
    "mebibytes",
]
