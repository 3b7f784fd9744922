"""LiquidFusion: a KV cache with a hard memory bound for Hugging Face language models."""

from importlib.metadata import version as _version

from liquidfusion._core import strategies
from liquidfusion.cache import KVCache
from liquidfusion.exceptions import (
    CacheError,
    ConfigError,
    LiquidFusionError,
    ScoreError,
    TensorError,
    UnsupportedError,
)
from liquidfusion.install import uninstall
from liquidfusion.use import use

__version__ = _version("liquidfusion")

__all__ = [
    "CacheError",
    "ConfigError",
    "KVCache",
    "LiquidFusionError",
    "ScoreError",
    "TensorError",
    "UnsupportedError",
    "__version__",
    "strategies",
    "uninstall",
    "use",
]
