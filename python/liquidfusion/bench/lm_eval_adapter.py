r"""EleutherAI's lm-evaluation-harness with a bounded cache: everything that the field measures, at a given budget.

The harness finds models only in its own registry, so start it through this module, with the harness's own arguments::

    python -m liquidfusion.bench.lm_eval_adapter --model liquidfusion \
        --model_args pretrained=smollm2,strategy=liquid_fusion,budget=512 --tasks hellaswag

or import this module before calling ``lm_eval.simple_evaluate(model="liquidfusion", …)``.
Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

import liquidfusion as lf
from liquidfusion.bench.caches import CacheOptions, option_names
from liquidfusion.bench.decoding import Stream
from liquidfusion.bench.models import locate
from liquidfusion.exceptions import ConfigError, UnsupportedError


@register_model("liquidfusion")
class LiquidFusionLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model with a :class:`liquidfusion.KVCache`.

    Parameters
    ----------
    pretrained
        ``"smollm2"``, a local directory, a hub id, or a model.
    chunk
        Tokens fed in one call when a text is scored. Eviction happens between calls, so the likelihood of a token
        depends on what was kept of the chunks before its own.
    arguments
        What :meth:`liquidfusion.bench.caches.CacheOptions.of` takes (a percentage refers to the longest prompt of a
        batch), and what the harness's model takes: device, dtype, batch_size, …

    Raises
    ------
    ConfigError
        A parameter of the cache is out of range.
    """

    def __init__(
        self,
        pretrained: Any = "smollm2",
        *,
        chunk: int = 64,
        **arguments: Any,
    ) -> None:
        names = arguments.keys() & set(option_names())
        self._cache = CacheOptions.of(**{name: arguments.pop(name) for name in names})
        self._cache.check()
        if chunk < 1:
            raise ConfigError(f"chunk {chunk} is not at least 1")
        self._chunk = chunk
        if isinstance(pretrained, str):
            pretrained = locate(pretrained)
        super().__init__(pretrained=pretrained, backend="causal", **arguments)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the logits of every column ``[batch, columns, vocabulary]``, fed chunk by chunk.

        The harness pads on the right and says nothing of it: padding comes after all that counts, so it can only be
        evicted together with what is no longer looked at.
        """
        if attn_mask is not None or labels is not None:
            raise UnsupportedError("the bounded cache serves decoder-only models")
        stream = Stream(self.model, self._cache.make(self.model, inps.shape[1]))
        parts = [stream.feed(inps[:, at : at + self._chunk]) for at in range(0, inps.shape[1], self._chunk)]
        return torch.cat(parts, 1)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return prompt and continuation ``[batch, columns]``, written with a fresh cache."""
        with lf.use(self.model, **self._cache.arguments()):
            written: Tensor = super()._model_generate(*args, **kwargs)
            return written


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
