"""Time the Rust core against torch.topk and numpy.argpartition on the same data, in one process.

Every comparison first checks that both give the same answer. Machines are noisy: contestants take turns, and the ratio
is that of their fastest rounds (of the medians in brackets)::

    python benches/compare.py [--rounds 30] [--json results.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from liquidfusion import _core


def race(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per round for each contestant, taking turns so that a busy moment hurts all of them."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            work()  # every contestant finds its own data in the caches, not its predecessor's
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return times


def scores(rows: int, n: int, seed: int) -> torch.Tensor:
    """Attention-like scores: a few large, most tiny."""
    return torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)) ** 8


def check(chosen: torch.Tensor, values: torch.Tensor, k: int) -> None:
    expected = values.topk(k).indices.sort().values.int()
    assert torch.equal(chosen, expected), "the selections differ"


def selection(rows: int, n: int, k: int, rounds: int) -> list[tuple[str, float, float]]:
    values = scores(rows, n, seed=n)
    array, out = values.numpy(), torch.empty(rows, k, dtype=torch.int32)
    _core.select(values, k, out, threads=1)
    check(out, values, k)
    times = race(
        {
            "core": lambda: _core.select(values, k, out, threads=1),
            "core, two threads": lambda: _core.select(values, k, out, threads=2),
            "torch.topk": lambda: torch.topk(values, k),
            "torch.topk, sorted=False": lambda: torch.topk(values, k, sorted=False),
            "numpy.argpartition": lambda: np.argpartition(array, n - k, axis=1),
            "copy": lambda: values.clone(),
        },
        rounds,
    )
    return report(f"keep {k} of {n}, {rows} rows", times, "core")


def ledger(slots: int, interval: int, threads: int) -> tuple[_core.Ledger, Callable[[], None], Callable[[], object]]:
    """A full ledger of 32 layers and 8 heads, how to bring it one token before a decision, and the decision."""
    shape = (32, 1, 8, slots)
    spec = _core.Spec("liquid_fusion", slots, eviction_interval=interval)
    positions, mass, peak = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape), torch.zeros(shape)
    core = _core.Ledger(spec, positions, mass, peak, threads=threads)
    chosen = torch.empty(shape[:3], dtype=torch.int64)
    # Fill, and go to the step before the second decision.
    for _ in range(slots + interval):
        core.begin([1], chosen)
        core.finish()
    values = scores(256, slots, seed=1).view(shape)
    mass.copy_(values)
    peak.copy_(scores(256, slots, seed=2).view(shape))
    while core.queue_lengths()[0] > interval + 1:
        core.begin([1], chosen)
        core.finish()
    saved = (positions.clone(), mass.clone(), peak.clone())
    queues = torch.empty(shape, dtype=torch.int32)
    core.queues(queues)
    seen = core.seen

    def rewind() -> None:
        for tensor, value in zip((positions, mass, peak), saved, strict=True):
            tensor.copy_(value)
        core.restore(queues, seen)

    def decide() -> None:
        core.begin([1], chosen)
        assert core.finish() == 256 * interval

    return core, rewind, decide


def eviction(rounds: int) -> list[tuple[str, float, float]]:
    """Evict 64 of 2,112 in 256 rows: the selection alone, and all that a decision does for 32 layers and 8 heads."""
    slots, interval = 2112, 64
    values = scores(256, slots, seed=1)
    array = values.numpy()
    out = torch.empty(256, slots - interval, dtype=torch.int32)
    _core.select(values, slots - interval, out, threads=1)
    check(out, values, slots - interval)
    times = race(
        {
            "core": lambda: _core.select(values, slots - interval, out, threads=1),
            "torch.topk": lambda: torch.topk(values, interval, largest=False),
            "torch.topk, sorted=False": lambda: torch.topk(values, interval, largest=False, sorted=False),
            "numpy.argpartition": lambda: np.argpartition(array, interval, axis=1),
        },
        rounds,
    )
    rows = report(f"evict {interval} of {slots}, 256 rows, selection alone", times, "core")

    decisions: dict[str, list[float]] = {"core, 1 thread": [], "core, 2 threads": []}
    ledgers = [ledger(slots, interval, threads) for threads in (1, 2)]
    for turn in range(rounds + 1):
        for seconds, (_, rewind, decide) in zip(decisions.values(), ledgers, strict=True):
            rewind()
            start = time.perf_counter()
            decide()
            if turn:
                seconds.append(time.perf_counter() - start)
    decisions["torch.topk"] = times["torch.topk"]
    return rows + report("a whole decision, 32 layers x 8 heads x 2112 slots", decisions, "core, 1 thread")


def chunk(rows: int, heads: int, new: int, rounds: int) -> list[tuple[str, float, float]]:
    """What prefill waits for: one layer's decision about `new` columns beside 2,048 full slots of every head."""
    slots = 2048
    shape = (1, rows, heads, slots)
    chosen, source = torch.empty(shape[:3], dtype=torch.int64), torch.empty(shape[1:], dtype=torch.int32)

    def inputs(new: int) -> tuple[torch.Tensor, ...]:
        columns = torch.arange(new, dtype=torch.int32).repeat(rows, 1)
        return columns, *(scores(rows * heads, slots + new, seed).view(rows, heads, -1) for seed in (1, 2))

    def call(core: _core.Ledger, columns: torch.Tensor, mass: torch.Tensor, peak: torch.Tensor) -> float:
        core.begin([columns.shape[1]] * rows, chosen)
        start = time.perf_counter()
        core.chunk(0, columns, mass, peak, source)
        taken = time.perf_counter() - start
        core.finish()
        return taken

    cores = [
        _core.Ledger(
            _core.Spec("liquid_fusion", slots),
            torch.full(shape, -1, dtype=torch.int32),
            torch.zeros(shape),
            torch.zeros(shape),
            threads=threads,
        )
        for threads in (1, 2)
    ]
    for core in cores:
        call(core, *inputs(slots))
    times: dict[str, list[float]] = {"1 thread": [], "2 threads": []}
    given = inputs(new)
    for turn in range(rounds + 1):
        for seconds, core in zip(times.values(), cores, strict=True):
            taken = call(core, *given)
            if turn:
                seconds.append(taken)
    return report(f"a chunk's decision, {rows * heads} heads x {slots + new} candidates", times, "1 thread")


def overhead(rounds: int) -> list[tuple[str, float, float]]:
    """Calls with next to nothing to do."""
    shape = (1, 1, 1, 4096)
    spec = _core.Spec("liquid_fusion", 4096)
    tensors = (torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape), torch.zeros(shape))
    core = _core.Ledger(spec, *tensors)
    chosen = torch.empty(1, 1, 1, dtype=torch.int64)
    times: dict[str, list[float]] = {"begin": [], "finish": []}
    for turn in range(max(rounds * 10, 200)):
        start = time.perf_counter()
        core.begin([1], chosen)
        middle = time.perf_counter()
        core.finish()
        end = time.perf_counter()
        if turn > 10:
            times["begin"].append(middle - start)
            times["finish"].append(end - middle)
    return report("call overhead", times, "begin")


def accumulation(
    shape: tuple[int, ...], dtype: torch.dtype, threads: int, rounds: int
) -> list[tuple[str, float, float]]:
    """Against a plain sum of the same bytes (as float32 whatever the dtype), with as many threads."""
    batch, heads, _, queries, columns = shape
    probabilities = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mass, peak = torch.zeros(batch, heads, columns), torch.zeros(batch, heads, columns)
    ages = torch.arange(queries - 1, -1, -1, dtype=torch.int32).repeat(batch, 1)
    _core.accumulate(probabilities, ages, [queries] * batch, mass, peak, 0.998, 0.9995, threads=threads)
    mean = probabilities.float().mean(2)
    fade = 0.998 ** ages[0].double()
    assert torch.allclose(mass, (mean * fade[:, None].float()).sum(2), rtol=1e-4), "the masses differ"
    flat = probabilities.view(torch.float32) if dtype != torch.float32 else probabilities
    raw = flat.nan_to_num(0.0)  # 16-bit patterns read as float32 may be NaN, which sums at the same speed but warns
    times = race(
        {
            "core": lambda: _core.accumulate(
                probabilities, ages, [queries] * batch, mass, peak, 0.998, 0.9995, threads=threads
            ),
            "plain sum": lambda: raw.sum(),
        },
        rounds,
    )
    size = probabilities.numel() * probabilities.element_size()
    name = f"accumulate {dtype} {list(shape)}, {size / 1e6:.0f} MB, {threads} thread{'s' * (threads > 1)}"
    return report(name, times, "core", size)


def report(
    title: str, times: dict[str, list[float]], base: str, size: int | None = None
) -> list[tuple[str, float, float]]:
    print(f"\n{title}")
    best, middle = min(times[base]), statistics.median(times[base])
    for name, seconds in times.items():
        low, median = min(seconds), statistics.median(seconds)
        rate = f"  {size / low / 1e9:6.1f} GB/s" if size else ""
        print(
            f"  {name:28} {low * 1e6:10.1f} µs (median {median * 1e6:10.1f}){rate}"
            f"  {low / best:7.2f} x {base} ({median / middle:.2f})"
        )
    return [(f"{title}: {name}", min(seconds), statistics.median(seconds)) for name, seconds in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="rounds per contestant (default: 30)")
    parser.add_argument("--json", help="also write all times in seconds to this file")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    torch.set_num_threads(1)
    print(_core.build_info(), f"torch {torch.__version__}, numpy {np.__version__}, times: fastest of {rounds} rounds")

    rows = selection(256, 2048, 1024, rounds)
    rows += eviction(rounds)
    rows += selection(8, 131072, 2048, max(rounds // 3, 3))
    rows += chunk(1, 8, 32768, rounds)
    rows += chunk(440, 4, 18, rounds)
    rows += overhead(rounds)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rows += accumulation((1, 8, 4, 64, 4096), dtype, threads, rounds)
            rows += accumulation((4, 8, 4, 1, 4096), dtype, threads, rounds)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([{"what": what, "seconds": low, "median": median} for what, low, median in rows], file, indent=2)


if __name__ == "__main__":
    main()
