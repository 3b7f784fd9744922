"""Time the Rust core beside torch and numpy on the same data, and beside another build of itself, in one process.

Machines are noisy: contestants take turns, and the ratio is that of their fastest rounds (of the medians in brackets).
Where the core works on one thread that thread's CPU time counts, else real time. Builds must choose the same victims::

    python benches/compare.py [--rounds 30] [--beside OLD/_core.abi3.so] [--json results.json]
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from types import ModuleType

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
    """Attention-like scores: a few large, most tiny; none so small that its average is 0 in one build only."""
    return torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)).pow(8).clamp_min(1e-20)


def build(path: str) -> ModuleType:
    """Another build of the extension, whose interface must be this one's as far as it is used here."""
    spec = importlib.util.spec_from_file_location("_core", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Builds = dict[str, ModuleType]


def clock(name: str) -> Callable[[], float]:
    """What a contestant's time is taken by."""
    return time.thread_time if name.endswith("1 thread") else time.perf_counter


def liquid_fusion(core: ModuleType, slots: int, **parameters: float) -> _core.Spec:
    """The default strategy, by mass and peak alone, with the same shares in a build from before distinctness."""
    if hasattr(core, "parameters"):
        parameters["distinct_ratio"] = 0.0
    return core.Spec("liquid_fusion", slots, heavy_ratio=0.75, recent_ratio=0.25, peak_ratio=0.6, **parameters)


def ledger(
    core: ModuleType, batch: int, slots: int, interval: int, threads: int
) -> tuple[Callable[[], None], Callable[[], object], torch.Tensor]:
    """A full ledger of 32 layers and 8 heads: how to bring it before a decision, the decision, and its positions."""
    shape = (32, batch, 8, slots)
    spec = liquid_fusion(core, slots, eviction_interval=interval)
    positions, mass, peak = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape), torch.zeros(shape)
    one = core.Ledger(spec, positions, mass, peak, threads=threads)
    chosen = torch.empty(shape[:3], dtype=torch.int64)
    values = [scores(256 * batch, slots, seed).view(shape) for seed in (1, 2)]

    def step() -> object:
        one.begin([1] * batch, chosen)
        return one.finish()

    for _ in range(slots + interval):
        step()

    def approach() -> None:
        mass.copy_(values[0])
        peak.copy_(values[1])
        for _ in range(interval - 1):
            step()
        one.begin([1] * batch, chosen)

    def decide() -> None:
        assert one.finish() == 256 * batch * interval

    return approach, decide, positions


def decisions(builds: Builds, batch: int, slots: int, interval: int, rounds: int) -> list[tuple[str, float, float]]:
    """Decisions of 32 layers and 8 heads, beside what torch and numpy take for one of the two selections in them."""
    times: dict[str, list[float]] = {}
    contestants: dict[str, tuple[Callable[[], None], Callable[[], object]]] = {}
    stored = []
    for name, core in builds.items():
        for threads in (1, 2):
            approach, decide, positions = ledger(core, batch, slots, interval, threads)
            contestants[f"{name}, {threads} thread{'s' * (threads > 1)}"] = approach, decide
            stored.append(positions)
    values = scores(256 * batch, slots, seed=1)
    array = values.numpy()
    contestants["torch.topk, one selection"] = (lambda: None, lambda: torch.topk(values, slots // 2))
    contestants["numpy.argpartition, one"] = (lambda: None, lambda: np.argpartition(array, slots // 2, axis=1))
    for turn in range(rounds + 1):
        for name, (approach, work) in contestants.items():
            approach()
            now = clock(name)
            start = now()
            work()
            if turn:
                times.setdefault(name, []).append(now() - start)
    assert all(torch.equal(stored[0], other) for other in stored), "the victims differ"
    return report(
        f"a decision, 32 layers x {batch} rows x 8 heads x {slots} slots, interval {interval}", times, "core, 1 thread"
    )


def chunk(builds: Builds, rows: int, heads: int, new: int, rounds: int) -> list[tuple[str, float, float]]:
    """What prefill waits for: one layer's decision about `new` columns beside 2,048 full slots of every head."""
    slots = 2048
    shape = (1, rows, heads, slots)
    chosen, source = torch.empty(shape[:3], dtype=torch.int64), torch.empty(shape[1:], dtype=torch.int32)

    def inputs(new: int) -> tuple[torch.Tensor, ...]:
        columns = torch.arange(new, dtype=torch.int32).repeat(rows, 1)
        return columns, *(scores(rows * heads, slots + new, seed).view(rows, heads, -1) for seed in (1, 2))

    def call(
        one: _core.Ledger, now: Callable[[], float], columns: torch.Tensor, mass: torch.Tensor, peak: torch.Tensor
    ) -> float:
        one.begin([columns.shape[1]] * rows, chosen)
        start = now()
        one.chunk(0, columns, mass, peak, source)
        taken = now() - start
        one.finish()
        return taken

    times: dict[str, list[float]] = {}
    ledgers = {}
    for name, core in builds.items():
        for threads in (1, 2):
            tensors = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape), torch.zeros(shape)
            one = core.Ledger(liquid_fusion(core, slots), *tensors, threads=threads)
            call(one, time.perf_counter, *inputs(slots))
            ledgers[f"{name}, {threads} thread{'s' * (threads > 1)}"] = one
    given, sources = inputs(new), dict[int, torch.Tensor]()
    for turn in range(rounds + 1):
        for name, one in ledgers.items():
            taken = call(one, clock(name), *given)
            sources.setdefault(turn, source.clone())
            assert torch.equal(source, sources[turn]), "the victims differ"
            if turn:
                times.setdefault(name, []).append(taken)
    return report(f"a chunk's decision, {rows * heads} heads x {slots + new} candidates", times, "core, 1 thread")


def overhead(builds: Builds, rounds: int) -> list[tuple[str, float, float]]:
    """Calls with next to nothing to do, and making a ledger of one slot tensor of 64 slots."""
    times: dict[str, list[float]] = {}
    for name, core in builds.items():
        shape = (1, 1, 1, 4096)
        tensors = (torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape), torch.zeros(shape))
        small = [tensor[..., :64].contiguous() for tensor in tensors]
        one = core.Ledger(liquid_fusion(core, 4096), *tensors)
        chosen = torch.empty(1, 1, 1, dtype=torch.int64)
        seconds: list[list[float]] = [[], [], []]
        for turn in range(max(rounds * 10, 200)):
            marks = [time.perf_counter()]
            for work in (
                lambda one=one, chosen=chosen: one.begin([1], chosen),
                lambda one=one: one.finish(),
                lambda core=core, small=small: core.Ledger(liquid_fusion(core, 64), *small),
            ):
                work()
                marks.append(time.perf_counter())
            if turn > 10:
                for i, taken in enumerate(seconds):
                    taken.append(marks[i + 1] - marks[i])
        times |= {f"{name}, {what}": taken for what, taken in zip(("begin", "finish", "Ledger"), seconds, strict=True)}
    return report("call overhead", times, "core, begin")


def accumulation(builds: Builds, shape: tuple[int, ...], threads: int, rounds: int) -> list[tuple[str, float, float]]:
    """Against a plain sum of the same numbers, with as many threads."""
    batch, heads, _, queries, columns = shape
    probabilities = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mass, peak = torch.zeros(batch, heads, columns), torch.zeros(batch, heads, columns)
    ages = torch.arange(queries - 1, -1, -1, dtype=torch.int32).repeat(batch, 1)
    _core.accumulate(probabilities, ages, [queries] * batch, mass, peak, 0.998, 0.9995, threads=threads)
    mean = probabilities.mean(2)
    fade = 0.998 ** ages[0].double()
    assert torch.allclose(mass, (mean * fade[:, None].float()).sum(2), rtol=1e-4), "the masses differ"

    def accumulate(core: ModuleType) -> Callable[[], object]:
        arguments = (probabilities, ages, [queries] * batch, mass, peak, 0.998, 0.9995)
        return lambda: core.accumulate(*arguments, threads=threads)

    contestants = {name: accumulate(core) for name, core in builds.items()}
    times = race({**contestants, "plain sum": lambda: probabilities.sum()}, rounds)
    size = probabilities.numel() * probabilities.element_size()
    name = f"accumulate {list(shape)}, {size / 1e6:.0f} MB, {threads} thread{'s' * (threads > 1)}"
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
    parser.add_argument("--beside", help="another build of the extension, to be timed in turn with this one")
    parser.add_argument("--json", help="also write all times in seconds to this file")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    torch.set_num_threads(1)
    print(_core.build_info(), f"torch {torch.__version__}, numpy {np.__version__}, times: fastest of {rounds} rounds")

    builds: Builds = {"core": _core}
    if arguments.beside:
        builds["other build"] = build(arguments.beside)
    rows = decisions(builds, 1, 2112, 64, rounds)
    rows += decisions(builds, 1, 2048, 64, rounds)
    rows += decisions(builds, 64, 2048, 1, max(rounds // 10, 3))
    rows += chunk(builds, 1, 8, 512, rounds)
    rows += chunk(builds, 1, 8, 32768, rounds)
    rows += chunk(builds, 440, 4, 18, rounds)
    rows += overhead(builds, rounds)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows += accumulation(builds, (1, 8, 4, 64, 4096), threads, rounds)
        rows += accumulation(builds, (4, 8, 4, 1, 4096), threads, rounds)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([{"what": what, "seconds": low, "median": median} for what, low, median in rows], file, indent=2)


if __name__ == "__main__":
    main()
