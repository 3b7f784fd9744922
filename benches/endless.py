"""Step time and memory over a stream without end, through a small random model of SmolLM2's architecture.

python benches/endless.py --tokens 1000000 --out result.json

Tokens come in chunks. What must hold: the last tenth's steps take as long as the second tenth's (within 5 %), and the
resident memory after the second tenth stays (within 1 %). The first tenth fills the slots and warms up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liquidfusion as lf


def model(layers: int) -> LlamaForCausalLM:
    """SmolLM2's architecture (its ratio of heads, rotary base and tied embeddings) at a width that a CPU streams."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=144, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def resident() -> int:
    """Bytes of the process that lie in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS: this script runs on Linux")


def stream(args: argparse.Namespace) -> dict[str, Any]:
    llama = model(args.layers)
    cache = lf.KVCache(llama, args.strategy, args.budget, positions=args.positions, threads=1)
    keyword, generator = lf.cache_keyword(llama), torch.Generator().manual_seed(1)
    calls = args.tokens // args.chunk
    seconds, memory = [], []
    with torch.inference_mode():
        for call in range(calls):
            ids = torch.randint(3, 1024, (1, args.chunk), generator=generator)
            started = time.process_time()
            llama(input_ids=ids, logits_to_keep=1, **{keyword: cache})
            seconds.append(time.process_time() - started)  # other processes of the machine do not count
            memory.append(resident())
            if (call + 1) % max(1, calls // 20) == 0:
                took, held = 1000 * seconds[-1], memory[-1] / 2**20
                print(f"{cache.get_seq_length():9d} tokens  {took:8.2f} ms  {held:8.1f} MiB", flush=True)
    return {
        "arguments": vars(args),
        "tokens": cache.get_seq_length(),
        "evictions": cache.evictions,
        **flatness(seconds, memory),
    }


def flatness(seconds: Sequence[float], memory: Sequence[int]) -> dict[str, Any]:
    """The last tenth of the calls beside the second tenth: seconds of each, and resident bytes after each."""
    tenth = len(seconds) // 10
    # The middle of each tenth: a full cache of the processor's, emptied by others, disturbs the mean.
    second, last = statistics.median(seconds[tenth : 2 * tenth]), statistics.median(seconds[-tenth:])
    before, after = statistics.median(memory[tenth : 2 * tenth]), statistics.median(memory[-tenth:])
    return {
        "ms_second_tenth": 1000 * second,
        "ms_last_tenth": 1000 * last,
        "time_ratio": last / second,
        "resident_second_tenth": before,
        "resident_last_tenth": after,
        "memory_ratio": after / before,
        "holds": abs(last / second - 1) <= 0.05 and abs(after / before - 1) <= 0.01,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a call; 1 decodes")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--strategy", default="liquid_fusion")
    parser.add_argument("--positions", choices=("absolute", "cache", "auto"), default="cache")
    parser.add_argument("--out", help="file for the result as JSON")
    args = parser.parse_args()
    if args.tokens < 20 * args.chunk:
        parser.error(f"--tokens {args.tokens}: 20 chunks of {args.chunk} at least, a tenth would be empty")
    torch.set_num_threads(1)
    result = stream(args)
    print(json.dumps(result, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
