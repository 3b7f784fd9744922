"""How well a text is predicted after a prompt longer than the budget, by the size of the calls that brought the prompt.

python benches/prefill_quality.py --text wikitext-2-test.txt --out result.json

Each segment of the text is a prompt and the tokens that follow it. The prompt goes in in one call, or in calls of some
size with eviction between them; what follows goes in in calls of `--chunk` tokens whatever the prompt did, so that only
the prompt's way makes the difference. Perplexities are of what follows, ratios to the prompt in one call are paired,
with a 95 % bootstrap over blocks of 64 tokens. Segments are the outer loop: an interrupted run is a smaller one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liquidfusion import files
from liquidfusion.bench import decoding, machine, models, results
from liquidfusion.bench.caches import CacheMaker, CacheOptions, FrameworkCache
from liquidfusion.bench.stats import bootstrap
from liquidfusion.bench.texts import read_text
from liquidfusion.exceptions import LiquidFusionError

BLOCK = 64
"""Tokens whose mean is one sample of the bootstrap."""
ONE_CALL = 0
"""As the size of a prompt's calls: all of it at once."""


def follow(loaded: models.Loaded, options: CacheMaker, segment: Sequence[int], size: int, args: Any) -> np.ndarray:
    """Losses of the tokens after the prompt, in blocks; the prompt in calls of `size` tokens."""
    ids = torch.tensor([segment], device=loaded.model.device)
    stream = decoding.Stream(loaded.model, options.make(loaded.model, args.prompt))
    logits = stream.feed_chunks(ids[:, : args.prompt], chunk=size or None)
    # A stream that was fed and not scored does not predict the first token of what comes next.
    first = torch.nn.functional.cross_entropy(logits[:, -1].float(), ids[:, args.prompt], reduction="none")
    rest = [stream.score(ids[:, at : at + args.chunk])[0] for at in range(args.prompt, ids.shape[1], args.chunk)]
    return torch.cat([first, *rest]).cpu().numpy().reshape(-1, BLOCK).mean(1)


def summary(found: dict[str, list[np.ndarray]]) -> dict[str, dict[str, float]]:
    """Perplexity of each way, and its ratio to the same cache's with the prompt in one call."""
    rows = {}
    for key, blocks in found.items():
        name, _, _ = key.rpartition(" ")
        nll = np.concatenate(blocks)
        rows[key] = {"perplexity": math.exp(nll.mean()), "segments": len(blocks)}
        if f"{name} {ONE_CALL}" in found:
            one = np.concatenate(found[f"{name} {ONE_CALL}"])
            value, low, high = bootstrap(nll[: len(one)] - one[: len(nll)])
            rows[key] |= {"ratio": math.exp(value), "low": math.exp(low), "high": math.exp(high)}
    return rows


def table(rows: dict[str, dict[str, float]], sizes: Sequence[int]) -> str:
    """Markdown: a row for each cache, a column for each size of the prompt's calls."""
    names = list(dict.fromkeys(key.rpartition(" ")[0] for key in rows))
    heads = ["one call" if size == ONE_CALL else f"calls of {size}" for size in sizes]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name in names:
        cells = []
        for size in sizes:
            row = rows.get(f"{name} {size}")
            cell = "" if row is None else f"{row['perplexity']:.2f}"
            if row is not None and size != ONE_CALL and "ratio" in row:
                cell += f" ({row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}])"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(loaded: models.Loaded, ids: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    first = decoding.prefix(loaded.tokenizer)
    body = args.prompt - len(first) + args.follow
    segments = [first + list(ids[at : at + body]) for at in range(0, len(ids) - body + 1, body)][: args.limit]
    if not segments:
        raise LiquidFusionError(f"{args.text} has {len(ids)} tokens, too few for one segment of {body}")
    ways: list[tuple[str, CacheMaker, int]] = [
        (f"{cache.strategy}, budget {cache.budget}", cache, size) for cache in args.caches for size in args.sizes
    ]
    if args.full:  # transformers' own, to which calls make no difference
        ways.append(("full cache", FrameworkCache(), args.sizes[0]))
    found: dict[str, list[np.ndarray]] = {}
    result: dict[str, Any] = {}
    for number, segment in enumerate(segments, 1):
        for name, options, size in ways:
            before = time.perf_counter()
            found.setdefault(f"{name} {size}", []).append(follow(loaded, options, segment, size, args))
            took = time.perf_counter() - before
            print(f"segment {number}  {name}, calls of {size or 'all'}: {took:.1f} s", flush=True)
        result = {
            "arguments": {k: v for k, v in vars(args).items() if k != "caches"},
            "machine": machine.describe(loaded.model.device),
            "rows": summary(found),
            "blocks": {key: [float(x) for x in np.concatenate(blocks)] for key, blocks in found.items()},
        }
        print(table(result["rows"], args.sizes), flush=True)
        if args.out is not None:
            files.write_text(args.out, results.to_json(result))
    return result


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file")
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--strategies", nargs="+", default=["liquid_fusion", "h2o"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--sizes", type=int, nargs="+", default=[ONE_CALL, 64, 512, 2048], help="0: in one call")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of a prompt")
    parser.add_argument("--follow", type=int, default=512, help="tokens that are scored after it")
    parser.add_argument("--chunk", type=int, default=64, help="tokens of a call after the prompt")
    parser.add_argument("--limit", type=int, default=8, help="segments, from the beginning of the text")
    parser.add_argument("--no-full", dest="full", action="store_false", help="leave the full cache out")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the core")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    args = parser.parse_args(given)
    for name in ("prompt", "chunk", "limit", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1 is accepted")
    if min(args.sizes) < 0:
        parser.error(f"--sizes {min(args.sizes)}: 0 for one call, or tokens of a call are accepted")
    if args.follow < BLOCK or args.follow % BLOCK:
        parser.error(f"--follow {args.follow}: a multiple of {BLOCK} is accepted")
    args.caches = [
        CacheOptions.of(strategy=strategy, budget=budget, threads=args.threads)
        for strategy in args.strategies
        for budget in args.budgets
    ]
    try:
        for cache in args.caches:
            cache.spec()
    except LiquidFusionError as error:
        parser.error(str(error))
    return args


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(given)
    torch.set_num_threads(args.threads)
    try:
        loaded = models.load(args.model, device=args.device, dtype=args.dtype)
        return measure(loaded, decoding.encode(loaded.tokenizer, read_text(args.text)), args)
    except LiquidFusionError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
