"""Models as clients of inference see them, and those on disk."""

from __future__ import annotations

from dataclasses import replace

from tursi.api.access import require_deployment
from tursi.api.endpoint import Status, endpoint
from tursi.api.fleet import Fleet
from tursi.api.info import Info
from tursi.api.messages import Catalogue, ModelEntry, ModelHealth, ModelInfo, ModelList
from tursi.errors import DeploymentNotFound
from tursi.faces import TABLE
from tursi.model import Caller, DeploymentStatus, ModelReport, Role


class Models:
    """Handlers for the lists of models."""

    def __init__(self, fleet: Fleet, info: Info) -> None:
        self._fleet = fleet
        self._info = info

    @endpoint("GET", "/v1/models", role=Role.INFERENCE, reply=ModelList)
    def list(self, caller: Caller) -> ModelList:
        """List the models that requests may name."""
        allowed = caller.deployments
        return ModelList(
            [
                _entry(status)
                for status in self._fleet.deployments()
                if allowed is None or status.name in allowed
            ]
        )

    @endpoint("GET", "/v1/models/<path:model>", role=Role.INFERENCE, reply=ModelEntry)
    def show(self, model: str, caller: Caller) -> ModelEntry:
        """Show one of them, by its name or full reference."""
        return _entry(self._find(model, caller))

    @endpoint(
        "GET", "/models/<path:model>/health", role=Role.INFERENCE, reply=ModelHealth,
        statuses=(200, 503),
    )  # fmt: skip
    def health(self, model: str, caller: Caller) -> ModelHealth | Status[ModelHealth]:
        """Tell whether the model serves."""
        status = self._find(model, caller)
        reply = ModelHealth(status.phase.value)
        return reply if status.ready else Status(503, reply)

    @endpoint("GET", "/models/<path:model>/info", role=Role.INFERENCE, reply=ModelInfo)
    def info(self, model: str, caller: Caller) -> ModelInfo:
        """Tell what the model is."""
        status = self._find(model, caller)
        return ModelInfo(
            # A folder is nobody's business but the operator's.
            model_id=status.name if status.model.startswith("/") else status.model,
            model_sha=status.commit,
            model_dtype=status.dtype,
            task=status.task,
            device=status.device,
            version=self._info.version,
        )

    @endpoint("GET", "/catalogue", role=Role.CONTROL, reply=Catalogue)
    async def catalogue(self) -> Catalogue:
        """List the models on this machine's disk."""
        return Catalogue(await self._fleet.catalogue.entries())

    @endpoint("GET", "/catalogue/<path:model>", role=Role.CONTROL, reply=ModelReport)
    async def details(self, model: str) -> ModelReport:
        """Tell what a model on the disk is, by its name or that of a deployment."""
        report = await self._fleet.catalogue.show(model)
        try:
            status = self._fleet.deployment(model)
        except DeploymentNotFound:
            return report
        paths = [route.path for route in TABLE if status.task in route.tasks]
        return replace(report, routes=tuple(path.format(name=status.name) for path in paths))

    @endpoint("DELETE", "/catalogue/<path:model>", role=Role.CONTROL, reply=Catalogue)
    async def remove(self, model: str, by: str) -> Catalogue:
        """Delete a model's files, all revisions or the one after an ``@``; tells what has gone."""
        return Catalogue([*await self._fleet.catalogue.remove(model, by)])

    def _find(self, model: str, caller: Caller) -> DeploymentStatus:
        name = self._fleet.find(model)
        require_deployment(name, caller)
        return self._fleet.deployment(name)


def _entry(status: DeploymentStatus) -> ModelEntry:
    return ModelEntry(status.name, int(status.created_at))
