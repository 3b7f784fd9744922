"""The attention function and the mask function that transformers calls while a KVCache serves a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liquidfusion.compute.softmax import How
from liquidfusion.exceptions import UnsupportedError
from liquidfusion.geometry import foreign, is_latent
from liquidfusion.run.backend import Backend, running

IMPLEMENTATION = "liquidfusion"
REPLAYED = "liquidfusion_replayed"
"""The same for decode steps that are replayed: without a mask function, which would see another length in each."""


def register() -> None:
    """Make both known to transformers; registering twice is harmless."""
    for name in (IMPLEMENTATION, REPLAYED):
        ALL_ATTENTION_FUNCTIONS.register(name, attention_function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, mask_function)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend for one layer of the running call (transformers' attention interface).

    Parameters
    ----------
    query : Tensor
        `[batch, heads, columns, head_dim]`.
    key, value : Tensor
        New columns only, `[batch, kv_heads, columns, head_dim]`, rotary already applied.
    attention_mask : Tensor or None
        What `mask_function` made.

    Returns
    -------
    tuple
        Output `[batch, columns, heads, head_dim]` and None for the weights.

    Raises
    ------
    CacheError
        No call of a `KVCache` is running.
    UnsupportedError
        Dropout while training, attention to later tokens, or a mask or keyword that is not known.
    """
    backend = running()
    if dropout:
        raise UnsupportedError(f"attention dropout is {dropout}; a KVCache needs evaluation mode: call model.eval()")
    if unknown := foreign(name for name, value in others.items() if value is not None):
        raise UnsupportedError(f"{type(module).__name__} {unknown}, which a KVCache does not know")
    own = None if attention_mask is None else _own(module, backend, attention_mask)
    if own is None and query.shape[2] > 1 and not _causal(module, backend, others.get("is_causal")):
        raise UnsupportedError(f"{type(module).__name__} attends to later tokens too, and a KVCache attends causally")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # Inside torch.autocast rotary positions leave float32; transformers' own attention casts it, too.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if backend.reads and getattr(module, "layer_idx", None) in backend.reads:
        backend.take(module.layer_idx)  # type: ignore[arg-type]
    how = How(scale, sliding_window or 0, softcap or 0.0, s_aux, own=own)
    attend = _attend_latent if is_latent(module) else _attend
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return attend(module, backend, query, key, value, how).transpose(1, 2).contiguous(), None
    with torch.no_grad():
        output = attend(module, backend, query.detach(), key.detach(), value.detach(), how).transpose(1, 2).contiguous()
    if query.requires_grad or key.requires_grad or value.requires_grad:
        output = _Sealed.apply(output, query, key, value)
    return output, None


def _causal(module: nn.Module, backend: Backend, told: bool | None) -> bool:
    """Whether attention without a mask is causal: what the keyword says, or a mask that positions tell, or the module.

    Transformers' own attention functions read keyword and module likewise.
    """
    return bool(backend.windows or getattr(module, "is_causal", True)) if told is None else told


def _attend(_: nn.Module, backend: Backend, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
    return backend.attend(query, key, value, how)


def _attend_latent(module: Any, backend: Backend, query: Tensor, _: Tensor, value: Tensor, how: How) -> Tensor:
    """Attend over latents, which all heads share: the query is taken to where they are, and the output back.

    Keys and values expanded from the latents are those of the call's own columns, and unused.
    """
    assert backend.handed is not None  # every such module hands its latent to its cache
    latent, rotary = (states.detach().to(value.dtype) for states in backend.handed)
    nope, rank = int(module.qk_nope_head_dim), latent.shape[-1]
    heads = query.shape[1]
    up = _expansion(module.kv_b_proj, latent).view(heads, -1, rank)
    key = torch.cat((latent, rotary), -1)
    # By einsum, which multiplies all rows at once: a product that broadcasts would copy the matrices for each row.
    taken = torch.cat((torch.einsum("bhcd,hdr->bhcr", query[..., :nope], up[:, :nope]), query[..., nope:]), -1)
    return torch.einsum("bhcr,hdr->bhcd", backend.attend(taken, key, key[..., :rank], how), up[:, nope:])


def _expansion(projection: nn.Module, latent: Tensor) -> Tensor:
    """Matrix of a projection from latents, `[outputs, rank]`: its weight, or what it makes of each latent alone."""
    weight = getattr(projection, "weight", None)
    if type(projection) is nn.Linear and isinstance(weight, Tensor) and weight.dtype == latent.dtype:
        return weight
    matrix: Tensor = projection(torch.eye(latent.shape[-1], dtype=latent.dtype, device=latent.device)).T
    return matrix


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """Learn which tokens a model wants its layers to see (transformers' mask interface).

    Causal attention, windows and chunks need no mask: visibility comes from positions. Anything else is made into one
    as for any model, and reaches the attention function again.

    Returns
    -------
    Tensor or None
        None for what positions tell, else bool `[batch, 1, columns, columns]` for the call's own columns.

    Raises
    ------
    UnsupportedError
        It hides earlier tokens in a way that is not known.
    """
    backend = running()
    pattern, rest = _pattern(mask_function)
    if pattern is not None:
        backend.windows.add(pattern)
        if not rest or q_length == 1:  # a token alone has no others in its call
            return None
    others |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense: Any = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask=attention_mask, **others
    )
    own: Tensor = dense[..., -q_length:]
    if pattern is None:
        backend.every_call = True
        earlier = dense[:, 0, :, : kv_length - q_length]
        if attention_mask is not None:
            real = attention_mask.bool()
            earlier = earlier | ~real[:, None, : earlier.shape[-1]] | ~real[:, -q_length:, None]
        if not bool(earlier.all()):
            raise UnsupportedError("the model's mask hides earlier tokens in a way that a KVCache does not know")
        if q_length == 1:
            return None
    backend.masks.append((own, own._version))
    return own


def _own(module: nn.Module, backend: Backend, mask: Tensor) -> Tensor:
    """The call's own columns `[batch, queries, columns]` of a mask that came from `mask_function`."""
    # Some models cut rows off it where they need the last columns only.
    made = {one.untyped_storage().data_ptr(): (one, version) for one, version in backend.masks}
    one, version = made.get(mask.untyped_storage().data_ptr(), (None, 0))
    if one is not None and one._version == version and mask.shape[1] == 1:
        return mask[:, 0]
    raise UnsupportedError(
        f"{type(module).__name__} hands its attention a mask of its own {list(mask.shape)}, which a KVCache does not "
        "know"
    )


def _pattern(function: Callable[..., Any]) -> tuple[tuple[int, bool] | None, bool]:
    """The window that a mask function keeps to, in tokens (0: none) and whether it is a chunk; None if that is unknown.

    The second value tells whether there is more to the function than this.
    """
    if function is causal_mask_function:
        return (0, False), False
    parts = _cell(function, "mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None, True
    name = getattr(function, "__qualname__", "")
    if name.startswith("or_masks"):  # more is visible than the first part tells
        return _pattern(parts[0])[0], True
    if not name.startswith("and_masks"):
        return None, True
    sizes = [_size(part) for part in parts]
    for size, other in zip(sizes, reversed(parts), strict=True):
        pattern, rest = _pattern(other)
        if size is not None and pattern == (0, False):
            return size, rest
    return None, True


def _size(function: Callable[..., Any]) -> tuple[int, bool] | None:
    """The window or chunk that one of transformers' overlays cuts out, in tokens and whether it is a chunk."""
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    for maker, cell, chunked in (
        ("sliding_window_overlay.", "sliding_window", False),
        ("chunked_overlay.", "chunk_size", True),
    ):
        if module == causal_mask_function.__module__ and name.startswith(maker):
            size = _cell(function, cell)
            return (size, chunked) if isinstance(size, int) else None
    return None


def _cell(function: Callable[..., Any], name: str) -> Any:
    """What a closure holds under a name, if anything."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    names = () if code is None else code.co_freevars
    return next((cell.cell_contents for free, cell in zip(names, cells, strict=True) if free == name), None)


class _Sealed(Function):
    """Attention whose gradient would be wrong: what is stored has none, and scores are counted in place."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *_: Tensor) -> Tensor:  # noqa: ARG004 - torch's interface
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # noqa: ARG004
        raise UnsupportedError("gradients do not flow through a KVCache: train without one (use_cache=False)")
