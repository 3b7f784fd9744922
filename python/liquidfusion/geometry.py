"""What a model's layers look like, read in one place: `Geometry.of(model)`, the only reader of a configuration.

A model that cannot be served is refused here, before any work, with the reason that is true of it and what to do
instead. What a layer is comes from its own attention module where that tells it: configurations name heads in many
ways, but transformers' attention functions are called with `heads / num_key_value_groups` key/value heads.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """How a layer attends, and so what it keeps in slots."""

    FULL = "full"
    """To every token."""
    WINDOW = "window"
    """To its latest `window` tokens."""
    CHUNKED = "chunked"
    """To the tokens since the last multiple of `window` tokens."""
    NONE = "none"
    """Not at all."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    `kind`: see `Kind`. `window`: tokens of a sliding window or of a chunk, 0 for neither. `kv_heads`: key/value heads
    that this process attends with. `key_dim`, `value_dim`: elements of a key and of a value of one head. `source`: the
    layer whose slots it reads, its own index unless it shares another's. `latent`: where all heads share one latent per
    token (multi-head latent attention), its elements: keys are that and the rotary key, values the latent. `state`:
    whether it keeps a recurrent or convolution state, in a cache layer of transformers' own. `rope`: prefix of its
    rotary frequencies where layers of several kinds have their own, else None. `told`: whether its attention is told of
    its window by keyword, and not in masks alone.
    """

    kind: Kind
    window: int
    kv_heads: int
    key_dim: int
    value_dim: int
    source: int
    latent: int = 0
    state: bool = False
    rope: str | None = None
    told: bool = True


@dataclass(frozen=True)
class Geometry:
    """Facts of a model that a KVCache depends on; equal for equal models.

    `architecture`: the class. `layers`: of the decoder, in order. `vocabulary`: tokens. `positions`: the
    `max_position_embeddings` the model knows, 0 if it says none. `softcap`: of the attention logits, 0 for none.
    `dtype`: of the weights. `processes`: that share the heads, with tensor parallelism. `carries`: whether recurrent
    states go on in a call of several tokens. `replayable`: whether its decode step can be captured in a CUDA graph.
    """

    architecture: str
    layers: tuple[Layer, ...]
    vocabulary: int
    positions: int
    softcap: float
    dtype: str
    processes: int = 1
    carries: bool = True
    replayable: bool = True

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
        modules = Modules.of(model, config)
        _check(model, config, modules)
        return cls(
            architecture=type(model).__name__,
            layers=_layers(model, config, modules),
            vocabulary=int(getattr(config, "vocab_size", 0) or 0),
            positions=int(getattr(config, "max_position_embeddings", 0) or 0),
            softcap=float(getattr(config, "attn_logit_softcapping", 0) or 0),
            dtype=str(model.dtype).removeprefix("torch."),
            processes=int(getattr(model, "_tp_size", None) or 1),
            carries=getattr(config, "model_type", "") not in _FORGETFUL,
            replayable=getattr(config, "model_type", "") not in _HOST_MADE,
        )

    @property
    def windows(self) -> tuple[int, ...]:
        """Sliding window of every layer in tokens, 0 for none."""
        return tuple(layer.window for layer in self.layers)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep keys and values of their own in slots."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.kind != Kind.NONE and layer.source == i)

    @property
    def untold(self) -> frozenset[tuple[int, bool]]:
        """Windows that masks alone tell attention of, in tokens, and whether they are chunks."""
        return frozenset((layer.window, layer.kind == Kind.CHUNKED) for layer in self.layers if not layer.told)

    @property
    def own(self) -> bool:
        """Whether every layer attends to slots of its own, and keeps nothing else."""
        return all(
            layer.kind != Kind.NONE and layer.source == i and not layer.state for i, layer in enumerate(self.layers)
        )

    @property
    def readers(self) -> Mapping[int, tuple[int, ...]]:
        """Layers that read another's slots, by that layer."""
        shared: dict[int, list[int]] = {}
        for i, layer in enumerate(self.layers):
            if layer.kind != Kind.NONE and layer.source != i:
                shared.setdefault(layer.source, []).append(i)
        return {source: tuple(readers) for source, readers in shared.items()}


def decoder_config(model: PreTrainedModel) -> Any:
    """Configuration of the decoder that the cache serves; which attention runs is a setting of it."""
    return model.config.get_text_config(decoder=True)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Configurations that the decoder's attention layers read: one object as a rule, more in models put together."""
    config = decoder_config(model)
    found = {id(config): config}
    for module in Modules.of(model, config):
        own = getattr(module, "config", config)
        found[id(own)] = own
    return list(found.values())


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each layer's weights are now, and so its slots; the model's own device where that is unknown."""
    config = decoder_config(model)
    devices = [model.device] * Modules.of(model, config).count
    for module in model.modules():
        # Quantised layers may keep everything in buffers.
        weight = next(chain(module.parameters(), module.buffers()), None)
        index: Any = getattr(module, "layer_idx", None)
        known = isinstance(index, int) and 0 <= index < len(devices) and _is_decoder(module, config)
        if known and weight is not None and weight.device.type != "meta":
            devices[index] = weight.device
    return devices


@dataclass(frozen=True)
class Modules:
    """The decoder's modules.

    `attention`: those that attend through transformers' interface, by the index of their layer. `anywhere`: those that
    do for more than one layer. `count`: of layers.
    """

    attention: Mapping[int, nn.Module]
    anywhere: Sequence[nn.Module]
    count: int

    @classmethod
    def of(cls, model: PreTrainedModel, config: Any) -> Modules:
        """Find them; encoders of images and sound number their layers too, and have configurations of their own."""
        attention: dict[int, nn.Module] = {}
        anywhere: list[nn.Module] = []
        last = -1
        for module in model.modules():
            index: Any = getattr(module, "layer_idx", None)
            numbered = isinstance(index, int) and index >= 0
            if not (numbered or interface_names(module)) or not _is_decoder(module, config):
                continue
            if numbered:
                last = max(last, index)
            if interface_names(module):
                if numbered:
                    attention.setdefault(index, module)
                else:
                    anywhere.append(module)
        told = int(getattr(config, "num_hidden_layers", 0) or 0)
        # Layers that run several times over a text have keys of each time, in layers of the cache after their own.
        repeats = any({"cache_offset", "cycle_offset"} & interface_names(module) for module in attention.values())
        types = getattr(config, "layer_types", None)
        return cls(attention, anywhere, len(types) if types else told if repeats or last < 0 else last + 1)

    def __bool__(self) -> bool:
        return bool(self.attention or self.anywhere)

    def __iter__(self) -> Iterator[nn.Module]:
        return chain(self.attention.values(), self.anywhere)

    def __getitem__(self, layer: int) -> nn.Module:
        """The module that attends in a layer."""
        return self.attention[layer] if layer in self.attention else next(iter(self))


def interface_names(module: nn.Module) -> frozenset[str]:
    """Arguments of a module's code that attends through transformers' interface, and keywords it passes; else none.

    Read from the compiled code: what a class is called or claims proves nothing.
    """
    kind: Any = type(module)
    return _class_names(kind)


@functools.cache
def _class_names(kind: type) -> frozenset[str]:
    return frozenset(name for code in _attending(kind) for name in _names(code))


def keywords(module: nn.Module) -> frozenset[str]:
    """Keywords that a module's code hands to its attention by name."""
    kind: Any = type(module)
    return _class_keywords(kind)


@functools.cache
def _class_keywords(kind: type) -> frozenset[str]:
    # The names of a call's keywords are one constant of its code.
    constants = (constant for code in _attending(kind) for constant in code.co_consts)
    calls = [names for names in constants if isinstance(names, tuple) and {"scaling", "dropout"} & set(names)]
    return frozenset(str(name) for names in calls for name in names)


def _attending(kind: type) -> Iterator[CodeType]:
    """Code of a class that attends through transformers' interface."""
    for base in kind.__mro__:
        if base in (PreTrainedModel, nn.Module):  # a whole model knows the interface, to choose a function
            break
        for function in vars(base).values():
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is not None and INTERFACE in code.co_names:
                yield code


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (name for name in constant if isinstance(name, str))


def is_latent(module: nn.Module) -> bool:
    """Whether a module hands a latent and a rotary key to its cache, which all its heads share."""
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_b_proj")
    return all(getattr(module, name, None) is not None for name in names)


def _is_decoder(module: nn.Module, config: Any) -> bool:
    return isinstance(getattr(module, "config", config), type(config))


_FOREIGN = {
    "position_bias": "adds a learnt bias to its attention by relative position (position_bias)",
    "indices": "attends to tokens that an index of its own picks (indices)",
    "block_indices": "attends to blocks that an index of its own picks (block_indices)",
    "sinks": "gives its attention sinks in a way of its own (sinks)",
}
"""Keywords of transformers' attention interface that change what attention is, and what each of them does."""

_TELLING = ("bias", "alibi", "sink", "indices", "cu_seq_lens", "block_mask", "score_mod")
"""Parts of names of keywords that change it; others that a call brings along, attention functions do not read."""

_KNOWN = frozenset(
    {
        "query", "key", "value", "attention_mask", "scaling", "dropout", "sliding_window", "softcap", "s_aux",
        "is_causal", "deterministic", "position_ids", "cache_position", "max_length_q", "max_length_k", "use_cache",
        "output_attentions",
    }
)  # fmt: skip
"""Keywords that models hand to it by name and that are understood, or change nothing."""


def foreign(names: Iterable[str], named: bool = False) -> str:
    """What the first keyword of attention does that a KVCache does not know, or nothing.

    Parameters
    ----------
    names : iterable of str
        Keywords.
    named : bool
        Whether a model's own code names them, and they did not only come along with a call.
    """
    unknown = (n for n in sorted(names) if n not in _KNOWN and (named or any(part in n for part in _TELLING)))
    name = next(unknown, None)
    return "" if name is None else _FOREIGN.get(name, f"hands its attention a keyword of its own ({name})")


# What the code of a model does beyond its configuration and its modules, by the configuration's model_type.
_WAYS_OF_THEIR_OWN = {
    "doge": "adds a learnt term to its attention mask that depends on every stored value",
    "diffllama": "attends twice per layer, to two halves of the values",
    "dory": "runs some of its layers several times over a text, each time with other keys",
    "recurrent_gemma": "keeps its recurrent state inside its own layers, where no cache reaches it",
    "minimax": "takes no cache but one of a class of its own",
    "kosmos_2_text_model": "makes its attention masks in code of its own",
    "mllama_text_model": "has cross-attention layers that attend to an image",
}

# Models whose recurrent layers begin anew in every call of more than one token, by their configuration's model_type.
_FORGETFUL = frozenset({"jamba", "zamba"})

# Models whose code makes constants on the host in every step and waits until they are on the device, likewise.
_HOST_MADE = frozenset({"gemma3n_text"})

_KINDS = {
    "full_attention": (Kind.FULL, False),
    "sliding_attention": (Kind.WINDOW, False),
    "chunked_attention": (Kind.CHUNKED, False),
    "linear_attention": (Kind.NONE, True),
    "conv": (Kind.NONE, True),
    "hybrid": (Kind.FULL, True),
    "hybrid_sliding": (Kind.WINDOW, True),
    "moe": (Kind.NONE, False),
    "mlp": (Kind.NONE, False),
}
"""Whether and how a layer of each of transformers' types attends, and whether it keeps a state."""


def _check(model: PreTrainedModel, config: Any, modules: Modules) -> None:
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
    types = set(getattr(config, "layer_types", None) or ())
    if other := sorted(types - set(_KINDS)):
        raise refuse(f"has layers of type {other}, which attend in ways that a KVCache does not know")
    if own in _WAYS_OF_THEIR_OWN:
        raise refuse(_WAYS_OF_THEIR_OWN[own])
    for module in modules:
        if unknown := foreign(keywords(module), named=True) or foreign(set(_FOREIGN) & interface_names(module)):
            raise refuse(unknown)
        # A decoder's module may say so and still be given causal masks; around images, masks tell in each call.
        causal = getattr(module, "is_causal", True) or getattr(module, "is_decoder", False)
        if config is model.config and not (causal and getattr(config, "is_causal", True)):
            raise refuse(f"attends to later tokens too ({type(module).__name__} is not causal)")
        if getattr(config, "sliding_window", None) and not _knows_windows(module):
            raise refuse("has a sliding window in its configuration that its attention is not told of")
    if getattr(config, "alibi", False):
        raise refuse("adds ALiBi's bias to its attention")


def _knows_windows(module: nn.Module) -> bool:
    """Whether a module's attention is told of a window: by keyword, or in masks that its file makes."""
    makers = ("create_sliding_window_causal_mask", "create_masks_for_generate")
    own = sys.modules[type(module).__module__]
    return "sliding_window" in interface_names(module) or any(hasattr(own, name) for name in makers)


def _layers(model: PreTrainedModel, config: Any, modules: Modules) -> tuple[Layer, ...]:
    processes = getattr(model, "_tp_size", None) or 1
    window = int(getattr(config, "sliding_window", None) or 0)
    chunk = int(getattr(config, "attention_chunk_size", None) or 0)
    rope = getattr(_rotary(model), "rope_type", None)
    told = getattr(config, "layer_types", None)
    untold = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
    types = list(told or [untold] * modules.count)
    layers: list[Layer] = []
    for index, name in enumerate(types):
        kind, state = _KINDS[name]
        if kind == Kind.NONE:
            layers.append(Layer(kind, 0, 0, 0, 0, index, state=state))
            continue
        wide = {Kind.WINDOW: window, Kind.CHUNKED: chunk}.get(kind, 0)
        module, source = modules[index], index
        if getattr(module, "is_kv_shared_layer", False):
            own = [i for i in range(index) if types[i] == name and layers[i].source == i]
            source = own[-1]
            module = modules[source]
        latent = int(module.kv_lora_rank) if is_latent(module) else 0  # type: ignore[arg-type]
        width = latent + int(module.qk_rope_head_dim) if latent else _key_dim(module, config)  # type: ignore[arg-type]
        layers.append(
            Layer(
                kind=kind if wide else Kind.FULL,
                window=wide,
                kv_heads=1 if latent else _kv_heads(module, config, processes),
                key_dim=width,
                value_dim=latent or int(getattr(module, "v_head_dim", 0) or width),
                source=source,
                latent=latent,
                state=state,
                rope=name if told and isinstance(rope, dict) else None,
                told=not wide or "sliding_window" in interface_names(module),
            )
        )
    return tuple(layers)


def _rotary(model: PreTrainedModel) -> nn.Module | None:
    return next((module for path, module in model.named_modules() if path.endswith("rotary_emb")), None)


def _kv_heads(module: nn.Module, config: Any, processes: int) -> int:
    own = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
    heads = int(own if isinstance(own, int) else config.num_attention_heads)
    groups = getattr(module, "num_key_value_groups", None)
    if groups is None:
        return int(getattr(config, "num_key_value_heads", None) or heads) // processes
    return heads // int(groups) // processes


def _key_dim(module: nn.Module, config: Any) -> int:
    told = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    return int(told or config.hidden_size // config.num_attention_heads)
