"""What a text costs deep inside a stream without end, against a stream that began shortly before it.

python benches/endless_quality.py --text wikitext-2-test.txt --out result.json

One stream of a real model with cache-relative positions runs to the end of the last text; each text is scored there,
and again in a fresh stream that begins `--lead` tokens before it, with the same cache and the same calls. What must
hold: both perplexities are within 5 % of each other. transformers' full cache and `local` read the first texts only,
since the full cache's time grows with the square of the depth. Texts are stretches of the one file, never repeated.

The same run times the calls (on a CPU its own time: others' work on the machine does not count) and watches the memory
in use: the last tenth against the second, within 5 % and 1 %.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import endless
import numpy as np
import torch
from transformers.cache_utils import Cache

from liquidfusion import files
from liquidfusion.bench import decoding, machine, models, results
from liquidfusion.bench.caches import CacheOptions, FrameworkCache
from liquidfusion.bench.stats import bootstrap
from liquidfusion.bench.texts import read_text
from liquidfusion.exceptions import LiquidFusionError

TRANSFORMERS = "transformers"
BLOCK = 64
"""Tokens whose mean is one sample of the bootstrap."""


@dataclass
class Calls:
    """Seconds and bytes in use of each call of a stream."""

    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def options(name: str, args: argparse.Namespace) -> CacheOptions | FrameworkCache:
    """`transformers`, or a strategy and its positions: `local:absolute`."""
    if name == TRANSFORMERS:
        return FrameworkCache()
    strategy, _, positions = name.partition(":")
    chosen = {name: float(value) for name, _, value in (word.partition("=") for word in args.parameter)}
    return CacheOptions.of(
        strategy=strategy,
        budget=args.budget,
        bits=args.bits,
        positions=positions or "cache",
        threads=args.threads,
        **chosen,
    )


def losses(
    loaded: models.Loaded,
    cache: Cache,
    ids: Sequence[int],
    starts: Sequence[int],
    args: argparse.Namespace,
    calls: Calls,
) -> Iterator[tuple[int, np.ndarray]]:
    """Stream `ids` through a cache and yield every text's start with the losses of its tokens, as it has passed."""
    stream, kept, done = decoding.Stream(loaded.model, cache), [np.zeros(0, np.float32)], 0
    device, end = loaded.model.device, max(starts) + args.length
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for start in starts:
        while done < start + args.length:
            part = list(ids[done : min(done + args.chunk, end)])
            first = decoding.prefix(loaded.tokenizer) if not done else []
            before = clock()
            nll = stream.score(torch.tensor([first + part], device=device))[0].cpu().numpy()
            calls.seconds.append(clock() - before)
            calls.memory.append(machine.resident_memory(device) or 0)
            kept.append(nll if done or first else np.concatenate(([np.nan], nll)))  # nothing predicts the first token
            done += len(part)
        passed = np.concatenate(kept)
        yield start, passed[start : start + args.length]
        kept = [passed]


def perplexity(nll: np.ndarray) -> float:
    return math.exp(min(float(nll.mean()), 700.0))


def ratio(deep: Sequence[np.ndarray], near: Sequence[np.ndarray]) -> dict[str, float]:
    """Perplexity of the texts deep in the stream over that of the same texts near its beginning, 95 % of blocks."""
    differences = np.concatenate([block_means(a) - block_means(b) for a, b in zip(deep, near, strict=True)])
    value, low, high = bootstrap(differences)
    return {"ratio": math.exp(value), "low": math.exp(low), "high": math.exp(high)}


def block_means(nll: np.ndarray) -> np.ndarray:
    return nll[: len(nll) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)


def measure(loaded: models.Loaded, ids: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """Every stream's figures; written to `--out` after each text, so that an interrupted run keeps what it has."""
    result: dict[str, Any] = {"arguments": vars(args), "machine": machine.describe(loaded.model.device), "caches": {}}
    shallow = [start for start in args.starts if start + args.length <= args.rivals_until]
    for name in args.caches:
        starts = args.starts if name == args.caches[0] else shallow
        if not starts:
            continue
        row = result["caches"][name] = {"texts": []}
        deep, near, calls = [], [], Calls()
        for start, nll in losses(loaded, options(name, args).make(loaded.model, len(ids)), ids, starts, args, calls):
            deep.append(nll)
            row["texts"].append({"start": start, "deep": perplexity(nll)})
            took = 1000 * calls.seconds[-1]
            print(f"{name:24s} {start:8d}  deep {perplexity(nll):10.3f}  {took:8.1f} ms a call", flush=True)
            save(args.out, result)
        if len(calls.seconds) >= 20:
            row["calls"] = endless.flatness(calls.seconds, calls.memory)
            print(f"{name:24s} {row['calls']}", flush=True)
        # Only now, so that the long stream's memory is its own.
        for text in row["texts"]:
            begin = text["start"] - args.lead
            again = options(name, args).make(loaded.model, len(ids))
            near.append(next(losses(loaded, again, ids[begin:], [args.lead], args, Calls()))[1])
            text |= {"near": perplexity(near[-1]), "ratio": text["deep"] / perplexity(near[-1])}
            print(f"{name:24s} {text['start']:8d}  near {text['near']:10.3f}  ratio {text['ratio']:8.3f}", flush=True)
            save(args.out, result)
        row["all"] = {"deep": perplexity(np.concatenate(deep)), "near": perplexity(np.concatenate(near))}
        row["all"] |= ratio(deep, near)
        print(f"{name:24s} all texts: {row['all']}", flush=True)
        save(args.out, result)
    judged = result["caches"][args.caches[0]]["all"]["ratio"]
    result["holds"] = abs(judged - 1) <= 0.05
    save(args.out, result)
    return result


def save(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        files.write_text(path, results.to_json(result))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file, longer than the last text's end")
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--bits", help="of each number: 4, or of keys and values: 8,4")
    parser.add_argument("--parameter", nargs="+", default=[], metavar="NAME=NUMBER", help="of the strategy")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a call")
    parser.add_argument("--lead", type=int, default=4096, help="tokens before a text in the stream that begins near it")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a text")
    parser.add_argument(
        "--starts", type=int, nargs="+", help="where the texts begin",
        default=[16384, 20480, 24576, 28672, 196608, 200704, 204800, 208896],
    )  # fmt: skip
    parser.add_argument(
        "--caches", nargs="+", default=["liquid_fusion:cache", "local:cache", "local:absolute", TRANSFORMERS],
        help=f"strategy:positions, or {TRANSFORMERS} for its full cache; the first is judged and reads every text",
    )  # fmt: skip
    parser.add_argument("--rivals-until", type=int, default=32768, help="depth to which the other caches read")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the core")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    args = parser.parse_args(given)
    for name in ("chunk", "lead", "length", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1 is accepted")
    args.starts.sort()
    for before, start in zip([0, *(s + args.length for s in args.starts)], args.starts, strict=False):
        if start < max(before, args.lead):
            parser.error(
                f"--starts {start}: texts of {args.length} may not overlap, {args.lead} tokens come before each"
            )
    if args.length < BLOCK:
        parser.error(f"--length {args.length}: at least {BLOCK} is accepted")
    try:
        for made in (options(name, args) for name in args.caches):
            if isinstance(made, CacheOptions):
                made.spec()
    except LiquidFusionError as error:
        parser.error(str(error))
    if args.lead % args.chunk or any(start % args.chunk for start in args.starts):
        parser.error(f"--chunk {args.chunk}: --lead and --starts are multiples of it, so that calls begin alike")
    return args


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(given)
    torch.set_num_threads(args.threads)
    try:
        loaded = models.load(args.model, device=args.device, dtype=args.dtype)
        ids = decoding.encode(loaded.tokenizer, read_text(args.text))
    except LiquidFusionError as error:
        raise SystemExit(f"error: {error}") from error
    last = args.starts[-1]
    if len(ids) < last + args.length:
        raise SystemExit(
            f"error: {args.text} has {len(ids)} tokens, {last + args.length} are needed for the text at {last}"
        )
    return measure(loaded, ids, args)


if __name__ == "__main__":
    main()
