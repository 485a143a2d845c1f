"""What went wrong at the hub, as one sentence that says what to do."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tursi.errors import (
    DiskFull,
    FetchError,
    HubOffline,
    HubUnreachable,
    RepositoryGated,
    RepositoryNotFound,
    RevisionNotFound,
    TokenRefused,
)

# huggingface_hub's HTTP client has changed its package before (httpx, httpx2);
# the first base of its own error is that client's root of all errors.
_CLIENT_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]
_GIVE_TOKEN = "give Tursi a token that may read it (HF_TOKEN, or token_file under [hub])"  # noqa: S105 - a sentence
_MAX_RETRY_AFTER = 3600
_RETRY_AFTER = 30
_TIMED_OUT = 408


def explain(error: BaseException, repository: str, revision: str | None) -> FetchError:
    """The error of ours that stands for ``error``, met while fetching ``repository``."""
    for each in _chain(error):
        if (known := _known(each, repository, revision)) is not None:
            return known
    return FetchError(
        f"{repository} could not be downloaded: {type(error).__name__}: {_first_line(error)}"
    )


def _known(error: BaseException, repository: str, revision: str | None) -> FetchError | None:
    hub = constants.ENDPOINT
    if isinstance(error, FetchError):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return offline(repository, revision)
    if isinstance(error, HFValidationError):
        return RepositoryNotFound(f"{repository!r} is no name that the hub can have.")
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, repository, revision)
    if isinstance(error, _CLIENT_ERROR):
        return HubUnreachable(
            f"{hub} can't be reached ({_first_line(error)}): check the network, the proxy "
            "settings and endpoint under [hub]; models in the cache and folders need no hub."
        )
    if isinstance(error, OSError) and str(error).startswith("Consistency check failed"):
        return HubUnreachable(
            f"A file of {repository} came in another length than it has; try again later."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"The disk became full while {repository} was downloaded; free some space.")
    if isinstance(error, OSError) and error.errno is not None:
        return FetchError(f"{repository} can't be written to the cache: {error}.")
    return None


def _refusal(error: HfHubHTTPError, repository: str, revision: str | None) -> FetchError:
    hub, status, token = constants.ENDPOINT, error.response.status_code, get_token() is not None
    place = urlsplit(str(error.response.url))
    host = f"{place.scheme}://{place.netloc}"
    # Gated comes first: it is a kind of not found for huggingface_hub.
    if isinstance(error, GatedRepoError):
        terms = f"{repository} is gated: accept its terms at {hub}/{repository}, then "
        return RepositoryGated(
            terms
            + (
                "try again; the account of this token has no access yet."
                if token
                else _GIVE_TOKEN + "."
            )
        )
    if isinstance(error, DisabledRepoError):
        return RepositoryNotFound(f"{hub} has disabled {repository}.")
    if isinstance(error, RevisionNotFoundError):
        return RevisionNotFound(
            f"{repository} has no revision {revision or 'main'!r}: check the branch, tag or commit."
        )
    if isinstance(error, RepositoryNotFoundError):
        whom = "hides it from this token" if token else "it is private"
        return RepositoryNotFound(
            f"{hub} has no model {repository}, or {whom}: check the name, or {_GIVE_TOKEN}."
        )
    if status == 429:
        seconds = _retry_after(error) or _RETRY_AFTER
        return HubUnreachable(
            f"{host} limits the rate of requests; try again in {seconds} seconds.",
            retry_after=seconds,
        )
    # Content has addresses that are good for a while only: the hub gives others next time.
    elsewhere = place.hostname != urlsplit(hub).hostname
    if status >= 500 or status == _TIMED_OUT or elsewhere:
        return HubUnreachable(
            f"{host} has a problem of its own (status {status}); try again later.",
            retry_after=_retry_after(error),
        )
    if status == 401:
        return TokenRefused(
            f"{hub} refuses the token: it is wrong or has expired; give Tursi another "
            "(HF_TOKEN, or token_file under [hub])."
        )
    if status == 403:
        return TokenRefused(f"{hub} forbids reading {repository} with this token; {_GIVE_TOKEN}.")
    return FetchError(f"{hub} answered with status {status}: {_first_line(error)}")


def offline(repository: str, revision: str | None) -> HubOffline:
    """For a model that isn't in the cache while offline mode forbids to ask the hub."""
    wanted = f"{repository}@{revision}" if revision else repository
    return HubOffline(
        f"{wanted} isn't (completely) in the cache, and offline mode is on: turn it off "
        "(offline under [hub], HF_HUB_OFFLINE), or name a folder."
    )


def temporary(error: FetchError) -> bool:
    """Whether what the cache has may stand in for the hub."""
    return isinstance(error, HubUnreachable)


def _chain(error: BaseException) -> Iterator[BaseException]:
    # huggingface_hub wraps what it met, sometimes twice.
    current: BaseException | None = error
    for _ in range(8):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__


def _retry_after(error: HfHubHTTPError) -> int | None:
    value = error.response.headers.get("Retry-After")
    return retry_after(value, time.time()) if value else None


def retry_after(value: str, now: float) -> int:
    """The seconds that a Retry-After asks for, which may be a date; ``now`` is UTC."""
    if value.isdecimal():
        seconds = int(value)
    else:
        try:
            # A date without a zone is meant as one of Greenwich.
            seconds = int(parsedate_to_datetime(value).timestamp() - now) + 1
        except (ValueError, TypeError, OverflowError):
            return _RETRY_AFTER
    return max(1, min(seconds, _MAX_RETRY_AFTER))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
