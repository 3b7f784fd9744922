"""Requests through an engine against each alone with a cache of its own: tokens and kept positions, the table last.

    python benches/engine_check.py --requests 200 --strategies all    # tiny random Llama, float64: all must be equal
    python benches/engine_check.py --requests 200 --strategies all --bits 4
    python benches/engine_check.py --model smollm2 --requests 200 --bits 4

Lengths, arrivals, cancellations and sampling are mixed, greedy and seeded. Where a request's tokens differ, the two
best logits at the first difference tell whether rounding could do it: a batch of another size adds up in another order.
Exit code 1 if one differs by more than that.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

import numpy as np
import torch

import liquidfusion as lf
from liquidfusion.run.drawing import draw, uniform

CLOSE = 1e-3
"""Difference of the two best scores within which rounding may decide."""


def tiny(device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        initializer_range=0.12,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().to(device, torch.float64)


class Alone:
    """A request with a cache of its own, by the same chunks and the same noise."""

    def __init__(self, model: Any, chunk: int, options: dict[str, Any]) -> None:
        self.model, self.chunk, self.read = model, chunk, 0
        self.cache = lf.KVCache(model, **options)

    def feed(self, ids: list[int]) -> torch.Tensor:
        positions = torch.arange(self.read, self.read + len(ids), device=self.model.device)[None]
        self.read += len(ids)
        given = {lf.cache_keyword(self.model): self.cache, "position_ids": positions}
        return self.model(torch.tensor([ids], device=self.model.device), **given).logits[0, -1]

    def follow(self, prompt: list[int], sampling: lf.Sampling, answer: list[int]) -> tuple[int, float]:
        """Tokens of an answer that it would give too, and how close the two best were at the first other one."""
        for start in range(0, len(prompt), self.chunk):
            logits = self.feed(prompt[start : start + self.chunk])
        for step, token in enumerate(answer):
            own, gap = self.choose(logits, sampling, step)
            if own != token:
                return step, gap
            if step + 1 < len(answer):
                logits = self.feed([token])
        return len(answer), 0.0

    def choose(self, logits: torch.Tensor, sampling: lf.Sampling, step: int) -> tuple[int, float]:
        scores = logits if logits.dtype == torch.float64 else logits.float()
        best = scores.topk(2).values
        if not sampling.temperature:
            return int(scores.argmax()), float(best[0] - best[1])
        table = torch.tensor([[sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p]]).double()
        noise = uniform(np.array([sampling.seed], np.uint64), np.array([step], np.uint64))
        filtered = torch.arange(1, device=scores.device) if sampling.filtered else None
        arguments = scores[None], table.to(scores.device), torch.from_numpy(noise).to(scores.device), filtered
        weights = (scores / sampling.temperature).softmax(-1).double().cumsum(-1)
        return int(draw(*arguments)), float((weights - float(noise[0])).abs().min())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--strategies", nargs="+", default=["liquid_fusion", "h2o", "streaming"])
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rows", type=int, default=9)
    parser.add_argument("--budget", type=int, default=96)
    parser.add_argument("--bits", type=int, default=None)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.strategies == ["all"]:
        args.strategies = [info["name"] for info in lf.strategies()]
    if args.model == "tiny":
        model = tiny(device)
    else:
        from liquidfusion.bench.models import load

        model = load(args.model, device=args.device, dtype="float32").model
    close_enough = 0.0 if model.dtype == torch.float64 else CLOSE
    vocabulary, failures, table = model.config.vocab_size, 0, []
    for strategy in args.strategies:
        dice = random.Random(strategy)
        options = {"strategy": strategy, "budget": args.budget, "bits": args.bits}
        work, start = [], time.perf_counter()
        with lf.Engine(model, rows=args.rows, chunk=args.chunk, step_tokens=2 * args.chunk, **options) as engine:
            for number in range(args.requests):
                length = dice.choice([1, 7, args.chunk, 3 * args.chunk - 1, 4 * args.chunk + 1, 8 * args.chunk])
                prompt = [dice.randrange(1, vocabulary) for _ in range(length)]
                time.sleep(dice.choice([0.0, 0.0, 0.02]))
                sampling = lf.Sampling(
                    max_tokens=dice.randint(1, args.new),
                    temperature=dice.choice([0.0, 0.8]),
                    top_p=dice.choice([1.0, 0.9]),
                    top_k=dice.choice([0, 40]),
                    seed=number,
                    ignore_eos=True,
                )
                work.append((prompt, sampling, engine.submit(prompt, sampling, keep=True)[0]))
                if dice.random() < 0.1:
                    dice.choice(work)[2].cancel()
            answers = [[token.id for token in request] for *_, request in work]
        seconds = time.perf_counter() - start
        same = kept = close = 0
        for (prompt, sampling, request), answer in zip(work, answers, strict=True):
            if request.error is not None:
                raise request.error
            with torch.inference_mode():
                own = Alone(model, args.chunk, options)
                length, gap = own.follow(prompt, sampling, answer)
                if length < len(answer):
                    close += gap < close_enough
                    print(f"{strategy}: {len(prompt)} tokens, differs at {length} of {len(answer)}, best two {gap:.2g}")
                    continue
                same += 1
                state = request.state
                if state is None:
                    kept += 1
                    continue
                if len(state.tokens) > own.read:
                    own.feed(answer[-1:])
            mine = [t for name, t in sorted(state.tensors.items()) if name.startswith("positions")]
            rows = [layer[0].sort(-1).values for group in mine for layer in group]
            theirs = [own.cache.positions(layer)[0].sort(-1).values for layer in range(len(rows))]
            kept += all(torch.equal(a, b) for a, b in zip(rows, theirs, strict=True))
        failures += args.requests - same - close
        table.append(f"{strategy:<16}{same:>8} of {args.requests}{close:>8}{kept:>10}{seconds:>10.1f} s")
        print(table[-1], flush=True)
    print(f"\n{'strategy':<16}{'same tokens':>14}{'close':>8}{'same kept':>10}{'engine':>11}")
    print("\n".join(table))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
