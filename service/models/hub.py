"""The model hub: whether it answers and has a model, and a snapshot of the files that a judge needs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from client.transport.proxies import ProxySettingError, exempt_loopback, proxy_of, url_of
from service.models.digests import digests_of
from service.models.manifest import ModelError
from service.models.progress import Stages

DEFAULT_ENDPOINT = "https://huggingface.co"
# Only safetensors, because unpickling weights can run code.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
# Sub-folders hold other formats; `consolidated` files hold the same weights again.
NOT_PATTERNS = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PROBE_TIMEOUT = httpx.Timeout(10.0, connect=3.0)


class HubError(ModelError):
    """The hub does not provide the model. The message is only the reason."""


def is_hub_id(name: str) -> bool:
    """Whether it has the form `org/name` or `org/name@revision`."""
    return _HUB_ID.fullmatch(name) is not None


def endpoint() -> str:
    """The hub's URL: HF_ENDPOINT, or the public hub."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def fetch_snapshot(name: str, *, progress: bool) -> Path:
    """The folder of the model's files, from the hub or, if the hub is unreachable, from the hub's cache.

    A short request checks first that the hub answers and has the model, so an unreachable hub costs only seconds. A
    damaged file in the cache is downloaded once more. Raises HubError with the reason.
    """
    exempt_loopback()  # for huggingface_hub
    try:
        url_of(endpoint())  # before huggingface_hub is imported, because that crashes on an invalid port
        _probe_hub(name)
    except httpx.InvalidURL as exc:
        raise HubError(f"HF_ENDPOINT is no URL ({exc})") from exc
    except _HubUnreachableError as exc:
        cached = cached_snapshot(name)
        if cached is None:
            raise HubError(f"{exc}, and the hub's cache does not hold it") from exc
        damaged = damaged_files(cached)
        if damaged:
            raise HubError(f"{exc}, and in the hub's cache {_names(damaged)} is damaged: delete it") from exc
        return cached
    folder = _download_snapshot(name, progress=progress)
    damaged = damaged_files(folder)
    return _download_again(name, damaged, progress=progress) if damaged else folder


def _download_again(name: str, damaged: Sequence[Path], *, progress: bool) -> Path:
    Stages().say(f"{name}: {_names(damaged)} in the hub's cache is damaged; downloading it again")
    try:
        for path in damaged:
            path.resolve().unlink(missing_ok=True)  # the blob may be gone already: equal files share one
            path.unlink(missing_ok=True)
    except OSError as exc:
        raise HubError(f"{exc.filename} in the hub's cache is damaged and cannot be deleted ({exc.strerror})") from exc
    folder = _download_snapshot(name, progress=progress)
    # Only the weights: a mirror may name the blobs of small files by something other than their digest.
    still = [path for path in damaged_files(folder) if path.suffix == ".safetensors"]
    if still:
        raise HubError(f"{_names(still)} is not what the hub says it is, downloaded twice")
    return folder


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def cached_snapshot(name: str) -> Path | None:
    """The folder of the model's files if the hub's cache holds them all. Does not use the network."""
    try:
        folder = _snapshot(name, local_files_only=True)
    except (OSError, ValueError):  # missing, incomplete, or not an id that huggingface_hub accepts
        return None
    return folder if has_weights(folder) else None


def _snapshot(name: str, **where: Any) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    folder: str = snapshot_download(
        repo, revision=revision or None, allow_patterns=PATTERNS, ignore_patterns=NOT_PATTERNS, **where
    )
    return Path(folder)


def has_weights(folder: Path) -> bool:
    """Whether the folder has a configuration and safetensors: all files of the index, or any if there is no index."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return all((folder / shard).is_file() for shard in shards)


def damaged_files(folder: Path) -> list[Path]:
    """The files of a snapshot whose content does not match the name of their blob in the hub's cache.

    The name is the SHA-256 of a large file and git's SHA-1 (on some mirrors a plain SHA-1) of a small one. Blobs with
    other names cannot be checked.
    """
    blobs = {path: path.resolve() for path in sorted(folder.iterdir()) if path.is_symlink() and path.is_file()}
    large = {path: blob for path, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", blob.name)}
    small = {path: blob for path, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{40}", blob.name)}
    digests = zip(large, digests_of(large.values()), strict=True)
    wrong = [path for path, digest in digests if digest != large[path].name]
    return wrong + [path for path, blob in small.items() if blob.name not in _sha1s(blob.read_bytes())]


def _sha1s(content: bytes) -> set[str]:
    heads = (b"", b"blob %d\0" % len(content))
    return {hashlib.sha1(head + content, usedforsecurity=False).hexdigest() for head in heads}


class _HubUnreachableError(Exception):
    """The hub gave no answer that says anything about the model."""


def _probe_hub(name: str) -> None:
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise _HubUnreachableError("not asked, because HF_HUB_OFFLINE is set")
    repo, _, revision = name.partition("@")
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{endpoint()}/api/models/{repo}/revision/{(revision or 'main').replace('/', '%2F')}"
    via = ""
    try:
        proxy = proxy_of(url)
        via = f", asked through {proxy}" if proxy else ""
        with httpx.Client(transport=httpx.HTTPTransport(proxy=proxy.address if proxy else None)) as http:
            answer = http.get(url, headers=headers, timeout=_PROBE_TIMEOUT, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL, ProxySettingError) as exc:
        raise _HubUnreachableError(f"not reachable at {endpoint()}{via} ({str(exc) or type(exc).__name__})") from exc
    if answer.status_code >= 500 or answer.status_code in {407, 429}:
        raise _HubUnreachableError(f"{endpoint()} answers {answer.status_code}")
    if answer.is_error:
        raise HubError(_refusal_reason(answer))


def _refusal_reason(answer: httpx.Response) -> str:
    code = answer.headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        return "the model is gated: accept its terms on its page and set HF_TOKEN"
    if code == "RevisionNotFound":
        return "the hub has the model, but not this revision"
    if code == "RepoNotFound" or answer.status_code in {401, 404}:
        # The hub answers 401 for a model that does not exist, to hide which private ones do.
        return "the hub has no such model, or it is private and HF_TOKEN does not open it"
    return f"{endpoint()} answers {answer.status_code}"


def _download_snapshot(name: str, *, progress: bool) -> Path:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = not progress and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        folder = _snapshot(name, endpoint=endpoint())
    except Exception as exc:  # any: which HTTP library's errors it raises depends on huggingface_hub's version
        raise HubError(f"the download failed ({' '.join(str(exc).split()) or type(exc).__name__})") from exc
    finally:
        if silence:
            enable_progress_bars()
    if not has_weights(folder) and not damaged_files(folder):
        raise HubError("the model has no weights as safetensors there, and pickled weights are not accepted")
    return folder
