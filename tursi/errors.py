"""Every refusal that Tursi makes on purpose, in one flat list.

A class has a stable ``code`` for programs; its message is one clear sentence
for people that says what to do. ``tursi.faces.STATUS`` gives each code its
HTTP status. Whatever is raised and isn't listed here is a defect and gets an
incident id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tursi.loading import Loading


class TursiError(Exception):
    """Something that Tursi refuses or can't do.

    ``message`` is shown to the user as it is. ``param`` names the offending
    field of a request (a dotted path). ``retry_after`` is a whole number of
    seconds (1-120) after which the same request may succeed; ``None`` where
    waiting doesn't help. ``reference`` points at evidence, such as the id of a
    crash. ``public`` is the message for those who may not read about this machine,
    where ``message`` may name a path of it. ``loading`` tells how far the model is
    where it isn't there yet.
    """

    code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str = "",
        *,
        param: str | None = None,
        retry_after: int | None = None,
        reference: str | None = None,
        public: str | None = None,
        loading: Loading | None = None,
    ) -> None:
        text = message or (self.__doc__ or "").strip().splitlines()[0]
        super().__init__(text)
        self.message = text
        self.param = param
        self.retry_after = retry_after
        self.reference = reference
        self.public = public
        self.loading = loading

    def discreet(self) -> TursiError:
        """The same without what only those may know who may read about this machine."""
        if self.public is None:
            return self
        return type(self)(
            self.public,
            param=self.param,
            retry_after=self.retry_after,
            reference=self.reference,
            loading=self.loading,
        )


# -- requests ---------------------------------------------------------------


class InvalidRequest(TursiError):
    """The request is not what this route takes."""

    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """The input is longer than the model takes."""

    code = "context_length_exceeded"


class TaskNotSupported(InvalidRequest):
    """The model does another task."""

    code = "task_not_supported"


class UnsupportedMediaType(TursiError):
    """The body's Content-Type isn't one that this route takes."""

    code = "unsupported_media_type"


class PayloadTooLarge(TursiError):
    """The body is larger than the limit."""

    code = "payload_too_large"


class RequestTimeout(TursiError):
    """The request did not arrive in time."""

    code = "request_timeout"


class RouteNotFound(TursiError):
    """There is nothing at this path."""

    code = "route_not_found"


class MethodNotAllowed(TursiError):
    """The path doesn't take that method."""

    code = "method_not_allowed"


class HostRefused(TursiError):
    """The Host header names a host that this server doesn't answer for."""

    code = "host_refused"


class OriginRefused(TursiError):
    """Requests from web pages of another origin aren't answered."""

    code = "origin_refused"


class RoleNotOffered(TursiError):
    """The listener doesn't offer that; use the control socket."""

    code = "role_not_offered"


class KeyRequired(TursiError):
    """An API key is needed; send it in the header 'Authorization: Bearer KEY'."""

    code = "api_key_required"


class KeyRefused(TursiError):
    """The API key isn't valid; `tursi keys list` shows those that are."""

    code = "invalid_api_key"


class ScopeMissing(TursiError):
    """The API key doesn't allow that; use one with the scope that it needs."""

    code = "scope_missing"


class DeploymentForbidden(TursiError):
    """The API key isn't for this deployment."""

    code = "deployment_forbidden"


class PeerRefused(TursiError):
    """The control socket is for root, the daemon's own user and its control group only."""

    code = "peer_refused"


class RateLimited(TursiError):
    """The API key has used up its rate; try again later."""

    code = "rate_limited"


class KeyNotFound(TursiError):
    """There is no such key; `tursi keys list` lists them."""

    code = "key_not_found"


class KeyExists(TursiError):
    """A key with this name exists, or did; choose another name."""

    code = "key_exists"


class ModelNotFound(TursiError):
    """No deployment has this name."""

    code = "model_not_found"


class DeploymentNotFound(TursiError):
    """No deployment has this name; `tursi ps` lists them."""

    code = "deployment_not_found"


class CrashNotFound(TursiError):
    """The deployment has no crash with this id; `tursi crashes NAME` lists those it has."""

    code = "crash_not_found"


class PullNotFound(TursiError):
    """There is no such pull; `tursi pulls` lists those there are."""

    code = "pull_not_found"


class CatalogueEntryNotFound(TursiError):
    """No such model is on this machine's disk; `tursi models` lists those that are."""

    code = "catalogue_entry_not_found"


class ModelInUse(TursiError):
    """A deployment or a pull uses the model's files; end that first."""

    code = "model_in_use"


class NoCanary(TursiError):
    """The deployment has no canary; `tursi up MODEL --name NAME --canary 10` deploys one."""

    code = "no_canary"


class FilesUnavailable(TursiError):
    """The model's files aren't all on this machine's disk; `tursi ps` says how far they are."""

    code = "files_unavailable"


class ArchiveInvalid(TursiError):
    """The archive is damaged, or no archive that `tursi export` has made."""

    code = "archive_invalid"


class ArchiveNewer(TursiError):
    """The archive was made by a newer Tursi; import it with that."""

    code = "archive_newer"


class ArchiveRefused(TursiError):
    """The archive has what is only taken from somebody who is trusted, or contradicts the disk."""

    code = "archive_refused"


class GenerationNotFound(TursiError):
    """The deployment has no such generation; `tursi history NAME` lists those it has."""

    code = "generation_not_found"


class PoisonRequest(TursiError):
    """Two workers ended while they held this very request; it is refused for an hour."""

    code = "poison_request"


class QueueFull(TursiError):
    """The deployment's queue is full; try again shortly."""

    code = "queue_full"


class ModelLoading(TursiError):
    """The model is still loading; try again shortly."""

    code = "model_loading"


class DeploymentUnavailable(TursiError):
    """The deployment is not serving."""

    code = "deployment_unavailable"


class WorkerLost(TursiError):
    """The worker ended while it held this request."""

    code = "worker_lost"


class DeadlineExceeded(TursiError):
    """The request took longer than its deadline."""

    code = "deadline_exceeded"


class RequestCancelled(TursiError):
    """The client went away."""

    code = "request_cancelled"


class StartingUp(TursiError):
    """The daemon is starting; try again in a second."""

    code = "starting_up"


class ShuttingDown(TursiError):
    """The daemon is stopping."""

    code = "shutting_down"


class InternalError(TursiError):
    """Tursi failed; the log has the details under this incident id."""

    code = "internal_error"


# -- loading a model (the worker's last words) --------------------------------


class LoadError(TursiError):
    """The model could not be loaded."""

    code = "load_failed"
    exit_status: ClassVar[int] = 70


class ModelFilesMissing(LoadError):
    """The model's folder lacks what is needed to load it."""

    code = "model_files_missing"
    exit_status = 66


class WeightsCorrupt(LoadError):
    """The model's weights are damaged or don't fit its configuration."""

    code = "weights_corrupt"
    exit_status = 65


class ArchitectureUnsupported(LoadError):
    """The installed transformers doesn't know this architecture."""

    code = "architecture_unsupported"
    exit_status = 78


class TaskUnsuitable(LoadError):
    """The model can't do the task that was asked for."""

    code = "task_unsuitable"
    exit_status = 78


class ModelRefused(LoadError):
    """The model needs code or pickle files, which Tursi runs only where that is asked for."""

    code = "model_refused"
    exit_status = 77


class DeviceUnavailable(LoadError):
    """The device that was asked for isn't there."""

    code = "device_unavailable"
    exit_status = 69


class DeviceUnsupported(LoadError):
    """The device that was asked for can't be used by what is installed here."""

    code = "device_unsupported"
    # Not 69: waiting for it would be of no use.
    exit_status = 78


class QuantizationUnsupported(LoadError):
    """The model can't be quantized like that by what is installed here."""

    code = "quantization_unsupported"
    exit_status = 78


class QuantizationInaccurate(LoadError):
    """The quantized model would differ too much from the unquantized one."""

    code = "quantization_inaccurate"
    exit_status = 78


class OutOfMemory(LoadError):
    """There isn't enough memory to load the model."""

    code = "out_of_memory"
    exit_status = 71


class AcceleratorLost(LoadError):
    """The accelerator's state is lost to the process; a new one begins afresh."""

    code = "accelerator_lost"
    exit_status = 86


# -- fetching a model -----------------------------------------------------------


class FetchError(TursiError):
    """The model could not be downloaded."""

    code = "fetch_failed"
    exit_status: ClassVar[int] = 70
    passing: ClassVar[bool] = False
    """Whether it may be over by itself, so that the daemon tries again."""


class RepositoryNotFound(FetchError):
    """The hub has no such repository, or hides it without a token."""

    code = "repository_not_found"
    exit_status = 66


class RevisionNotFound(FetchError):
    """The repository has no such revision."""

    code = "revision_not_found"
    exit_status = 66


class RepositoryGated(FetchError):
    """The repository is gated; accept its terms on the hub and give Tursi a token."""

    code = "repository_gated"
    exit_status = 77


class TokenRefused(FetchError):
    """The hub refuses the token; give Tursi another."""

    code = "token_refused"
    exit_status = 77


class HubUnreachable(FetchError):
    """The hub can't be reached."""

    code = "hub_unreachable"
    exit_status = 75
    passing = True


class HubOffline(FetchError):
    """The model isn't on the disk, and offline mode forbids to ask the hub."""

    code = "hub_offline"
    exit_status = 75


class FetchInterrupted(FetchError):
    """Something on this machine kept the model's files from being found; it is tried again."""

    code = "fetch_interrupted"
    exit_status = 75
    passing = True


class DiskFull(FetchError):
    """There isn't enough disk space."""

    code = "disk_full"
    exit_status = 74
    passing = True


class RepositoryRefused(FetchError):
    """The repository has pickle files only, which Tursi loads only where that is asked for."""

    code = "repository_refused"
    exit_status = 77


class SafetensorsMissing(FetchError):
    """The repository has no safetensors weights."""

    code = "safetensors_missing"
    exit_status = 65


# -- the daemon itself ------------------------------------------------------------


class ConfigurationError(TursiError):
    """The configuration is wrong."""

    code = "configuration_error"


class AlreadyRunning(TursiError):
    """A daemon already uses this state folder."""

    code = "already_running"


class AddressInUse(TursiError):
    """Another process already listens there."""

    code = "address_in_use"


class DatabaseError(TursiError):
    """The database can't be used."""

    code = "database_error"


class DatabaseBusy(TursiError):
    """The database is busy; try again shortly."""

    code = "database_busy"


class DatabaseFull(TursiError):
    """The disk that holds the database is full; nothing was changed."""

    code = "database_full"


def by_code() -> dict[str, type[TursiError]]:
    """Every error class by its code, for turning a code on the wire into an error."""
    found: dict[str, type[TursiError]] = {}
    waiting: list[type[TursiError]] = [TursiError]
    while waiting:
        cls = waiting.pop()
        # The first class that declares a code owns it: a subclass that
        # inherits its parent's is no error of its own.
        found.setdefault(cls.code, cls)
        waiting.extend(cls.__subclasses__())
    found[InternalError.code] = InternalError
    return found
