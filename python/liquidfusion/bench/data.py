"""Optional packages and the data sets that need them."""

import importlib
from itertools import islice
from typing import Any

from liquidfusion.exceptions import ConfigError


def require(module: str, package: str) -> Any:
    """Import an optional module.

    Raises
    ------
    ConfigError
        It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"the package {package} is needed for this: pip install {package}") from error


def load_dataset(hub_id: str, name: str | None, split: str, limit: int) -> list[dict[str, Any]]:
    """Return the first `limit` rows of a data set of the hub, streamed.

    Raises
    ------
    ConfigError
        The package ``datasets`` is missing, or the data set cannot be read.
    """
    datasets = require("datasets", "datasets")
    try:
        rows = datasets.load_dataset(hub_id, name, split=split, streaming=True)
        return [dict(row) for row in islice(rows, limit)]
    except Exception as error:  # datasets raises whatever its readers and the network raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"data set {hub_id} cannot be read ({reason}); offline, give a .jsonl file") from error
