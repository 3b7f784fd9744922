"""Speed of two versions of liquidfusion beside each other: Llama-3.1-8B's shape, one run on one card, the table last.

python benches/versions.py OLD_SITE NEW_SITE      # folders that PYTHONPATH can name, one installed version in each
python benches/versions.py OLD_SITE NEW_SITE --tiny --device cpu

Both versions get the same random weights and the same strategy: heavy hitters by peak (0.6) and mass, without the
distinct share that older versions do not have. A version measures in a process of its own, old and new in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PARTS = ("decode", "evict", "prefill", "fill")


def build(tiny: bool, device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from liquidfusion.bench.models import resolve_device  # noqa: F401 - both versions have it: a wrong site fails here

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = AutoConfig.for_model(
        "llama",
        **(small if tiny else large),
        num_key_value_heads=2 if tiny else 8,
        vocab_size=512 if tiny else 128256,
        max_position_embeddings=131072,
    )
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(usual)


class Version:
    """One version's figures."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        import liquidfusion

        self.torch, self.lf, self.args = torch, liquidfusion, args
        self.model = build(args.tiny, args.device)
        self.budget, self.rows, self.many = (64, 4, 6) if args.tiny else (2048, 64, 208)
        self.figures: dict[str, float] = {}

    def cache(self, interval: int | None = None) -> Any:
        if hasattr(self.lf, "Strategy"):
            more = {} if interval is None else {"eviction_interval": interval}
            strategy = self.lf.Strategy("liquid_fusion", distinct_ratio=0.0, peak_ratio=0.6, **more)
            return self.lf.KVCache(self.model, strategy, self.budget)
        return self.lf.KVCache(self.model, budget=self.budget, eviction_interval=interval)

    def call(self, cache: Any, rows: int, tokens: int) -> None:
        ids = self.torch.randint(1, self.model.config.vocab_size, (rows, tokens), device=self.args.device)
        self.model(ids, past_key_values=cache, logits_to_keep=1)

    def seconds(self, work: Callable[[], Any]) -> float:
        wait = self.torch.cuda.synchronize if self.args.device != "cpu" else lambda: None
        wait()
        began = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - began

    def step(self, cache: Any, rows: int) -> float:
        """Milliseconds of a decode step."""
        steps = 8 if self.args.tiny else 100
        for _ in range(6):
            self.call(cache, rows, 1)
        return 1e3 * self.seconds(lambda: [self.call(cache, rows, 1) for _ in range(steps)]) / steps

    def filled(self, rows: int, chunk: int, **options: Any) -> Any:
        cache = self.cache(**options)
        for _ in range(0, self.budget + 64, chunk):
            self.call(cache, rows, chunk)
        return cache

    def decode(self) -> None:
        for rows in (1, self.rows):
            self.figures[f"step, {rows} rows, ms"] = self.step(self.filled(rows, 32), rows)

    def evict(self) -> None:
        for interval in (None, 1):
            on, off = (self.filled(self.rows, 32, interval=interval) for _ in range(2))
            off.evicting = False
            pairs = [(self.step(on, self.rows), self.step(off, self.rows)) for _ in range(3)]
            name = f"step, {self.rows} rows, interval {interval or 'as by default'}"
            self.figures[f"{name}, ms"] = statistics.median(on for on, _ in pairs)
            self.figures[f"{name}, with ÷ without eviction"] = statistics.median(on / off for on, off in pairs)
            del on, off

    def prefill(self) -> None:
        length = 256 if self.args.tiny else 32768
        times = [self.seconds(lambda: self.call(self.cache(), 1, length)) for _ in range(4)]
        self.figures[f"prompt of {length}, ms"] = 1e3 * statistics.median(times[1:])

    def fill(self) -> None:
        self.seconds(lambda: self.filled(self.many, 32))
        self.figures[f"filling {self.many} rows, s"] = self.seconds(lambda: self.filled(self.many, 32))

    def measure(self) -> None:
        with self.torch.no_grad():
            for part in self.args.parts:
                getattr(self, part)()
                if self.args.device != "cpu":
                    self.torch.cuda.empty_cache()
        print(json.dumps(self.figures))


def child(site: str, argv: list[str]) -> dict[str, float]:
    """The figures of the version in a folder."""
    environment = {**os.environ, "PYTHONPATH": site}
    # -P: or else this folder's kernels.py is the package that transformers looks for.
    command = [sys.executable, "-P", __file__, *argv, "--child"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {site}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sites", nargs=2, metavar="SITE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=1, help="how often each version is measured, in turns")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        Version(args).measure()
        return
    runs = [[child(site, sys.argv[1:]) for site in args.sites] for _ in range(args.repeats)]
    for name in runs[0][0]:
        old, new = (statistics.median(run[side][name] for run in runs) for side in (0, 1))
        print(f"{name:<58} {old:>10.3f} {new:>10.3f} {new / old:>7.3f} x", flush=True)


if __name__ == "__main__":
    main()
