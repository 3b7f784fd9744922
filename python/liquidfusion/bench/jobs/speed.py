"""How fast: decode and prefill beside what transformers does, on the same model in the same run.

Every figure is named by a sentence that ends in its unit; :mod:`liquidfusion.bench.report.curves` reads them.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from liquidfusion import KVCache, Strategy, cache_keyword, uninstall
from liquidfusion.bench import machine
from liquidfusion.bench.jobs import planning
from liquidfusion.bench.models import first_line
from liquidfusion.geometry import Geometry
from liquidfusion.hf.engine import row_nbytes

PARTS = ("decode", "compile", "generate", "batch", "prefill", "memory", "bookkeeping", "compiled_batch")
USUAL = PARTS[:6]
"""What is measured unless something else is asked for: minutes on a GPU."""


@dataclass
class Plan:
    """What to measure; lengths in tokens."""

    budget: int = 2048
    bits: int | tuple[int, int] | None = None
    contexts: tuple[int, ...] = (32768, 131072)
    prefill: tuple[int, ...] = (32768,)
    batch: int = 64
    chunk: int = 4096
    steps: int = 100
    parts: tuple[str, ...] = USUAL
    static: bool = False
    """Also measure StaticCache with torch.compile, whose compilation takes minutes."""
    profile: bool = False
    """Also tell which kernels a step with one row takes how long."""


@dataclass
class Results:
    """Figures by name, with what failed and why."""

    figures: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    report: Callable[[str], None] = print
    began: float = field(default_factory=time.perf_counter)

    def add(self, name: str, value: float) -> None:
        """Keep a figure and show it."""
        self.figures[name] = value
        self.report(f"        {name}: {shown(value)}")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Say what is measured from now on; what fails, as a cache that does not fit, is recorded: the rest goes on."""
        self.report(f"{time.perf_counter() - self.began:5.0f} s {name}")
        try:
            yield
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {first_line(error)[:300]}"
            traceback.clear_frames(error.__traceback__)  # they hold what did not fit
            self.report(f"        failed: {self.failures[name]}")
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def shown(value: float) -> str:
    """Write a count in full and a measurement with five digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def rows_of(count: int) -> str:
    """Write a number of rows."""
    return "one row" if count == 1 else f"{count} rows"


def repeat(step: Callable[[int], Any], indices: range) -> None:
    """Call `step` with each index."""
    for i in indices:
        step(i)


def fewer(most: int) -> Iterator[int]:
    """Yield numbers of rows to try, from the most down to one, a tenth less each time."""
    count = max(1, most)
    while count > 0:
        yield count
        count -= max(1, count // 10)


class Bench:
    """One model on one device."""

    def __init__(self, model: PreTrainedModel, plan: Plan, results: Results) -> None:
        self.model, self.plan, self.results = model, plan, results
        self.device, self.config = model.device, model.config.get_text_config(decoder=True)
        self.key, self.geometry = cache_keyword(model), Geometry.of(model)
        self.weights = planning.Weights.of(model)
        self.element = getattr(torch, self.geometry.dtype).itemsize
        self.ours = "KVCache" if plan.bits is None else f"KVCache(bits={plan.bits})"

    def run(self) -> None:
        """Measure every part of the plan."""
        with torch.inference_mode():
            for part in self.plan.parts:
                getattr(self, part)()
        self.results.add("all of this measurement, s", time.perf_counter() - self.results.began)

    @cached_property
    def rate(self) -> float:
        """Bytes a second that a copy reads and writes, measured once."""
        rate = machine.copy_rate(self.device)
        self.results.add("a copy's reads and writes, TB/s", rate / 1e12)
        return rate

    @cached_property
    def row(self) -> int:
        """Bytes of a row of our cache, by the formula."""
        return row_nbytes(self.model, "liquid_fusion", self.plan.budget, self.plan.bits)

    def seconds(self, work: Callable[[], Any], repeats: int = 1) -> float:
        """Median wall time of a piece of work."""
        times = []
        for _ in range(repeats):
            machine.synchronize(self.device)
            began = time.perf_counter()
            work()
            machine.synchronize(self.device)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def tokens(self, batch: int, count: int) -> Tensor:
        """Random token ids `[batch, count]`."""
        return torch.randint(1, self.config.vocab_size, (batch, count), device=self.device)

    def cache(self, batch: int, context: int, *, chunk: int = 0, **options: Any) -> KVCache:
        """A bounded cache that has seen `context` tokens, in calls of `chunk` (default: the plan's)."""
        cache = self.empty(**options)
        chunk = chunk or self.plan.chunk
        for start in range(0, context, chunk):
            size = min(chunk, context - start)
            self.model(self.tokens(batch, size), **{self.key: cache}, logits_to_keep=1)
        return cache

    def empty(self, **options: Any) -> KVCache:
        """A bounded cache as the plan has it."""
        return KVCache(self.model, budget=self.plan.budget, bits=self.plan.bits, **options)

    def step_time(self, cache: KVCache, batch: int) -> float:
        """Seconds per decode step, after warming up."""
        token = self.tokens(batch, 1)

        def step(_: int) -> None:
            self.model(token, **{self.key: cache}, logits_to_keep=1)

        repeat(step, range(5))
        return self.seconds(lambda: repeat(step, range(self.plan.steps))) / self.plan.steps

    def how(self, cache: KVCache, *, compiled: bool = False) -> str:
        """Say how a cache's steps ran.

        Raises
        ------
        RuntimeError
            They were to be compiled, and nothing was: the model is not served by a graph.
        """
        replayed = cache._graph is not None and cache._graph.captured
        if compiled and not replayed:
            raise RuntimeError("no CUDA graph serves this model here, and nothing is compiled without one")
        return ", compiled and replayed from a CUDA graph" if compiled else ", replayed from a CUDA graph" * replayed

    def floor(self, batch: int) -> float:
        """The seconds that reading the weights and the slots takes at the measured copy rate."""
        seconds = (self.weights.read(batch) + batch * self.row) / self.rate
        name = f"floor of a step with {rows_of(batch)}, weights and slots read once at a copy's rate, ms"
        self.results.add(name, 1e3 * seconds)
        return seconds

    def decode(self) -> None:
        """Step time at B = 1: ours after the shortest context, and what transformers offers at each."""
        with self.results.part(f"a step of {self.ours} with one row"):
            self._own_step(self.floor(1))
        for context in self.plan.contexts:
            self._timed(f"a step of DynamicCache with one row at {context} tokens", self._dynamic_step, context)
            if self.plan.static:
                name = f"a step of StaticCache with one row at {context} tokens, compiled"
                self._timed(name, self._static_step, context)

    def compile(self) -> None:
        """Step time at B = 1 with torch.compile between the kernels."""
        if self.device.type != "cuda":
            return
        with self.results.part(f"a step of {self.ours} with one row, compiled"):
            self._compiled_step(self.floor(1))

    def generate(self) -> None:
        """Time of a token of `model.generate`, against that of the step."""
        name = f"a token of model.generate with one row of {self.ours}"
        with self.results.part(name):
            self.results.add(f"{name}, ms", 1e3 * self._generated_token())

    def bookkeeping(self) -> None:
        """What eviction costs: the same steps with it and without."""
        for batch in (1, self.plan.batch):
            for interval in (None, 1):
                every = "as usual" if interval is None else "every step"
                with self.results.part(f"what eviction costs {rows_of(batch)} of {self.ours}, victims chosen {every}"):
                    self._eviction_cost(batch, interval)

    def _eviction_cost(self, batch: int, interval: int | None) -> None:
        parameters = {} if interval is None else {"eviction_interval": interval}
        strategy = Strategy("liquid_fusion", **parameters)
        on, off = (self.cache(batch, self.plan.budget + 64, strategy=strategy) for _ in range(2))
        off.evicting = False
        ratios = [self.step_time(on, batch) / self.step_time(off, batch) for _ in range(3)]
        every = "every step" if on.spec.interval == 1 else f"every {on.spec.interval} steps"
        name = f"a step of {self.ours} with {rows_of(batch)}, victims chosen {every}, over one without eviction"
        self.results.add(name, statistics.median(ratios))

    def batch(self) -> None:
        """Throughput: ours at the plan's batch and the largest that fits, transformers' at the longest context."""
        with self.results.part("what no exact engine exceeds on this device"):
            self._rooflines()
        with self.results.part(f"throughput of {self.ours} with {rows_of(self.plan.batch)}"):
            self.floor(self.plan.batch)
            self._throughput(self.plan.batch)
        if self.device.type != "cuda":
            return
        free = torch.cuda.mem_get_info(self.device)[0]
        most = int(0.8 * free / self.row)
        self._largest(most // 16 * 16 or most, self.ours, "", self._throughput)
        context = max(self.plan.contexts)
        most = int(0.95 * free / planning.full_row_bytes(self.geometry, context, self.element))

        makers: dict[str, Callable[[], Cache]] = {
            "DynamicCache": lambda: DynamicCache(config=self.config),
            "StaticCache": lambda: StaticCache(config=self.config, max_cache_len=context + 64),
        }
        for name, make in makers.items():
            self._largest(most, name, f" at {context} tokens", partial(self._their_throughput, name, make, context))

    def compiled_batch(self) -> None:
        """Throughput of ours at the plan's batch with torch.compile between the kernels."""
        if self.device.type == "cuda":
            with self.results.part(f"throughput of {self.ours} with {rows_of(self.plan.batch)}, compiled"):
                self._throughput(self.plan.batch, compiled=True)

    def prefill(self) -> None:
        """Whole-model prefill with scores against transformers' sdpa and eager attention."""
        for length in self.plan.prefill:
            prompt = self.tokens(1, length)

            def ours(prompt: Tensor = prompt) -> None:
                self.model(prompt, **{self.key: self.empty()}, logits_to_keep=1)

            def theirs(prompt: Tensor = prompt) -> None:
                cache = DynamicCache(config=self.config)
                self.model(prompt, **{self.key: cache}, logits_to_keep=1)

            def eager(theirs: Callable[[], None] = theirs) -> None:
                usual = self.config._attn_implementation
                # the whole matrix of probabilities: long prompts do not fit
                self.model.set_attn_implementation("eager")
                try:
                    theirs()
                finally:
                    self.model.set_attn_implementation(usual)

            def cudnn(theirs: Callable[[], None] = theirs) -> None:
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    theirs()

            works: dict[str, Callable[[], None]] = {self.ours: ours, "DynamicCache with sdpa": theirs}
            works["DynamicCache with eager attention"] = eager
            if self.device.type == "cuda":
                works["DynamicCache with cuDNN's attention"] = cudnn
            for cache, work in works.items():
                name = f"a prompt of {length} tokens in one call, {cache}"
                with self.results.part(name):
                    work()
                    self.results.add(f"{name}, ms", 1e3 * self.seconds(work, 3))

    def memory(self) -> None:
        """Peak memory of a long prompt in chunks, and of one chunk."""
        if self.device.type != "cuda":
            return
        context = max(self.plan.contexts)
        for length, chunk in ((context // 4, self.plan.chunk), (context, self.plan.chunk), (context, context)):
            name = f"a prompt of {length} tokens in calls of {chunk}, {self.ours}"
            with self.results.part(name):
                torch.cuda.reset_peak_memory_stats(self.device)
                seconds = self.seconds(partial(self.cache, 1, length, chunk=chunk))
                self.results.add(f"{name}, peak GiB", torch.cuda.max_memory_allocated(self.device) / 2**30)
                self.results.add(f"{name}, s", seconds)

    # Work whose caches are gone when it returns

    def _own_step(self, floor: float) -> None:
        cache = self.cache(1, max(2 * self.plan.budget, min(self.plan.contexts)))
        seconds = self.step_time(cache, 1)
        self._one_row(cache, self.how(cache), seconds, floor)
        self.results.add(f"one row of {self.ours}, bytes", cache.nbytes)
        self.results.add(f"one row of {self.ours} by the formula, bytes", self.row)

    def _compiled_step(self, floor: float) -> None:
        cache = self.cache(1, 2 * self.plan.budget, compile=True)
        first = self.seconds(lambda: self.model(self.tokens(1, 1), **{self.key: cache}, logits_to_keep=1))
        seconds = self.step_time(cache, 1)
        how = self.how(cache, compiled=True)
        self.results.add(f"the first step of {self.ours} with one row, with its compilation, s", first)
        self._one_row(cache, how, seconds, floor)

    def _one_row(self, cache: KVCache, how: str, seconds: float, floor: float) -> None:
        name = f"a step of {self.ours} with one row{how}"
        self.results.add(f"{name}, ms", 1e3 * seconds)
        self.results.add(f"{name}, over its floor", seconds / floor)
        if not self.plan.profile or self.device.type != "cuda":
            return
        token, steps = self.tokens(1, 1), 10
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            repeat(lambda _: self.model(token, **{self.key: cache}, logits_to_keep=1), range(steps))
            machine.synchronize(self.device)
        kernels: Counter[str] = Counter()
        for event in profiled.key_averages():
            # Without templates and arguments; what compilers have named tells little behind its beginning.
            short = re.split(r"[<(]", event.key.removeprefix("void "))[0].split("::")[-1][:60]
            kernels[short] += event.self_device_time_total
        self.results.add(f"all kernels of {name}, ms", kernels.total() / 1e3 / steps)
        for kernel, microseconds in kernels.most_common(12):
            self.results.add(f"{kernel} in {name}, ms", microseconds / 1e3 / steps)

    def _generated_token(self) -> float:
        model: Any = self.model
        prompt, cache = self.tokens(1, self.plan.chunk), self.empty()
        mask = torch.ones_like(prompt)

        def run(count: int) -> None:
            cache.reset()
            how = {self.key: cache, "max_new_tokens": count, "do_sample": False}
            model.generate(prompt, attention_mask=mask, **how)

        run(4)
        few, many = self.seconds(partial(run, 4)), self.seconds(partial(run, 4 + self.plan.steps))
        return (many - few) / self.plan.steps

    def _timed(self, name: str, work: Callable[[int], float], context: int) -> None:
        """Record milliseconds under a name; what `work` allocated is gone before the next part."""
        with self.results.part(name):
            self.results.add(f"{name}, ms", 1e3 * work(context))

    def _rooflines(self) -> None:
        device = planning.at_best(self.device, self.rate)
        self.results.add("bandwidth of the rooflines, TB/s", device.bandwidth / 1e12)
        for context in self.plan.contexts:
            rows, most = planning.roofline(self.model, [context], device)
            name = f"roofline of any exact engine at {context} tokens, {rows_of(rows)} in memory, tokens/s"
            self.results.add(name, most)

    def _largest(self, most: int, cache: str, where: str, work: Callable[[int], None]) -> None:
        """Measure a throughput with as many rows as fit: less of them as long as memory is what it fails for."""
        for count in fewer(most):
            name = f"throughput of {cache} with {rows_of(count)}{where}"
            with self.results.part(name):
                work(count)
            failure = self.results.failures.get(name, "")
            if not re.search("out ?of ?memory|alloc", failure, re.IGNORECASE):
                return

    def _throughput(self, batch: int, *, compiled: bool = False) -> None:
        # Short chunks leave memory for more rows.
        cache = self.cache(batch, self.plan.budget + 64, chunk=64, compile=compiled)
        seconds = self.step_time(cache, batch)
        how = self.how(cache, compiled=compiled)
        self.results.add(f"throughput of {self.ours} with {rows_of(batch)}{how}, tokens/s", batch / seconds)

    def _their_throughput(self, name: str, make: Callable[[], Cache], context: int, batch: int) -> None:
        cache = make()
        self._fill(cache, batch, context)
        figure = f"throughput of {name} with {rows_of(batch)} at {context} tokens, tokens/s"
        self.results.add(figure, batch / self._hf_step(cache, batch, context, steps=10))

    def _fill(self, cache: Cache, batch: int, context: int) -> None:
        for index in self.geometry.attention_layers:
            layer = self.geometry.layers[index]
            keys, values = (
                torch.randn((batch, layer.kv_heads, context, width), dtype=self.model.dtype, device=self.device)
                for width in (layer.key_dim, layer.value_dim)
            )
            cache.update(keys, values, index)

    def _dynamic_step(self, context: int) -> float:
        cache = DynamicCache(config=self.config)
        self._fill(cache, 1, context)
        return self._hf_step(cache, 1, context, steps=20)

    def _hf_step(self, cache: Cache, batch: int, context: int, steps: int) -> float:
        token, warm = self.tokens(batch, 1), 3
        positions = torch.arange(context, context + steps + warm, device=self.device)[:, None]

        def step(i: int) -> None:
            self.model(token, position_ids=positions[i : i + 1], **{self.key: cache}, logits_to_keep=1)

        repeat(step, range(warm))
        return self.seconds(lambda: repeat(step, range(warm, warm + steps))) / steps

    def _static_step(self, context: int) -> float:
        """StaticCache with the whole step compiled and graphed, as transformers recommends."""
        uninstall(self.model)
        cache = StaticCache(config=self.config, max_cache_len=context + 64)
        self._fill(cache, 1, context)
        torch.compiler.reset()
        compiled = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
        token, steps = self.tokens(1, 1), 20
        position = torch.full((1, 1), context, device=self.device)

        def step(_: int) -> None:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            compiled(token, position_ids=position, **{self.key: cache}, logits_to_keep=1)
            position.add_(1)

        repeat(step, range(4))
        seconds = self.seconds(lambda: repeat(step, range(steps))) / steps
        torch.compiler.reset()
        return seconds
