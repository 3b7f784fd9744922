"""The result file: its structure, its name, and writing it so that a torn file never exists."""

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path`: whole, or not at all.

    The text goes to a temporary file in the same directory, is flushed to the disk, and then takes the name at once.

    Raises
    ------
    OSError
        The directory cannot be written or the disk is full; `path` is then as it was. The error names `path`.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors of the system name what the user asked for, not a temporary file or nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_json(document: object) -> str:
    """Return `document` as strict JSON: numbers that JSON does not know (NaN, infinities) become null, paths text."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def file_stem(strategy: str, model: str, size: str) -> str:
    """Return ``benchmark_results_{strategy}_{model}_{cache_size}``, safe on every file system."""
    return f"benchmark_results_{strategy}_{safe(model)}_{size}"


def safe(model: str) -> str:
    """Return a model's name as file names carry it."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-.") or "model"


def save(document: dict[str, Any], directory: Path) -> Path:
    """Write a result document into `directory` under its own name and return the path."""
    metadata = document["metadata"]
    size = size_label(metadata["cache_size"], metadata["budget"])
    path = directory / f"{file_stem(metadata['strategy'], metadata['model_name'], size)}_{stamp()}.json"
    write_atomic(path, to_json(document))
    return path


def stamp() -> str:
    """Return the time as file names carry it."""
    return f"{now():%Y%m%dT%H%M%S%f}"


def size_label(cache_size: float | None, budget: int | None) -> str:
    """Return how a file name says the size: ``20`` (percent), ``512t`` (tokens) or ``default``."""
    if cache_size is not None:
        return f"{cache_size:g}"
    return "default" if budget is None else f"{budget}t"


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


def load(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises
    ------
    ValueError
        The file is not a result of this program.
    """
    try:
        document = json.loads(path.read_text(encoding="utf8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or not {"metadata", "results", "metrics"} <= document.keys():
        raise ValueError(f"{path} is not a benchmark result: it needs metadata, results and metrics")
    return document


def check_writable(directory: Path) -> None:
    """Make sure, before any work, that results can be written into `directory`.

    Raises
    ------
    OSError
        They cannot.
    """
    with _naming(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
