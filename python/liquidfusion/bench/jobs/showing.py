"""``show``: which tokens of a text a cache kept, and how much attention each had gathered."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedConfig

from liquidfusion.bench import decoding
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.models import Loaded
from liquidfusion.exceptions import CacheError, ConfigError

_EVICTED = "-"
_LEVELS = 10


@dataclass(frozen=True, slots=True)
class Kept:
    """What a cache kept of one text.

    Attributes
    ----------
    tokens
        The text of each token.
    written
        How many of them, at the end, the model wrote itself.
    kept
        bool ``[layers, kv_heads, tokens]``.
    mass
        Attention mass of each kept token, float32 of the same shape; None if the strategy gathers none.
    """

    tokens: list[str]
    written: int
    kept: npt.NDArray[np.bool_]
    mass: npt.NDArray[np.float32] | None

    def share(self, layer: int | None = None, head: int | None = None) -> npt.NDArray[np.float64]:
        """Return the share of the heads (of one layer, or one head) that kept each token, ``[tokens]``."""
        part: npt.NDArray[np.float64] = self.kept[_pick(layer), _pick(head)].mean((0, 1))
        return part

    def levels(self) -> list[list[str]]:
        """Return, for each layer and head, one letter a token: ``-`` evicted, else the rank of its mass from 0 to 9."""
        layers, heads, count = self.kept.shape
        found = []
        for layer in range(layers):
            row = []
            for head in range(heads):
                kept = self.kept[layer, head]
                letters = np.full(count, _EVICTED)
                ranks = np.full(kept.sum(), _LEVELS // 2)
                if self.mass is not None:
                    order = self.mass[layer, head][kept].argsort(kind="stable").argsort(kind="stable")
                    ranks = order * _LEVELS // max(1, len(order))
                letters[kept] = [str(rank) for rank in ranks]
                row.append("".join(letters))
            found.append(row)
        return found

    def intensity(self, layer: int | None = None, head: int | None = None) -> npt.NDArray[np.float64]:
        """Return the mean rank of the mass of each token where it was kept, from 0 to 1, ``[tokens]``."""
        levels = [[[-1 if c == _EVICTED else int(c) for c in head] for head in layer] for layer in self.levels()]
        part = np.array(levels, dtype=float)[_pick(layer), _pick(head)]
        count = (part >= 0).sum((0, 1))
        total: npt.NDArray[np.float64] = np.where(part >= 0, part, 0).sum((0, 1)) / np.maximum(count, 1)
        return total / (_LEVELS - 1)


def _pick(index: int | None) -> slice:
    return slice(None) if index is None else slice(index, index + 1)


def keep(loaded: Loaded, text: str, cache: CacheOptions, *, max_tokens: int = 0, chunk: int | None = None) -> Kept:
    """Read a text, write on for `max_tokens`, and look at what the cache holds then.

    Parameters
    ----------
    text
        The prompt.
    max_tokens
        Tokens to write after it, the likeliest each time.
    chunk
        Prompt tokens fed in one call; None: all at once.

    Raises
    ------
    ConfigError
        The text has no token.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = decoding.prefix(tokenizer) + decoding.encode(tokenizer, text)
    if not ids:
        raise ConfigError("the prompt has no token")
    store = cache.make(model, len(ids))
    stream = decoding.Stream(model, store)
    logits = stream.feed_chunks(torch.tensor([ids], device=model.device), chunk=chunk)
    for _ in range(max_tokens):
        token = logits[:, -1].argmax(-1)
        ids.append(int(token))
        logits = stream.feed(token[:, None], last=True)
    layers = [store.positions(layer)[0].numpy() for layer in range(len(store))]
    kept = np.zeros((len(layers), layers[0].shape[0], len(ids)), dtype=np.bool_)
    try:
        masses = [store.scores(layer)[0][0].float().cpu().numpy() for layer in range(len(store))]
        mass = np.zeros(kept.shape, dtype=np.float32)
    except CacheError:
        masses, mass = [], None
    for layer, positions in enumerate(layers):
        for head, row in enumerate(positions):
            kept[layer, head, row[row >= 0]] = True
            if mass is not None:
                mass[layer, head, row[row >= 0]] = masses[layer][head][row >= 0]
    return Kept([tokenizer.decode([token]) for token in ids], max_tokens, kept, mass)


def check_place(config: PreTrainedConfig, layer: int | None, head: int | None) -> None:
    """Refuse a layer or head that the model does not have.

    Raises
    ------
    ConfigError
        There is no such layer or head.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    for name, value, count in (("layer", layer, text.num_hidden_layers), ("head", head, heads)):
        if value is not None and not 0 <= value < count:
            raise ConfigError(f"{name} {value}: 0 to {count - 1} is accepted")
