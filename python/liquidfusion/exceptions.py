"""Every error LiquidFusion raises on purpose; the Rust core raises these same classes."""


class LiquidFusionError(Exception):
    """Base of all errors below."""


class ConfigError(LiquidFusionError, ValueError):
    """A parameter is out of range, contradicts another or is unknown."""


class TensorError(LiquidFusionError, TypeError):
    """A tensor has the wrong device, dtype, rank, shape or layout, or is read-only."""


class ScoreError(LiquidFusionError, ValueError):
    """Attention scores are NaN, infinite or negative; nothing was written."""


class CacheError(LiquidFusionError, RuntimeError):
    """The cache cannot serve this call: it is stale, unusable after a failed call, or was called out of order."""


class UnsupportedError(LiquidFusionError, NotImplementedError):
    """The model architecture or the requested feature cannot work with a bounded cache."""


class QueueFull(LiquidFusionError, RuntimeError):  # noqa: N818 - what happened, as queue.Full says it
    """As many requests wait as may: try again later."""
