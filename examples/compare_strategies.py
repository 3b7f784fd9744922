"""Compare strategies on one text: perplexity of the tokens after the cache is full, and the memory each one takes."""

import argparse
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn.functional import cross_entropy

import liquidfusion as lf
from liquidfusion.bench.models import load

CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a local directory or a hub id")
    parser.add_argument("--file", type=Path, help="text to read (default: Python's own reference manual)")
    parser.add_argument("--budget", type=int, default=128, help="tokens that the cache may hold")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the text that are read")
    parser.add_argument("--quick", action="store_true", help="a short text")
    args = parser.parse_args()
    if args.quick:
        args.tokens = 256

    loaded = load(args.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    text = args.file.read_text() if args.file else "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.tokens)["input_ids"].to(model.device)

    print(f"{'strategy':<16}{'perplexity':>12}{'cache MiB':>12}{'seconds':>10}")
    for info in lf.strategies():
        started = time.perf_counter()
        cache = lf.KVCache(model, strategy=info["name"], budget=args.budget)
        perplexity = math.exp(mean_loss(model, cache, ids, skip=args.budget))
        seconds = time.perf_counter() - started
        print(f"{info['name']:<16}{perplexity:>12.2f}{cache.nbytes / 2**20:>12.2f}{seconds:>10.1f}")


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, cache: lf.KVCache, ids: torch.Tensor, skip: int) -> float:
    """Mean negative log-likelihood of the tokens from `skip` on, fed in chunks through the cache."""
    losses = []
    for start in range(0, ids.shape[1] - 1, CHUNK):
        chunk = ids[:, start : start + CHUNK]
        logits = model(chunk, **{lf.cache_keyword(model): cache}, use_cache=True).logits[0].float()
        targets = ids[0, start + 1 : start + 1 + chunk.shape[1]]
        losses.append(cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return float(torch.cat(losses)[skip:].mean())


if __name__ == "__main__":
    main()
