"""Finds a model's files by name: a directory, an embedded model or a Hugging Face hub id.

Both services, the offline API and the CLI resolve names here, so all of them see the same files.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nanovllm.embedded.catalogue import EMBEDDED_MODELS, EmbeddedModel, find_embedded
from nanovllm.embedded.convert import MissingGgufError, convert_gguf
from nanovllm.embedded.fetch import FetchError, fetch_gguf

logger = logging.getLogger(__name__)

#: Name of the folder that holds converted models; grows when the conversion changes its output.
CONVERSION = "embedded-v1"
#: Files of a hub repository that this product reads, beside the weights.
METADATA_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")
WEIGHTS_PATTERN = "*.safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelNotFoundError(ValueError):
    """No model of that name could be found or fetched; the message says what was tried."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """An embedded model and where it is."""

    name: str
    path: Path
    #: Whether `path` exists already.
    cached: bool
    #: Bytes on disk, or what they will be after fetching.
    size_bytes: int
    #: Bytes to download when it is not cached.
    download_bytes: int
    license: str


def resolve_model(name: str, *, weights: bool = True) -> Path:
    """Returns the directory with a model's files, fetching them if need be.

    Args:
        name: A directory, the name of an embedded model (in any case), or a hub id. An existing
            directory wins; what looks like a path is never looked up elsewhere.
        weights: Whether the weights are needed; without, only the small files are fetched from the
            hub.

    Raises:
        ModelNotFoundError: There is no such model, or it could not be fetched.
    """
    if not name:
        raise ModelNotFoundError(
            f"the model's name is empty; give a directory, one of {_embedded_names()}, or a "
            "Hugging Face hub id"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_directory(path, weights=weights)
    if path.is_file():
        raise ModelNotFoundError(
            f"{name} is a file; give the directory with the model's config.json"
        )
    if name[0] in "/.~" or name.endswith("/"):
        raise ModelNotFoundError(
            f"the directory {name!r} does not exist; give a model directory, one of "
            f"{_embedded_names()}, or a Hugging Face hub id"
        )
    embedded = find_embedded(name)
    if embedded is not None:
        return _ensure_converted(embedded)
    return _resolve_hub_id(name, weights=weights)


def model_name(name_or_path: str) -> str:
    """Returns what a model is called in metrics and answers.

    That is the hub id or the embedded model's name as given, or the last part of a directory.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path.resolve().name
    embedded = find_embedded(name_or_path)
    return embedded.name if embedded is not None else name_or_path


def fingerprint(directory: Path) -> str:
    """Returns SHA-256 (hex) over a model's config.json and tokenizer.json.

    Two services with the same fingerprint agree on vocabulary and architecture. The formatting of
    config.json does not matter, and a directory without the weights gives the same result.

    Raises:
        ModelNotFoundError: config.json is missing or no JSON.
    """
    config_path = directory / "config.json"
    try:
        config = json.loads(config_path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelNotFoundError(f"{config_path} cannot be read: {error}") from error
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    tokenizer_path = directory / "tokenizer.json"
    tokenizer = tokenizer_path.read_bytes() if tokenizer_path.is_file() else b""
    digest = hashlib.sha256()
    for part in (canonical, tokenizer):
        # The length keeps a byte from moving between the parts unnoticed.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Returns the folder for converted models.

    $NANOVLLM_CACHE, else $XDG_CACHE_HOME/nanovllm, else ~/.cache/nanovllm.
    """
    if own := os.environ.get("NANOVLLM_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "nanovllm"


def list_models() -> list[StoredModel]:
    """Returns the embedded models with what is in the cache."""
    models = []
    for model in EMBEDDED_MODELS:
        path = _converted_path(model)
        cached = path.is_dir()
        size = sum(file.stat().st_size for file in path.iterdir()) if cached else None
        models.append(
            StoredModel(
                name=model.name,
                path=path,
                cached=cached,
                size_bytes=model.converted_bytes if size is None else size,
                download_bytes=model.download_bytes,
                license=model.license,
            )
        )
    return models


def _checked_directory(path: Path, *, weights: bool) -> Path:
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"the directory {path} holds no config.json, so it is no model")
    if weights and not any(path.glob(WEIGHTS_PATTERN)):
        raise ModelNotFoundError(
            f"the directory {path} holds no *.safetensors file; other weight formats are not "
            "supported"
        )
    return path


def _resolve_hub_id(name: str, *, weights: bool) -> Path:
    if HUB_ID.fullmatch(name) is None:
        raise ModelNotFoundError(
            f"{name!r} is neither a directory, nor one of {_embedded_names()}, nor a hub id such "
            "as Qwen/Qwen3-0.6B"
        )
    # Half a second that local and embedded models do not need.
    from huggingface_hub import snapshot_download

    patterns = [*METADATA_PATTERNS, *([WEIGHTS_PATTERN] if weights else [])]
    try:
        path = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelNotFoundError(
            f"{name!r} is neither a directory nor one of {_embedded_names()}, and could not be "
            f"fetched from the Hugging Face hub: {reason}"
        ) from error
    try:
        return _checked_directory(path, weights=weights)
    except ModelNotFoundError as error:
        # Offline, the client returns whatever part of the repository is in its cache.
        raise ModelNotFoundError(
            f"{name!r} from the Hugging Face hub is incomplete: {error}"
        ) from error


def _ensure_converted(model: EmbeddedModel) -> Path:
    path = _converted_path(model)
    if path.is_dir():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Scheduler and executor start together; the second waits here for the first one's work.
        with _file_lock(path.with_name(f"{path.name}.lock")):
            if not path.is_dir():
                _convert_into(model, path)
    except (FetchError, MissingGgufError, OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"the embedded model {model.name} could not be prepared in {path.parent}: {error}"
        ) from error
    return path


def _convert_into(model: EmbeddedModel, path: Path) -> None:
    logger.info("fetching and converting %s into %s", model.name, path)
    # A fixed name: what an interrupted run left is removed by the next one, under the lock.
    work = path.with_name(f"{path.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    download = work / "download"
    converted = work / path.name
    download.mkdir(parents=True)
    converted.mkdir()
    try:
        convert_gguf(fetch_gguf(model, download), converted)
        # The directory appears whole or not at all.
        converted.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock; the kernel drops it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _converted_path(model: EmbeddedModel) -> Path:
    return cache_folder() / CONVERSION / model.name


def _embedded_names() -> str:
    return ", ".join(model.name for model in EMBEDDED_MODELS)
