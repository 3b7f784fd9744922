"""The result file: its structure and its name."""

import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from liquidfusion import files


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
    strategy = re.sub(r"[^A-Za-z0-9_.-]+", "-", strategy).strip("-.")
    return f"benchmark_results_{strategy}_{safe(model)}_{size}"


def safe(model: str) -> str:
    """Return a model's name as file names carry it."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-.") or "model"


def save(document: dict[str, Any], directory: Path) -> Path:
    """Write a result document into `directory` under its own name and return the path."""
    metadata = document["metadata"]
    size = size_label(metadata["cache_size"], metadata["budget"], metadata.get("memory"))
    path = directory / f"{file_stem(metadata['strategy'], metadata['model_name'], size)}_{stamp()}.json"
    files.write_text(path, to_json(document))
    return path


def stamp() -> str:
    """Return the time as file names carry it."""
    return f"{now():%Y%m%dT%H%M%S%f}"


def size_label(cache_size: float | None, budget: int | None, memory: int | None = None) -> str:
    """Return how a file name says the size: ``20`` (percent), ``512t`` (tokens), ``64MiB`` or ``default``."""
    if memory is not None:
        units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
        return next(f"{memory // size}{unit}" for size, unit in units if memory % size == 0)
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
