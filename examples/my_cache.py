"""A method of your own, to be measured beside LiquidFusion: a cache that keeps the last `budget` tokens.

    liquidfusion-bench run --task needle --budget 256 --rival python:my_cache.Newest

Any subclass of transformers' `Cache` will do. It is made with the model's `config`; `budget` is the run's size in
tokens.
"""

from typing import Any

from transformers.cache_utils import Cache, DynamicSlidingWindowLayer


class Newest(Cache):
    """The last `budget` tokens of every layer."""

    def __init__(self, config: Any, budget: int = 256) -> None:
        super().__init__(layers=[DynamicSlidingWindowLayer(budget) for _ in range(config.num_hidden_layers)])
