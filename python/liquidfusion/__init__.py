"""LiquidFusion: a KV cache with a hard memory bound for Hugging Face language models."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from liquidfusion._core import __version__, strategies
from liquidfusion.exceptions import (
    CacheError,
    ConfigError,
    LiquidFusionError,
    QueueFull,
    ScoreError,
    TensorError,
    UnsupportedError,
)
from liquidfusion.options import Strategy

__all__ = [
    "CacheError",
    "ConfigError",
    "Engine",
    "KVCache",
    "LiquidFusionError",
    "QueueFull",
    "Sampling",
    "ScoreError",
    "Strategy",
    "TensorError",
    "UnsupportedError",
    "__version__",
    "cache_keyword",
    "strategies",
    "uninstall",
    "use",
]

if TYPE_CHECKING:
    from liquidfusion.hf.cache import KVCache
    from liquidfusion.hf.engine import Engine
    from liquidfusion.hf.hook import cache_keyword, uninstall
    from liquidfusion.hf.use import use
    from liquidfusion.run.sampling import Sampling
else:
    # torch and transformers take seconds to import: the command line's --help must not wait for them.
    _LAZY = {
        "Engine": "hf.engine",
        "KVCache": "hf.cache",
        "Sampling": "run.sampling",
        "cache_keyword": "hf.hook",
        "uninstall": "hf.hook",
        "use": "hf.use",
    }

    def __getattr__(name):
        """Import what needs torch when it is first asked for."""
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(_import_module(f"{__name__}.{_LAZY[name]}"), name)
        return value

    def __dir__():
        """What is meant for users."""
        return list(__all__)
