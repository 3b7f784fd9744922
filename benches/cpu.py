"""What a KVCache costs on a CPU beside transformers' DynamicCache, in CPU time, so that a busy machine matters less.

OMP_NUM_THREADS=1 python benches/cpu.py --layers 6 --parts decode prefill fresh probe

A random model of SmolLM2's shape, float32. Every ratio is of work done in turns in one process; each figure is the
least of its rounds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import liquidfusion as lf

PARTS = ("decode", "prefill", "fresh", "probe")


def model(layers: int, vocabulary: int) -> LlamaForCausalLM:
    """SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


def least(works: dict[str, Callable[[], Any]], rounds: int, times: int = 1) -> dict[str, float]:
    """Seconds of CPU time of each piece of work, done in turns."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            began = time.process_time()
            for _ in range(times):
                work()
            found[name].append((time.process_time() - began) / times)
    return {name: min(seconds) for name, seconds in found.items()}


class Bench:
    """One model and what is measured on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.model = options, model(options.layers, options.vocabulary)
        self.key = lf.cache_keyword(self.model)

    def call(self, ids: Tensor, cache: Any) -> Any:
        """Call the model once."""
        return self.model(ids, **{self.key: cache}, logits_to_keep=1)

    def ids(self, count: int) -> Tensor:
        """A prompt of random tokens."""
        return torch.randint(1, self.options.vocabulary, (1, count))

    def show(self, what: str, found: dict[str, float], against: str) -> None:
        """Print figures, each beside its ratio to one of them."""
        shown = (f"{name} {1e3 * seconds:.2f} ms ({seconds / found[against]:.3f})" for name, seconds in found.items())
        print(f"{what}: {', '.join(shown)}", flush=True)

    def decode(self) -> None:
        """A step, averaged over 16, so that the choice of the next victims is among them."""
        budget, token = self.options.budget, self.ids(1)
        caches: dict[str, Any] = {
            "KVCache": lf.KVCache(self.model, budget=budget),
            "KVCache, bits=4": lf.KVCache(self.model, budget=budget, bits=4),
        }
        half = lf.KVCache(self.model, budget=budget, bits=16)
        self.call(self.ids(budget + 1), half)
        caches["KVCache, bits=4, bytes of 16 bits"] = lf.KVCache(self.model, memory=half.nbytes, bits=4)
        for cache in caches.values():
            self.call(self.ids((cache.spec.budget or 0) + 128), cache)
        for context in (budget, self.options.context):
            cache = caches[f"DynamicCache at {context}"] = DynamicCache(config=self.model.config)
            for layer in range(self.options.layers):
                cache.update(torch.randn(1, 3, context, 64), torch.randn(1, 3, context, 64), layer)
        works = {name: lambda cache=cache: self.call(token, cache) for name, cache in caches.items()}
        self.show("decode", least(works, self.options.rounds, 16), f"DynamicCache at {budget}")

    def prefill(self) -> None:
        """A prompt in one call."""
        ids = self.ids(self.options.context)
        works = {
            "KVCache": lambda: self.call(ids, lf.KVCache(self.model, budget=self.options.budget)),
            "DynamicCache": lambda: self.call(ids, DynamicCache(config=self.model.config)),
        }
        self.show(f"prefill of {self.options.context}", least(works, self.options.rounds), "DynamicCache")

    def fresh(self) -> None:
        """`generate` of 20 tokens after 100, a new cache each time."""
        ids = self.ids(100)
        told: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 20}

        def ours() -> None:
            with lf.use(self.model, budget=self.options.budget):
                self.model.generate(ids, **told)

        works = {"use": ours, "DynamicCache": lambda: self.model.generate(ids, **told)}
        least(works, 1)
        self.show("generate, 100 + 20 tokens", least(works, self.options.rounds), "DynamicCache")

    def probe(self) -> None:
        """The first coded cache of a model, and the second."""
        fresh = model(self.options.layers, self.options.vocabulary)
        works = {"first KVCache(bits=4)": lambda: lf.KVCache(fresh, budget=self.options.budget, bits=4)}
        first, second = least(works, 1), least(works, 1)
        self.show("probe", first | {"second": min(second.values())}, "first KVCache(bits=4)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # what few bits cost a random model says nothing
    with torch.inference_mode():
        bench = Bench(options)
        for part in options.parts:
            getattr(bench, part)()


if __name__ == "__main__":
    main()
