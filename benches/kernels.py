"""Time the kernels against what bounds them, in one run on one card.

Decode is measured against the time to read the slots at the card's own copy rate, the score kernel against the cuDNN
attention whose log-sum-exp it uses, the placing of a chunk against torch's operators for it. Correctness comes first;
the table comes last.

    python benches/kernels.py            # Llama-3.1-8B shape: 32 query heads, 8 kv heads, head_dim 128, bfloat16
    python benches/kernels.py --sweep    # other tile shapes and splits too
    compute-sanitizer --tool memcheck python benches/kernels.py --small    # each kernel on small shapes, no timing
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch


def load() -> ModuleType:
    """`liquidfusion.compute.kernels`, by its path where the package is not built."""
    try:
        from liquidfusion.compute import kernels
    except ImportError:
        path = Path(__file__).parents[1] / "python" / "liquidfusion" / "compute" / "kernels" / "__init__.py"
        spec = importlib.util.spec_from_file_location("liquidfusion_kernels", path)
        kernels = importlib.util.module_from_spec(spec)
        sys.modules["liquidfusion_kernels"] = kernels
        spec.loader.exec_module(kernels)
    return kernels


kernels = load()
decode_module = sys.modules[f"{kernels.__name__}.decode"]
prefill_module = sys.modules[f"{kernels.__name__}.prefill"]
RULES = {"mass_decay": 0.7 ** (1 / 64), "peak_decay": 0.9995, "value_weighted": True, "look_gap": 8}


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a call by device events, replayed from a CUDA graph so that host time does not count."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes per second of a device-to-device copy, read and written bytes counted."""
    source = torch.randint(0, 1 << 30, (1 << 29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    # A kernel, because a captured copy_ becomes a memory copy node, which was seen slower than any kernel.
    return 2 * source.nbytes / median_ms(lambda: torch.neg(source, out=target), 10) * 1e3


def decode_layers(
    batch: int, slots: int, layers: int, heads: tuple[int, int, int]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Arguments of `kernels.decode`, one tuple per layer, every slot filled."""
    query_heads, kv_heads, head_dim = heads
    ring = torch.randint(0, slots, (batch, kv_heads, 128), dtype=torch.int32, device="cuda")
    used = torch.zeros(batch, dtype=torch.int32, device="cuda")
    seen = torch.full((batch,), slots, dtype=torch.int32, device="cuda")
    for _ in range(layers):
        new = [
            torch.randn(batch, h, head_dim, dtype=torch.bfloat16, device="cuda")
            for h in (query_heads, kv_heads, kv_heads)
        ]
        slot = [torch.randn(batch, kv_heads, slots, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        positions = torch.randperm(slots, device="cuda").int().expand(batch, kv_heads, slots).contiguous()
        scores = [torch.rand(batch, kv_heads, slots, device="cuda") for _ in range(2)]
        yield *new, *slot, positions, *scores, ring, used, seen


def time_decode(layers: list[tuple[torch.Tensor, ...]]) -> float:
    """Microseconds per layer of the decode kernels, replayed from one CUDA graph over all layers."""

    def step() -> None:
        for arguments in layers:
            kernels.decode(*arguments, scale=arguments[0].shape[-1] ** -0.5, **RULES)

    return median_ms(step, 20) / len(layers) * 1e3


def bench_decode(rate: float, sweep: bool) -> list[str]:
    """Rows of the table: the decode step of one layer."""
    rows, slots = [], 2048
    # As many pairs of row and head as fill the multiprocessors evenly, and some that leave part of a round idle.
    for batch, heads in ((1, 8), (8, 8), (40, 8), (64, 8), (64, 4), (208, 4), (208, 8)):
        layers = list(decode_layers(batch, slots, 32 if batch == 1 else 6, (4 * heads, heads, 128)))
        read = 2 * batch * heads * slots * 128 * 2 + batch * heads * slots * (4 + 16)
        floor = read / rate * 1e6
        time = time_decode(layers)
        rows.append(
            f"decode B={batch} heads={heads} S={slots}: {time:.1f} us, "
            f"floor {floor:.1f} us, {floor / time:.0%} of the copy rate"
        )
        if sweep:
            original = decode_module._config
            for tile, stages, splits in itertools.product((64, 128), (2, 3), (1, 2, 4, 16, 32)):
                each = slots // splits
                if each < tile or not 0.5 <= batch * heads * splits / 132 <= 64:
                    continue
                decode_module._config = lambda *_, c=(splits, each, tile, stages): c
                rows.append(f"    tile {tile} stages {stages} splits {splits}: {time_decode(layers):.1f} us")
            decode_module._config = original
        del layers
    return rows


def prefill_inputs(tokens: int, heads: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """(q, k, v, ages) of one row, strided as a model leaves them."""
    query_heads, kv_heads, head_dim = heads
    q, k, v = (
        torch.randn(1, tokens, h, head_dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        for h in (query_heads, kv_heads, kv_heads)
    )
    return q, k, v, torch.arange(tokens - 1, -1, -1, dtype=torch.int32, device="cuda")[None]


def score_call(tokens: int, reach: int | None) -> tuple[Callable[[], object], Callable[[], object]]:
    """Calls of the fused attention and of the score kernel that follows it."""
    q, k, v, ages = prefill_inputs(tokens, (32, 8, 128))
    scale = 128**-0.5
    lse = prefill_module._fused(q, k, v, True, scale)[1]
    empty = k[:, :, :0]
    none = torch.zeros(1, 8, 0, device="cuda")
    count = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    arguments = (
        q,
        k,
        v,
        empty,
        empty,
        none.int(),
        ages,
        count,
        count,
        lse,
        none,
        none,
        scale,
        *list(RULES.values())[:3],
        0.0,
        0,
        RULES["look_gap"],
        reach,
        False,
    )
    return lambda: prefill_module._fused(q, k, v, True, scale), lambda: prefill_module._scores(*arguments)


def check_scores(reach: int | None, tokens: int = 2048) -> str:
    """Compare prefill's scores with float32 probabilities of a whole matrix, on fresh random inputs."""
    q, k, v, ages = prefill_inputs(tokens, (32, 8, 128))
    none = torch.zeros(1, 8, 0, device="cuda")
    empty = k[:, :, :0]
    options = {"scale": 128**-0.5, **RULES}
    out, mass, peak = kernels.prefill(
        q, k, v, empty, empty, none.int(), ages, none, none, padded=False, full=True, peak_reach=reach, **options
    )
    x = torch.matmul(q.double(), k.double().repeat_interleave(4, 1).transpose(-1, -2)) * options["scale"]
    x.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").triu(1), -torch.inf)
    p = x.softmax(-1)
    errors = [(out.double() - p @ v.double().repeat_interleave(4, 1)).norm() / out.double().norm()]
    p = p.unflatten(1, (8, 4)).mean(2)
    distance = ages[:, None, None, :] - ages[:, None, :, None]
    p = p * (distance >= RULES["look_gap"])
    near = p if reach is None else p * (distance <= reach)
    weight = v.double().norm(dim=-1) / k.double().norm(dim=-1)
    for actual, looks, decay, reduce in (
        (mass, p, RULES["mass_decay"], torch.sum),
        (peak, near, RULES["peak_decay"], torch.amax),
    ):
        expected = reduce(looks * decay ** ages.double()[:, None, :, None], 2) * weight
        errors.append((actual.double() - expected).norm() / expected.norm())
    errors = ", ".join(f"{name} {error:.1e}" for name, error in zip(("output", "mass", "peak"), errors, strict=True))
    return f"relative errors at {tokens} tokens, peak reach {reach}: {errors}"


def bench_prefill(lengths: list[int], sweep: bool) -> list[str]:
    """Rows of the table: the score kernel of one layer beside the attention it rides on."""
    rows = [check_scores(None), check_scores(256)]
    for tokens in lengths:
        attention, score = score_call(tokens, None)
        repeats = 20 if tokens <= 16384 else 5
        base = median_ms(attention, repeats)
        for reach in (None, 2048):
            time = median_ms(score_call(tokens, reach)[1], repeats)
            rows.append(
                f"score {tokens} tokens, peak reach {reach}: {time:.2f} ms, cuDNN attention {base:.2f} ms, "
                f"ratio {time / base:.2f}"
            )
        if sweep and tokens <= 65536:
            original = prefill_module._tiles
            for tiles in ((128, 128, 8, 3), (128, 128, 4, 2), (128, 64, 8, 3), (128, 64, 4, 3), (256, 64, 8, 2)):
                prefill_module._tiles = lambda *_, t=tiles: t
                time = median_ms(score, repeats)
                rows.append(f"    columns, rows, warps, stages {tiles}: {time:.2f} ms, ratio {time / base:.2f}")
            prefill_module._tiles = original
    return rows


def place_case(rows: int, heads: int, slots: int, columns: int) -> tuple[torch.Tensor, ...]:
    """(source, new, stored) where every column gets a slot of its own."""
    new = torch.randn(rows, columns, heads, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    stored = torch.randn(rows, heads, slots, 128, dtype=torch.bfloat16, device="cuda")
    source = torch.full((rows, heads, slots), -1, dtype=torch.int32, device="cuda")
    chosen = torch.rand(rows, heads, slots, device="cuda").argsort(-1)[..., :columns]
    source.scatter_(2, chosen, torch.arange(columns, dtype=torch.int32, device="cuda").expand_as(chosen))
    return source, new, stored


def place_with_torch(source: torch.Tensor, new: torch.Tensor, stored: torch.Tensor) -> None:
    """What runs where the kernels do not: it rewrites every slot."""
    column = source.clamp(min=0).long()[..., None].expand(-1, -1, -1, new.shape[3])
    torch.where((source >= 0)[..., None], new.gather(2, column), stored, out=stored)


def bench_place(rate: float) -> list[str]:
    """Rows of the table: a chunk's keys into the slots of one layer."""
    found = []
    for rows, heads, columns in ((1, 8, 2048), (64, 8, 256), (436, 4, 37), (872, 4, 18)):
        case = place_case(rows, heads, 2048, columns)
        expected = case[2].clone()
        place_with_torch(*case[:2], expected)
        kernels.place(*case)
        assert torch.equal(case[2], expected)
        time, generic = (median_ms(partial(f, *case), 10) * 1e3 for f in (kernels.place, place_with_torch))
        floor = (case[0].nbytes + 2 * case[1].nbytes) / rate * 1e6
        found.append(
            f"place B={rows} heads={heads} S=2048, {columns} columns: {time:.0f} us, floor {floor:.0f} us, "
            f"torch {generic:.0f} us, ratio {time / generic:.3f}"
        )
    return found


def small() -> None:
    """Run every kernel once on small shapes with slots to spare and padding: for compute-sanitizer."""
    for arguments in decode_layers(2, 200, 2, (8, 2, 80)):
        arguments[5][1, :, 100:] = -1
        kernels.decode(*arguments, scale=0.1, window=90, **RULES)
    q, k, v, ages = prefill_inputs(300, (8, 2, 128))
    keys, values = (torch.randn(1, 2, 100, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    positions = torch.randperm(100, device="cuda").int().expand(1, 2, 100).contiguous()
    scores = torch.rand(1, 2, 100, device="cuda")
    for padding, window, softcap, reach in ((0, 0, 0.0, None), (0, 0, 0.0, 64), (7, 0, 0.0, 64), (7, 50, 5.0, None)):
        ages[:, :padding] = -1
        kernels.prefill(
            q,
            k,
            v,
            keys,
            values,
            positions,
            ages,
            scores,
            scores,
            scale=0.1,
            softcap=softcap,
            window=window,
            first_position=100,
            peak_reach=reach,
            **RULES,
        )
    kernels.place(*place_case(2, 3, 200, 50))
    torch.cuda.synchronize()
    print("every kernel ran")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[16384, 65536, 131072], help="prompt lengths")
    parser.add_argument("--sweep", action="store_true", help="also time other tile shapes and splits")
    parser.add_argument("--small", action="store_true", help="run each kernel once on small shapes, without timing")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.small:
        small()
        return
    rate = copy_rate()
    rows = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate / 1e12:.2f} TB/s"]
    rows += bench_prefill(options.tokens, options.sweep)
    rows += bench_decode(rate, options.sweep)
    rows += bench_place(rate)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
