"""What a model's layers look like, read in one place: `Geometry.of(model)`, the only reader of a configuration.

A model that cannot be served is refused here, before any work, with the reason that is true of it and what to do
instead. What a layer is comes from its own attention module where that tells it: configurations name heads in many
ways, but transformers' attention functions are called with `heads / num_key_value_groups` key/value heads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from types import CodeType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from liquidfusion.exceptions import UnsupportedError

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The registry through which an attention module calls the function that attends for it."""

INSTEAD = "call the model with transformers' own cache (DynamicCache) instead"


class Kind(StrEnum):
    """How a layer keeps what it has seen."""

    FULL = "full"
    """Attends to every token: slots."""
    WINDOW = "window"
    """Attends to its latest `window` tokens: slots."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    `kind`: see `Kind`. `window`: sliding window in tokens, 0 for none. `kv_heads`: key/value heads that this process
    attends with. `key_dim`, `value_dim`: elements of a key and of a value of one head. `source`: the layer whose slots
    it reads, its own index unless it shares another's. `rope`: prefix of its rotary frequencies where layers of several
    kinds have their own, else None.
    """

    kind: Kind
    window: int
    kv_heads: int
    key_dim: int
    value_dim: int
    source: int
    rope: str | None = None


@dataclass(frozen=True)
class Geometry:
    """Facts of a model that a KVCache depends on; equal for equal models.

    `architecture`: the class. `layers`: of the decoder, in order. `vocabulary`: tokens. `positions`: the
    `max_position_embeddings` the model knows, 0 if it says none. `softcap`: of the attention logits, 0 for none.
    `dtype`: of the weights. `processes`: that share the heads, with tensor parallelism.
    """

    architecture: str
    layers: tuple[Layer, ...]
    vocabulary: int
    positions: int
    softcap: float
    dtype: str
    processes: int = 1

    @classmethod
    def of(cls, model: PreTrainedModel) -> Geometry:
        """Read a model, or refuse it.

        Raises
        ------
        UnsupportedError
            Names the architecture, what stands in the way, and what to do instead.
        """
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedError(
                f"model is a {type(model).__name__}; a transformers causal language model is accepted"
            )
        config = decoder_config(model)
        modules = attention_modules(model, config)
        _check(model, config, modules)
        return cls(
            architecture=type(model).__name__,
            layers=_layers(model, config, modules),
            vocabulary=int(getattr(config, "vocab_size", 0) or 0),
            positions=int(getattr(config, "max_position_embeddings", 0) or 0),
            softcap=float(getattr(config, "attn_logit_softcapping", 0) or 0),
            dtype=str(model.dtype).removeprefix("torch."),
            processes=int(getattr(model, "_tp_size", None) or 1),
        )

    @property
    def windows(self) -> tuple[int, ...]:
        """Sliding window of every layer in tokens, 0 for none."""
        return tuple(layer.window for layer in self.layers)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep keys and values of their own in slots."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.source == i)


def decoder_config(model: PreTrainedModel) -> Any:
    """Configuration of the decoder that the cache serves; which attention runs is a setting of it."""
    return model.config.get_text_config(decoder=True)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Configurations that the decoder's attention layers read: one object as a rule, more in models put together."""
    config = decoder_config(model)
    found = {id(config): config}
    for module in attention_modules(model, config).values():
        own = getattr(module, "config", config)
        found[id(own)] = own
    return list(found.values())


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each layer's weights are now, and so its slots; the model's own device where that is unknown."""
    devices = [model.device] * int(decoder_config(model).num_hidden_layers)
    for module in model.modules():
        # Quantised layers may keep everything in buffers.
        weight = next(chain(module.parameters(), module.buffers()), None)
        index = getattr(module, "layer_idx", None)
        if index is not None and weight is not None and weight.device.type != "meta":
            devices[index] = weight.device
    return devices


def attention_modules(model: PreTrainedModel, config: Any) -> dict[int, nn.Module]:
    """The decoder's modules that attend through transformers' interface, by the index of their layer."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        # Encoders of images and sound number their layers too, and have configurations of their own.
        if isinstance(index, int) and interface_names(module) and _is_decoder(module, config):
            found.setdefault(index, module)
    return found


def interface_names(module: nn.Module) -> frozenset[str]:
    """Names that a module's code mentions if it attends through transformers' interface, none if it does not.

    Among them are the keywords it passes to the attention function. Read from the compiled code: what a class is
    called or claims proves nothing.
    """
    kind: Any = type(module)
    return _class_names(kind)


@functools.cache
def _class_names(kind: type) -> frozenset[str]:
    names: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for function in vars(base).values():
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is not None and INTERFACE in code.co_names:
                names.update(_names(code))
    return frozenset(names)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (name for name in constant if isinstance(name, str))


def _is_decoder(module: nn.Module, config: Any) -> bool:
    return isinstance(getattr(module, "config", config), type(config))


# Keywords of transformers' attention interface that change what attention is, and what each of them does.
_FOREIGN = {
    "s_aux": "gives its attention sinks that the model has learnt (s_aux)",
    "sinks": "gives its attention sinks that the model has learnt (sinks)",
    "position_bias": "adds a learnt bias to its attention by relative position (position_bias)",
    "indices": "attends to tokens that an index of its own picks (indices)",
    "block_indices": "attends to blocks that an index of its own picks (block_indices)",
}

# What the code of a model does beyond its configuration and its modules, by the configuration's model_type.
_WAYS_OF_THEIR_OWN = {
    "doge": "adds a learnt term to its attention mask that depends on every stored value",
    "diffllama": "attends twice per layer, to two halves of the values",
    "moshi": "hands its window to attention as a mask only",
    "mllama_text_model": "has cross-attention layers that attend to an image",
}

_KINDS = {"full_attention": Kind.FULL, "sliding_attention": Kind.WINDOW}


def _check(model: PreTrainedModel, config: Any, modules: dict[int, nn.Module]) -> None:
    """Refuse what cannot be served, the plainest reason first."""
    name, own = type(model).__name__, getattr(config, "model_type", "")

    def refuse(reason: str) -> UnsupportedError:
        return UnsupportedError(f"{name} {reason}; {INSTEAD}")

    if model.config.is_encoder_decoder:
        raise refuse("is an encoder-decoder model, and a KVCache serves decoder-only language models")
    if getattr(config, "add_cross_attention", False):
        raise refuse("has cross-attention, and a KVCache serves decoder-only language models")
    if not modules:
        if getattr(model, "_is_stateful", False):
            raise UnsupportedError(
                f"{name} keeps a recurrent state of one size and no keys: it has no attention to bound, and needs no "
                "KVCache"
            )
        raise refuse(
            "computes attention in code of its own and not through transformers' attention interface "
            f"({INTERFACE}), so its keys and probabilities cannot be reached"
        )
    if getattr(config, "kv_lora_rank", None):
        raise refuse(
            "uses multi-head latent attention (MLA): it expands the keys of all heads from one latent per token, which "
            "slots cannot hold"
        )
    types = set(getattr(config, "layer_types", None) or ())
    if other := sorted(types - set(_KINDS)):
        raise refuse(f"has layers of type {other}, and slots hold the keys of {sorted(_KINDS)}")
    if own in _WAYS_OF_THEIR_OWN:
        raise refuse(_WAYS_OF_THEIR_OWN[own])
    for module in modules.values():
        if foreign := sorted(set(_FOREIGN) & interface_names(module)):
            raise refuse(_FOREIGN[foreign[0]])
        if not getattr(module, "is_causal", True):
            raise refuse(f"attends to later tokens too ({type(module).__name__}.is_causal is False)")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise refuse("attends to later tokens too (its configuration asks for bidirectional attention)")
    if any(getattr(module, "is_kv_shared_layer", False) for module in modules.values()):
        raise refuse("has layers that read the keys of an earlier layer")
    if len({_kv_heads(module, config, 1) for module in modules.values()}) > 1:
        raise refuse("has another number of key/value heads in some layers than in others")
    if getattr(config, "alibi", False):
        raise refuse("adds ALiBi's bias to its attention")
    if not getattr(model, "_supports_attention_backend", False):
        raise refuse("does not say that other attention functions may serve it (_supports_attention_backend)")
    missing = sorted(set(range(int(config.num_hidden_layers))) - set(modules))
    if missing:
        raise refuse(f"has layers that do not attend through transformers' attention interface ({missing})")


def _layers(model: PreTrainedModel, config: Any, modules: dict[int, nn.Module]) -> tuple[Layer, ...]:
    processes = getattr(model, "_tp_size", None) or 1
    window = getattr(config, "sliding_window", None) or 0
    types = getattr(config, "layer_types", None)
    rope = getattr(_rotary(model), "rope_type", None)
    layers = []
    for index in range(int(config.num_hidden_layers)):
        module = modules[index]
        slides = types is None or types[index] == "sliding_attention"
        width = _key_dim(module, config)
        layers.append(
            Layer(
                kind=Kind.WINDOW if window and slides else Kind.FULL,
                window=window if slides else 0,
                kv_heads=_kv_heads(module, config, processes),
                key_dim=width,
                value_dim=int(getattr(module, "v_head_dim", 0) or width),
                source=index,
                rope=types[index] if types and isinstance(rope, dict) else None,
            )
        )
    return tuple(layers)


def _rotary(model: PreTrainedModel) -> nn.Module | None:
    return next((module for path, module in model.named_modules() if path.endswith("rotary_emb")), None)


def _kv_heads(module: nn.Module, config: Any, processes: int) -> int:
    heads = int(config.num_attention_heads)
    groups = getattr(module, "num_key_value_groups", None)
    if groups is None:
        return int(getattr(config, "num_key_value_heads", None) or heads) // processes
    return heads // int(groups) // processes


def _key_dim(module: nn.Module, config: Any) -> int:
    told = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    return int(told or config.hidden_size // config.num_attention_heads)
