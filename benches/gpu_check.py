"""What must hold on a GPU and CI cannot see: one line a check, exit status 1 if one fails.

python benches/gpu_check.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liquidfusion as lf
from liquidfusion.install import cache_keyword


def model(dtype: torch.dtype, heads: int = 8, kv_heads: int = 2, head_dim: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=None,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(dtype).eval()


def run(llama: LlamaForCausalLM, strategy: str, budget: int, new: int = 150, **options: object) -> tuple:
    """Tokens, kept positions of every layer, and evictions of one batch with left padding."""
    torch.manual_seed(1)
    ids = torch.randint(1, 512, (3, 90), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[2, :31] = 0
    cache = lf.KVCache(llama, strategy, budget, **options)
    out = llama.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **{cache_keyword(llama): cache})
    positions = torch.stack([cache.positions(i).sort(-1).values for i in range(4)])
    return out.cpu(), positions, cache.evictions


def same(a: tuple, b: tuple) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def checks() -> Iterator[tuple[str, Callable[[], bool]]]:
    full, half = model(torch.float32), model(torch.bfloat16)
    for strategy in ("streaming", "h2o", "liquid_fusion"):
        for interval in (1, 5):
            options = {"eviction_interval": interval}

            def graph(s: str = strategy, o: dict = options) -> bool:
                return same(run(full, s, 60, **o), run(full, s, 60, graph=False, **o))

            def overlap(s: str = strategy, o: dict = options) -> bool:
                return same(run(half, s, 60, **o), run(half, s, 60, overlap=False, **o))

            def twice(s: str = strategy, o: dict = options) -> bool:
                return same(run(half, s, 60, **o), run(half, s, 60, **o))

            name = f"{strategy}, interval {interval}"
            yield f"{name}: graph equals eager", graph
            yield f"{name}: overlapped equals stalled", overlap
            yield f"{name}: two runs are bit-identical", twice

    def roomy() -> bool:
        torch.manual_seed(1)
        ids = torch.randint(1, 512, (2, 60), device="cuda")
        expected = full.generate(ids, max_new_tokens=60, do_sample=False)
        cache = lf.KVCache(full, budget=200)
        return torch.equal(
            expected, full.generate(ids, max_new_tokens=60, do_sample=False, **{cache_keyword(full): cache})
        )

    yield "budget above the length gives transformers' tokens", roomy

    def devices() -> bool:
        on_gpu = run(full, "liquid_fusion", 60)
        ids = on_gpu[0]
        cpu = model(torch.float32).cpu()
        mask = torch.ones_like(ids[:, :90])
        mask[0, :7] = mask[2, :31] = 0
        cache = lf.KVCache(cpu, "liquid_fusion", 60)
        out = cpu.generate(
            ids[:, :90], attention_mask=mask, max_new_tokens=150, do_sample=False, **{cache_keyword(cpu): cache}
        )
        kept = torch.stack([cache.positions(i).sort(-1).values for i in range(4)])
        return torch.equal(out, ids) and (kept == on_gpu[1]).float().mean().item() > 0.99

    yield "the CPU writes the same text and keeps the same tokens", devices

    def captured() -> bool:
        cache = lf.KVCache(half, budget=60)
        ids = torch.randint(1, 512, (1, 80), device="cuda")
        half.generate(ids, max_new_tokens=40, do_sample=False, **{cache_keyword(half): cache})
        return cache._decoder is not None and cache._decoder._captured is not None

    yield "generate replays a captured graph", captured


def main() -> int:
    failed = 0
    for name, check in checks():
        try:
            ok = check()
        except Exception as error:
            ok, name = False, f"{name} ({type(error).__name__}: {error})"
        failed += not ok
        print("ok  " if ok else "FAIL", name, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
