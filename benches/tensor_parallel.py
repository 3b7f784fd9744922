"""Tensor parallel decoding: LiquidFusion beside transformers' own caches, heads split over the processes.

torchrun --nproc-per-node 2 benches/tensor_parallel.py --shape llama-3.1-8b --context 32768 --out result.json
torchrun --nproc-per-node 2 benches/tensor_parallel.py --shape llama-3.1-8b --parts batch --compile --profile
torchrun --nproc-per-node 2 benches/tensor_parallel.py --shape custom --device cpu --context 128 --budget 32 --steps 4

Weights are random and every process makes only its own share of them. Contexts of transformers' caches are random keys
and values put there directly; a KVCache is filled by the model itself, in chunks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import liquidfusion as lf
from liquidfusion.bench.jobs.shapes import SHAPES

LLAMA_31_8B = {name: value for name, value in SHAPES["llama-3.1-8b"].items() if name != "model_type"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA_31_8B,
    "llama-3.1-70b": LLAMA_31_8B
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "custom": {
        "vocab_size": 512,
        "hidden_size": 64,
        "head_dim": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
    },
}
PARTS = ("tokens", "one", "batch", "rivals", "largest")
PROFILED = 8
"""Steps that a profile is made of."""
CHUNK_TOKENS = 16384
"""Tokens of a prefill chunk, over all rows."""
KERNELS = {
    "collectives": ("nccl", "c10d::", "one_shot_all_reduce"),
    "attention over slots": ("_decode", "_attend", "_merge", "_combine"),
    "matrix products": ("gemm", "gemv", "cutlass", "nvjet", "splitK", "aten::mm", "aten::addmm"),
}
"""Parts of the names of kernels, by what they do."""


class Collectives(TorchDispatchMode):
    """Counts the collective operations that run inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is DTensor for t in types):
            return NotImplemented  # a DTensor's operation comes again as what it is made of
        name = func.__name__.split(".")[0].rstrip("_")
        if "c10d" in func.namespace and not name.startswith(("wait", "_wrap")):
            self.counts[name.replace("all_reduce", "allreduce")] += 1
        return func(*args, **(kwargs or {}))


def config(shape: str, layers: int | None, **more: Any) -> LlamaConfig:
    values = {**SHAPES[shape], "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, **more}
    if layers is not None:
        values["num_hidden_layers"] = layers
    return LlamaConfig(**values)


class Blank(LlamaForCausalLM):
    """A model whose weights are left as they are: transformers draws them one by one, which takes minutes for 8 B."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass


def build(shape: LlamaConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model with random weights, split over the processes if there are several; each draws its own share."""
    parallel = {"distributed_config": plan()} if dist.get_world_size() > 1 else {"device_map": device}
    model = Blank.from_pretrained(None, config=shape, state_dict={}, dtype=dtype, **parallel).eval()
    for parameter in model.parameters():
        whole = not isinstance(parameter, DTensor)
        own = parameter.data if whole else parameter.data.to_local()
        own.fill_(1) if own.dim() == 1 else own.normal_(0, shape.initializer_range)
        if whole:  # the same in every process
            dist.broadcast(own, 0)
    return model


STARTED = time.perf_counter()


def say(what: str) -> None:
    """Tell how far the run is, on the first process."""
    if dist.get_rank() == 0:
        print(f"[{time.perf_counter() - STARTED:.0f} s] {what}", flush=True)


def plan() -> Any:
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_plan="auto")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> int:
    """Most bytes held so far: of the device's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def over_ranks(value: float, device: torch.device, how: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, how)
    return float(tensor)


class Bench:
    """One model with what is measured on it."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.config = config(args.shape, args.layers)
        say("building the model")
        self.model = build(self.config, self.dtype, device)
        say(f"built on {device}")
        self.keyword = lf.cache_keyword(self.model)
        self.kv_heads = self.config.num_key_value_heads // dist.get_world_size()
        # torchrun allows every process one thread, with which the core needs seconds for a chunk of hundreds of rows.
        self.threads = max(1, (os.cpu_count() or 1) // dist.get_world_size())
        self.modes: dict[str, dict[str, bool]] = {"liquidfusion": {}}
        if args.compile:
            self.modes["liquidfusion, compile"] = {"compile": True}

    def call(self, ids: Tensor, cache: Any) -> Tensor:
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self.keyword: cache})
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def ours(self, batch: int, context: int, **options: Any) -> lf.KVCache:
        """A KVCache that has seen `context` tokens of every row."""
        cache = lf.KVCache(self.model, self.args.strategy, self.args.budget, threads=self.threads, **options)
        generator = torch.Generator().manual_seed(1)
        size = max(16, CHUNK_TOKENS // batch)
        for start in range(0, context, size):
            columns = min(size, context - start)
            ids = torch.randint(3, self.config.vocab_size, (batch, columns), generator=generator)
            self.call(ids.to(self.device), cache)
        return cache

    def theirs(self, kind: str, batch: int, context: int) -> DynamicCache | StaticCache:
        """A cache of transformers' that holds `context` random keys and values of every row."""
        steps = self.args.steps + self.args.warmup + 1 + PROFILED
        cache = DynamicCache() if kind == "dynamic" else StaticCache(self.config, max_cache_len=context + steps)
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        for layer in range(self.config.num_hidden_layers):
            shape = (batch, self.kv_heads, context, width)
            cache.update(*(torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2)), layer)
        return cache

    def measure(self, name: str, batch: int, make: Callable[[], Any], count: bool = True) -> dict[str, Any]:
        """Milliseconds of a decode step, tokens a second, peak memory and collectives of a step.

        Where a step is compiled its collectives are not counted: torch does not compile what it is watching.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        row: dict[str, Any] = {"cache": name, "batch": batch, "graph": None, "problem": None}
        cache = None
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cache = make()
                ids = torch.full((batch, 1), 5, device=self.device)
                say(f"filled {batch} rows of {name}")
                with Collectives() if count else nullcontext() as collectives:
                    ids = self.call(ids, cache)
                row["collectives_per_step"] = dict(collectives.counts) if collectives else None
                for _ in range(self.args.warmup):
                    ids = self.call(ids, cache)
                synchronize(self.device)
                dist.barrier()
                started = time.perf_counter()
                for _ in range(self.args.steps):
                    ids = self.call(ids, cache)
                synchronize(self.device)
                seconds = (time.perf_counter() - started) / self.args.steps
            row["problem"] = next((str(w.message) for w in caught if "graph" in str(w.message)), None)
            if isinstance(cache, lf.KVCache):
                row["graph"] = cache._graph is not None and cache._graph.captured
                row["cache_bytes"] = cache.nbytes
            seconds = over_ranks(seconds, self.device, dist.ReduceOp.MAX)
            peak = over_ranks(memory(self.device), self.device, dist.ReduceOp.MAX)
            if self.args.profile:
                row["profile_ms"] = self.profile(lambda: self.call(ids, cache))
            row |= {"ms_per_step": 1000 * seconds, "tokens_per_s": batch / seconds, "peak_bytes": int(peak)}
        except torch.OutOfMemoryError as error:
            # Every process holds the same bytes, so all of them stop here.
            row["problem"] = f"out of memory: {str(error).splitlines()[0]}"
        return row

    def measure_ours(self, mode: str, batch: int, context: int) -> dict[str, Any]:
        """`measure` for a KVCache that has seen `context` tokens of every row."""
        options = self.modes[mode]
        return self.measure(mode, batch, lambda: self.ours(batch, context, **options), count=not options)

    def profile(self, step: Callable[[], Any]) -> dict[str, float]:
        """Milliseconds of the device's kernels in one step by what they do, and of the whole step (`span`).

        `collective kernels` is how many of them a step runs.
        """
        device = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if device else activity.CPU]) as profiler:
            for _ in range(PROFILED):
                step()
            synchronize(self.device)
        found: Counter[str] = Counter()
        kernels = [event for event in profiler.events() if not device or event.device_type.name == "CUDA"]
        for event in kernels:
            kind = next((kind for kind, names in KERNELS.items() if any(n in event.name for n in names)), "other")
            found[kind] += (event.device_time_total if device else event.self_cpu_time_total) / 1000 / PROFILED
            found["collective kernels"] += (kind == "collectives") / PROFILED
        ends = [time for event in kernels for time in (event.time_range.start, event.time_range.end)]
        found["span"] = (max(ends) - min(ends)) / 1000 / PROFILED
        return {kind: round(ms, 3) for kind, ms in found.items()}

    def largest_batch(self) -> int:
        """Rows whose caches fit beside the weights, chunk and logits, by what they need; a multiple of 8."""
        if self.device.type != "cuda":
            return 2 * max(self.args.batch)
        gc.collect()
        torch.cuda.empty_cache()
        free = over_ranks(torch.cuda.mem_get_info(self.device)[0], self.device, dist.ReduceOp.MIN)
        width, size = self.config.head_dim, torch.finfo(self.dtype).bits // 8
        slots = self.config.num_hidden_layers * self.kv_heads * self.args.budget
        # Positions and scores on the device, staged scores; float32 logits of every row twice.
        row = slots * (2 * width * size + 12 + 8) + 3 * 4 * self.config.vocab_size
        chunk = CHUNK_TOKENS * (self.config.hidden_size * 12 + self.config.intermediate_size * 6)
        return max(8, int((0.9 * free - chunk) / row) // 8 * 8)


def reduce_in_one_shot(model: PreTrainedModel, limit: int) -> None:
    """Let compiled steps sum up to `limit` bytes by reading the other GPUs' memory, without NCCL's rounds.

    There is no public switch: torch keeps both names private while symmetric memory is experimental.
    """
    from torch._inductor import config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    for mesh in {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}:
        enable_symm_mem_for_group(mesh.get_group().group_name)
    inductor._collective.auto_select = True
    inductor._collective.one_shot_all_reduce_threshold_bytes = limit


def equal_tokens(device: torch.device) -> dict[str, Any]:
    """Greedy tokens and kept positions of a small float32 model, one process against all of them."""
    shape = config("custom", 3, initializer_range=0.25)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder, 0)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder[0])
    dist.barrier()
    alone = LlamaForCausalLM.from_pretrained(folder[0], dtype=torch.float32).to(device).eval()
    parallel = {"distributed_config": plan()} if dist.get_world_size() > 1 else {"device_map": device}
    split = LlamaForCausalLM.from_pretrained(folder[0], dtype=torch.float32, **parallel).eval()
    ids = torch.randint(3, 512, (2, 90), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :31] = 0
    results = {}
    heads = shape.num_key_value_heads // dist.get_world_size()
    own = slice(dist.get_rank() * heads, (dist.get_rank() + 1) * heads)
    for strategy in ("streaming", "h2o", "liquid_fusion"):
        tokens, kept = [], []
        for model in (alone, split):
            cache = lf.KVCache(model, strategy, 40)
            given = {lf.cache_keyword(model): cache}
            out = model.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False, **given)
            tokens.append(out.cpu())
            positions = torch.stack([cache.positions(layer) for layer in range(len(cache))]).sort(-1).values
            kept.append(positions[:, :, own] if model is alone else positions)
        same = torch.equal(*tokens) and torch.equal(*kept)
        results[strategy] = bool(over_ranks(same, device, dist.ReduceOp.MIN))
    dist.barrier()
    return results


def refuse(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Name what cannot be, before anything is built."""
    if "WORLD_SIZE" not in os.environ:
        parser.error("it needs torchrun: torchrun --nproc-per-node 2 benches/tensor_parallel.py ...")
    processes, heads = int(os.environ["WORLD_SIZE"]), SHAPES[args.shape]["num_key_value_heads"]
    if heads % processes:
        parser.error(f"{processes} processes cannot share the {heads} key/value heads of {args.shape}; a divisor can")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", processes)), torch.cuda.device_count()
    if args.device == "cuda" and here > gpus:
        parser.error(f"{here} processes need {here} GPUs, {gpus} found")
    try:
        lf.Strategy(args.strategy).spec(args.budget)
    except lf.ConfigError as error:
        parser.error(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="custom")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape's own")
    parser.add_argument("--strategy", default="liquid_fusion")
    parser.add_argument("--budget", type=int, default=2048, help="slots in tokens")
    parser.add_argument("--context", type=int, default=32768, help="tokens before the measured steps, one row")
    parser.add_argument("--batch", type=int, nargs="+", default=[64], help="rows of the throughput rows")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--compile", action="store_true", help="also with compile=True, the largest batch only so")
    parser.add_argument(
        "--one-shot",
        type=int,
        metavar="BYTES",
        help="let compiled all-reduces of so many bytes or fewer read the other GPUs at once (experimental in torch)",
    )
    parser.add_argument("--profile", action="store_true", help="also the device's time in each kind of kernel")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="file for the result as JSON")
    args = parser.parse_args()
    refuse(parser, args)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="DTensor random operators")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if args.device == "cpu":
        device = torch.device("cpu")
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    else:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)

    result: dict[str, Any] = {
        "processes": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": vars(args),
    }
    if "tokens" in args.parts:
        result["tokens_equal"] = equal_tokens(device)
        say(f"tokens and positions equal one process: {result['tokens_equal']}")
    rows: list[dict[str, Any]] = []
    result["rows"] = rows

    def keep(row: dict[str, Any]) -> None:
        """What is measured is shown and written at once."""
        rows.append(row)
        say(json.dumps(row))
        if dist.get_rank() == 0 and args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=2)

    with torch.no_grad():
        bench = Bench(args, device)
        if args.one_shot is not None:
            reduce_in_one_shot(bench.model, args.one_shot)
        # As many tokens as fill the slots and evict: a bounded cache steps alike after any longer context.
        filled = args.budget + 16
        sizes = [(1, args.context)] if "one" in args.parts else []
        sizes += [(batch, filled) for batch in args.batch] if "batch" in args.parts else []
        for batch, context in sizes:
            for name in bench.modes:
                keep(bench.measure_ours(name, batch, context))
        if "rivals" in args.parts:
            for kind in ("dynamic", "static"):
                name = f"{kind.title()}Cache"
                keep(bench.measure(name, 1, lambda kind=kind: bench.theirs(kind, 1, args.context)))
            keep(bench.measure("liquidfusion, no graph", 1, lambda: bench.ours(1, args.context, graph=False)))
            for batch in args.batch:
                keep(bench.measure("DynamicCache", batch, lambda n=batch: bench.theirs("dynamic", n, args.context)))
        if "largest" in args.parts:
            keep(bench.measure_ours(list(bench.modes)[-1], bench.largest_batch(), filled))
    counts = {row["cache"]: row.get("collectives_per_step") for row in rows if row["batch"] == 1}
    if {"liquidfusion", "DynamicCache"} <= set(counts):
        result["collectives_added"] = counts["liquidfusion"] != counts["DynamicCache"]
    if dist.get_rank() == 0:
        show(result)
    gc.collect()  # NCCL waits for every graph that holds one of its kernels
    dist.barrier()
    dist.destroy_process_group()


def show(result: dict[str, Any]) -> None:
    args = result["arguments"]
    print(f"{result['processes']} x {result['device']}, {args['shape']}, context {args['context']} (one row)")
    print(f"budget {args['budget']}, torch {result['torch']}, transformers {result['transformers']}")
    print(f"tokens and positions equal one process: {result.get('tokens_equal', 'not asked')}")
    print(f"{'cache':24} {'batch':>6} {'ms/step':>9} {'tokens/s':>9} {'GiB/rank':>9} {'graph':>6}  collectives a step")
    for row in result["rows"]:
        if "ms_per_step" not in row:
            print(f"{row['cache']:24} {row['batch']:6} {row['problem']}")
            continue
        print(
            f"{row['cache']:24} {row['batch']:6} {row['ms_per_step']:9.2f} {row['tokens_per_s']:9.0f} "
            f"{row['peak_bytes'] / 2**30:9.2f} {row['graph']!s:>6}  {row['collectives_per_step']}"
            + (f"  {row['problem']}" if row["problem"] else "")
        )
        if "profile_ms" in row:
            print(f"    ms of a step: {row['profile_ms']}")
    print(f"collectives added by the cache: {result.get('collectives_added', 'not asked')}")


if __name__ == "__main__":
    main()
