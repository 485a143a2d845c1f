"""One download: ask the hub what there is, take what the model needs, check it."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import (
    HfApi,
    constants,
    file_download,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import _http

from tursi.errors import DiskFull, FetchError, HubUnreachable, TokenRefused
from tursi.fetcher.failures import explain, offline, temporary
from tursi.fetcher.meter import Meter, bar
from tursi.fetcher.partial import resuming
from tursi.fetcher.snapshot import Listed, Shelf, is_commit
from tursi.model import Progress, Resolution, Trust
from tursi.selection import select

_ASK_SECONDS = 30.0
_FILES_AT_ONCE = 4
_MAX_INDEX = 64 * 1024 * 1024
_SHA256_DIGITS = 64

# huggingface_hub hands on what arrived only once a whole chunk is there, and its
# 10 MiB would look like a stall on a slow line.
constants.DOWNLOAD_CHUNK_SIZE = 512 * 1024
_http_get = file_download.http_get


def _impatient(backoff: Callable[..., Any]) -> Callable[..., Any]:
    """``backoff`` of huggingface_hub that leaves it to the daemon to try refusals again.

    It would sleep as long as a limited rate lasts, which looks like a stall and which nobody
    is told of, and ask a hub in trouble again before its ``Retry-After``.
    """

    def answered(*arguments: Any, **settings: Any) -> Any:
        return backoff(*arguments, **{**settings, "retry_on_status_codes": ()})

    return answered


_http._http_backoff_base = _impatient(_http._http_backoff_base)  # noqa: SLF001 - it has no other way


class Download:
    """Brings ``repository`` at ``revision`` into ``cache``.

    ``tell`` hears the progress, from any thread; ``trust`` says what files may
    come besides data.
    """

    def __init__(
        self,
        repository: str,
        revision: str | None,
        cache: Path,
        tell: Callable[[Progress], None],
        trust: Trust = Trust(),  # noqa: B008 - a frozen value
    ) -> None:
        self._repository = repository
        self._revision = revision
        self._cache = cache
        self._shelf = Shelf(cache, repository, trust)
        self._trust = trust
        self._tell = tell

    def run(self) -> Resolution:
        """Download what is missing; ``FetchError`` with the sentence for the user."""
        self._tell(Progress("resolve"))
        cached = self._shelf.cached(self._revision)
        if cached is not None and (
            constants.HF_HUB_OFFLINE
            or (is_commit(self._revision) and self._shelf.is_verified(str(self._revision)))
        ):
            return cached
        if constants.HF_HUB_OFFLINE:
            raise offline(self._repository, self._revision)
        try:
            info = self._ask()
        except FetchError as error:
            # What a branch meant yesterday is better than not to serve at all.
            if cached is not None and temporary(error):
                return cached
            raise
        try:
            return self._fetch(info)
        except Exception as error:
            raise explain(error, self._repository, self._revision) from error

    def look(self) -> Resolution:
        """What weights there are to download, and their size; nothing is written.

        Which files an index of shards names isn't read: those that look so count.
        """
        if constants.HF_HUB_OFFLINE:
            raise offline(self._repository, self._revision)
        info = self._ask()
        listed = {file.rfilename: file for file in info.siblings or ()}

        def shards(index: str) -> bytes:
            stem, folder = index.partition(".")[0], index.rpartition("/")[0]
            shard = re.compile(re.escape(stem) + r"-\d+-of-\d+\.\w+")
            names = [name.removeprefix(f"{folder}/") for name in listed if shard.fullmatch(name)]
            return msgspec.json.encode({"weight_map": dict(zip(names, names, strict=True))})

        commit = str(info.sha)
        weights = select(self._repository, listed, shards, self._trust).weights
        try:
            size = sum(self._listed(commit, listed[name]).size for name in weights)
        except Exception as error:
            raise explain(error, self._repository, self._revision) from error
        return Resolution(folder=f"hub:{self._repository}", commit=commit, files=weights, size=size)

    def _ask(self) -> ModelInfo:
        token_file = os.environ.get("HF_TOKEN_PATH")
        # huggingface_hub would go on without a token and be told of a missing model.
        if token_file and not os.access(token_file, os.R_OK):
            raise TokenRefused(
                f"The token file {token_file} can't be read; correct token_file under [hub]."
            )
        try:
            info = HfApi().model_info(
                self._repository,
                revision=self._revision,
                files_metadata=True,
                timeout=_ASK_SECONDS,
            )
        # What isn't a hub answers with anything, which ModelInfo takes for its fields.
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            known = explain(error, self._repository, self._revision)
            if type(known) is not FetchError:
                raise known from error
            raise _no_hub() from error
        except Exception as error:
            raise explain(error, self._repository, self._revision) from error
        if not is_commit(info.sha):
            raise _no_hub()
        return info

    def _fetch(self, info: ModelInfo) -> Resolution:
        commit = str(info.sha)
        listed = {file.rfilename: file for file in info.siblings or ()}

        def read(name: str) -> bytes:
            if self._listed(commit, listed[name]).size > _MAX_INDEX:
                raise FetchError(f"{name} of {self._repository} is larger than any index.")
            return Path(self._get(commit, name)).read_bytes()

        self._cache.mkdir(parents=True, exist_ok=True)
        with self._shelf.in_use(lambda size: self._tell(Progress("download", float(size)))):
            file_download.http_get = resuming(_http_get)
            self._shelf.begin(commit)
            chosen = select(self._repository, listed, read, self._trust)
            files = [self._listed(commit, listed[name]) for name in chosen.names]
            sizes = {file.name: file.size for file in files}
            snapshot = self._shelf.snapshot(commit)
            missing = [file for file in files if not (snapshot / file.name).exists()]
            self._check_space(missing)
            meter = Meter(sum(sizes.values()), self._tell, time.monotonic)
            meter.add(sum(sizes.values()) - sum(file.size for file in missing))
            for names in (chosen.first, chosen.weights):
                self._get_all(commit, names, bar(meter))
            # Also what was there already: a kill may have come before it was verified.
            self._verify(commit, files, meter)
            self._shelf.remember(self._revision, commit)
        meter.finish()
        return self._shelf.resolution(commit, sizes)

    def _verify(self, commit: str, files: list[Listed], meter: Meter) -> None:
        """See that what has arrived is what the hub lists; what isn't gets one more try."""
        total = sum(file.size for file in files)
        # Large files take their time, in which nobody should think that it hangs.
        looked = Meter(total, self._tell, time.monotonic, "verify", quiet=True)
        wrong = self._shelf.damaged(commit, files, looked.add)
        if not wrong:
            return
        meter.add(-sum(file.size for file in files if file.name in wrong))
        self._get_all(commit, wrong, bar(meter))
        again = [file for file in files if file.name in wrong]
        wrong = self._shelf.damaged(commit, again, looked.add)
        for name, difference in wrong.items():
            raise FetchError(
                f"{name} of {self._repository} arrived twice with {difference}; "
                "it was removed, try again later."
            )

    def _listed(self, commit: str, file: RepoSibling) -> Listed:
        if file.size is not None:
            sha256 = file.lfs.sha256 if file.lfs else None
            return Listed(file.rfilename, file.size, sha256, file.blob_id)
        # A mirror may list names alone; huggingface_hub goes by the headers of each file.
        found = get_hf_file_metadata(
            hf_hub_url(self._repository, file.rfilename, revision=commit), timeout=_ASK_SECONDS
        )
        if found.size is None or found.etag is None:
            raise _no_hub()
        sha256 = found.etag if len(found.etag) == _SHA256_DIGITS else None
        return Listed(
            file.rfilename, found.size, sha256, found.etag if is_commit(found.etag) else None
        )

    def _check_space(self, files: Iterable[Listed]) -> None:
        needed = 0
        for file in files:
            # The name of a blob in the cache, by which revisions share content.
            blob = file.sha256 or file.blob
            if blob is None:
                needed += file.size
            elif not self._shelf.has_blob(blob):
                needed += max(0, file.size - self._shelf.kept(blob))
        free = shutil.disk_usage(self._cache).free
        if needed > free:
            raise DiskFull(
                f"{self._repository} needs {_readable(needed)} more on the disk of {self._cache}, "
                f"where {_readable(free)} are free."
            )

    def _get_all(self, commit: str, names: Iterable[str], tqdm_class: type[Any]) -> None:
        pool = ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="download")
        futures = [pool.submit(self._get, commit, name, tqdm_class) for name in names]
        # The first failure decides: the process ends with it, threads and all.
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False, cancel_futures=True)
        for future in done:
            future.result()

    def _get(self, commit: str, name: str, tqdm_class: type[Any] | None = None) -> str:
        return hf_hub_download(
            self._repository,
            name,
            revision=commit,
            cache_dir=self._cache,
            tqdm_class=tqdm_class,
        )


def _no_hub() -> HubUnreachable:
    return HubUnreachable(
        f"{constants.ENDPOINT} doesn't answer as a hub does; "
        "check endpoint under [hub] and the proxy settings."
    )


def _readable(size: int) -> str:
    """``size`` bytes for people."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
