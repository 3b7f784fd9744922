"""The attention function that transformers' attention layers call while a KVCache serves their model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liquidfusion.compute.softmax import How
from liquidfusion.exceptions import UnsupportedError
from liquidfusion.run.backend import running

IMPLEMENTATION = "liquidfusion"


def register() -> None:
    """Make `"liquidfusion"` known to transformers; registering twice is harmless."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_function)


def attention_function(
    module: nn.Module,  # noqa: ARG001 - part of the interface
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the cache keeps its own mask: positions
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend for one layer of the running call (transformers' attention interface).

    Parameters
    ----------
    query : Tensor
        `[batch, heads, columns, head_dim]`.
    key, value : Tensor
        New columns only, `[batch, kv_heads, columns, head_dim]`, rotary already applied.

    Returns
    -------
    tuple
        Output `[batch, columns, heads, head_dim]` and None for the weights.

    Raises
    ------
    CacheError
        No call of a `KVCache` is running.
    UnsupportedError
        Dropout while training.
    """
    backend = running()
    if dropout:
        raise UnsupportedError(f"attention dropout is {dropout}; a KVCache needs evaluation mode: call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # Inside torch.autocast rotary positions leave float32; transformers' own attention casts it, too.
    query, key = query.to(value.dtype), key.to(value.dtype)
    output = backend.attend(query, key, value, How(scale, sliding_window or 0, softcap or 0.0, s_aux))
    return output.transpose(1, 2), None
