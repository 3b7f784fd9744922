"""What must hold on a GPU and CI cannot see: one line a check, exit status 1 if one fails.

python benches/gpu_check.py
python benches/gpu_check.py --device cpu    # tries the checks themselves; those of graphs and kernels say nothing there
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain
from pathlib import Path

import torch
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import liquidfusion as lf
from liquidfusion.options import PARAMETERS

DEVICE = "cuda"


def model(dtype: torch.dtype, known: int = 8192) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(LlamaConfig(**shape(known))).to(dtype).eval()


def shape(known: int = 8192) -> dict[str, int | None]:
    return {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": known,
        "pad_token_id": 0,
        "eos_token_id": None,
    }


def prompt(
    rows: int = 3, tokens: int = 90, padding: tuple[int, ...] = (7, 0, 31), vocabulary: int = 512
) -> dict[str, torch.Tensor]:
    """The same random tokens on every device, with left padding."""
    ids = torch.randint(1, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(1), device="cpu")
    mask = torch.ones_like(ids)
    for row, columns in zip(range(rows), padding, strict=False):
        mask[row, :columns] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def run(
    llama: GenerationMixin,
    strategy: str,
    budget: int,
    new: int = 150,
    tokens: int = 90,
    beams: int = 1,
    **options: object,
) -> tuple:
    """Tokens, kept positions of every layer, and evictions of one batch with left padding."""
    own = {name: options.pop(name) for name in list(options) if name in PARAMETERS}
    cache = lf.KVCache(llama, lf.Strategy(strategy, **own), budget, **options)
    vocabulary = llama.config.get_text_config().vocab_size
    inputs = {name: value.to(llama.device) for name, value in prompt(tokens=tokens, vocabulary=vocabulary).items()}
    given = {"max_new_tokens": new, "do_sample": False, "num_beams": beams, lf.cache_keyword(llama): cache}
    return llama.generate(**inputs, **given).cpu(), kept(cache), cache.evictions


def turns(llama: GenerationMixin, between: Callable[[], object], cast: bool = False, **options: object) -> tuple:
    """Tokens, kept positions and evictions of a chat of two turns; what `between` gives is held during the second."""
    cache, ids, held = lf.KVCache(llama, budget=60, **options), prompt(2, 1)["input_ids"], None
    for turn in range(2):
        ids = torch.cat((ids, prompt(2, 40 + turn)["input_ids"]), 1)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=cast):
            given = {"attention_mask": torch.ones_like(ids), lf.cache_keyword(llama): cache}
            ids = llama.generate(ids, max_new_tokens=50, do_sample=False, **given)
        held = held or between()
    return ids.cpu(), kept(cache), cache.evictions


def kept(cache: lf.KVCache) -> list[torch.Tensor]:
    return [cache.positions(layer).sort(-1).values for layer in cache._groups.places]


def same(a: tuple, b: tuple) -> bool:
    return torch.equal(a[0], b[0]) and all(map(torch.equal, a[1], b[1])) and a[2] == b[2]


def alike(a: tuple, b: tuple, share: float = 0.99) -> bool:
    """The same tokens; the same kept positions but for near ties, which another device's sums may decide otherwise."""
    equal = torch.cat([(x == y).flatten() for x, y in zip(a[1], b[1], strict=True)])
    return torch.equal(a[0], b[0]) and equal.float().mean().item() > share


def differing(a: tuple, b: tuple) -> str:
    """How much of two results is equal."""
    tokens = (a[0] == b[0]).float().mean().item()
    kept = torch.cat([(x == y).flatten() for x, y in zip(a[1], b[1], strict=True)]).float().mean().item()
    return f"{tokens:.1%} of the tokens and {kept:.1%} of what is kept are equal, evictions {a[2]} and {b[2]}"


def checks() -> Iterator[tuple[str, Callable[[], bool]]]:
    full, half, cpu = model(torch.float32), model(torch.bfloat16), model(torch.float32).cpu()
    for strategy, intervals in {
        "streaming": (1, 5),
        "h2o": (1, 5),
        "liquid_fusion": (1, 5),
        "tova": (5,),
        "snapkv": (5,),
        "random": (5,),
        "keydiff": (5,),
    }.items():
        for interval in intervals:
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

    for bits in (16, 8, 4, (8, 4), (4, 2), (16, 4)):
        options = {"bits": bits, "eviction_interval": 5, "distinct_ratio": 0.3}

        def coded_graph(o: dict = options) -> bool:
            return same(run(half, "liquid_fusion", 60, **o), run(half, "liquid_fusion", 60, graph=False, **o))

        def coded_overlap(o: dict = options) -> bool:
            return same(run(half, "liquid_fusion", 60, **o), run(half, "liquid_fusion", 60, overlap=False, **o))

        def coded_devices(o: dict = options) -> bool:
            return alike(run(full, "liquid_fusion", 60, **o), run(cpu, "liquid_fusion", 60, **o))

        yield f"bits {bits}: graph equals eager", coded_graph
        yield f"bits {bits}: overlapped equals stalled", coded_overlap
        yield f"bits {bits}: as on the CPU", coded_devices

    def roomy() -> bool:
        ids = prompt(2, 60)["input_ids"]
        expected = full.generate(ids, max_new_tokens=60, do_sample=False)
        cache = lf.KVCache(full, budget=200)
        return torch.equal(
            expected, full.generate(ids, max_new_tokens=60, do_sample=False, **{lf.cache_keyword(full): cache})
        )

    yield "budget above the length gives transformers' tokens", roomy

    def devices() -> bool:
        return alike(run(full, "liquid_fusion", 60), run(cpu, "liquid_fusion", 60))

    yield "the CPU writes the same text and keeps the same tokens", devices

    def reach() -> bool:
        options = {"budget": 60, "tokens": 700, "new": 20, "peak_reach": 100}
        return alike(run(full, "liquid_fusion", **options), run(cpu, "liquid_fusion", **options))

    yield "the same after 700 tokens in one call, peaks within 100", reach

    def beams() -> bool:
        """Two beams with all but the same score may change places, and their rows with them."""
        options = {"budget": 60, "new": 40, "beams": 3}
        return alike(run(full, "liquid_fusion", **options), run(cpu, "liquid_fusion", **options), share=0.9)

    yield "the same with three beams", beams

    with torch.device(DEVICE):
        torch.manual_seed(0)
        mistral = MistralForCausalLM(MistralConfig(sliding_window=40, **shape())).eval()

    def window() -> bool:
        return same(run(mistral, "liquid_fusion", 60), run(mistral, "liquid_fusion", 60, graph=False)) and all(
            (positions >= positions.amax(-1, keepdim=True) - 39).all()
            for positions in run(mistral, "liquid_fusion", 60)[1]
        )

    yield "windows of 40 tokens: graph equals eager, and only the window is kept", window

    def wide() -> bool:
        return same(run(mistral, "liquid_fusion", 24), run(mistral, "liquid_fusion", 24, graph=False))

    yield "a budget within the window: graph equals eager", wide

    short = model(torch.float32, known=128)

    def ranks() -> bool:
        on_cpu = model(torch.float32, known=128).cpu()
        options = {"budget": 60, "new": 150, "positions": "cache"}
        return alike(run(short, "liquid_fusion", **options), run(on_cpu, "liquid_fusion", **options))

    yield "cache-relative positions, past what the model knows: as on the CPU", ranks

    def session() -> bool:
        def step(cache: lf.KVCache, ids: torch.Tensor, count: int) -> torch.Tensor:
            tokens = []
            for _ in range(count):
                ids = half(ids, **{lf.cache_keyword(half): cache}).logits[:, -1:].argmax(-1)
                tokens.append(ids)
            return torch.cat(tokens, 1)

        cache = lf.KVCache(half, budget=60)
        with torch.no_grad():
            begun = step(cache, prompt(2)["input_ids"], 33)
            fork = cache.copy()
            with tempfile.TemporaryDirectory() as folder:
                cache.save(Path(folder) / "session.safetensors")
                loaded = lf.KVCache.load(Path(folder) / "session.safetensors", half)
            texts = [step(one, begun[:, -1:], 100) for one in (cache, fork, loaded)]
        ends = [(text, kept(one), one.evictions) for text, one in zip(texts, (cache, fork, loaded), strict=True)]
        return same(ends[0], ends[1]) and same(ends[0], ends[2])

    yield "a saved, loaded or copied session goes on as if it had not stopped", session

    def sampled() -> bool:
        def sample(**options: object) -> tuple:
            torch.manual_seed(3)
            cache = lf.KVCache(full, budget=60, **options)
            given = {"max_new_tokens": 80, "do_sample": True, "top_k": 20, lf.cache_keyword(full): cache}
            return full.generate(**prompt(), **given), kept(cache), cache.evictions

        return same(sample(), sample(graph=False))

    yield "sampling with one seed: graph equals eager", sampled

    def moved() -> bool:
        def away() -> list[torch.Tensor]:
            """What the graph has read so far holds NaN now."""
            half.cpu()
            held = [torch.full_like(p, torch.nan, device=DEVICE) for p in half.parameters()]
            half.to(DEVICE)
            return held

        return same(turns(half, away), turns(half, away, graph=False))

    yield "weights that have moved between two turns: graph equals eager", moved

    def cast() -> bool:
        def forget() -> list[torch.Tensor]:
            """The copies of the weights are gone, and their memory holds NaN."""
            return [torch.full_like(p, torch.nan, dtype=torch.bfloat16) for p in full.parameters()]

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = turns(full, forget, cast=True)
        told = DEVICE == "cpu" or any("autocast" in str(warning.message) for warning in caught)
        return told and same(found, turns(full, forget, cast=True, graph=False))

    yield "under autocast: two turns as without a graph, which the user is told", cast

    def many() -> bool:
        """More pairs of row and head than multiprocessors, so that decode splits otherwise, and a prompt in chunks."""
        ids, results = prompt(80, 160, padding=())["input_ids"], []
        for llama in (full, cpu):
            cache, tokens = lf.KVCache(llama, budget=60), ids.to(llama.device)
            parts, given = (*tokens.split(30, 1), *tokens[:, :40].split(1, 1)), {lf.cache_keyword(llama): cache}
            with torch.no_grad():
                logits = [llama(part, **given).logits[:, -1].cpu() for part in parts]
            results.append((torch.stack(logits), kept(cache), cache.evictions))
        close = torch.isclose(results[0][0], results[1][0], atol=1e-3).float().mean().item() > 0.99
        return close and alike((ids, *results[0][1:]), (ids, *results[1][1:]))

    yield "80 rows in chunks, then single tokens: as on the CPU", many

    def defaults() -> bool:
        expected = run(half, "liquid_fusion", 60)
        try:
            torch.set_default_dtype(torch.bfloat16)
            torch.set_default_device(DEVICE)
            return same(run(half, "liquid_fusion", 60), expected)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)

    yield "torch's default device and dtype may be others", defaults

    def captured() -> bool:
        cache = lf.KVCache(half, budget=60)
        half.generate(prompt(1, 80)["input_ids"], max_new_tokens=40, do_sample=False, **{lf.cache_keyword(half): cache})
        return cache._graph is not None and cache._graph.captured

    yield "generate replays a captured graph", captured


GRAPHED = (
    "gemma2", "gemma3_text", "gemma4_text", "gemma4_text#kv_heads(26B,31B)", "gpt_oss", "ministral", "ministral3",
    "olmo3", "exaone4", "cohere2", "gemma3n_text", "gemma4_text#shared_kv(E2B,E4B)", "qwen3_next", "qwen3_5_text",
    "granitemoehybrid", "nemotron_h", "falcon_h1", "lfm2", "olmo_hybrid", "deepseek_v3", "glm4_moe_lite", "minicpm3",
    "llama4_text", "mimo_v2_flash",
)  # fmt: skip
"""Families whose layers are kept in several ways, keep states or latents, or attend in chunks: one graph a step."""


def families() -> Iterator[tuple[str, Callable[[], bool]]]:
    """Small random models of many families, as `make classes` builds them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from classes.families import cases
    from classes.probe import load

    found = {case.name: case for case in cases()}
    for name in GRAPHED:
        if name not in found:
            continue

        @cache
        def models(case: object = found[name]) -> tuple[GenerationMixin, GenerationMixin]:
            return load(case).to(DEVICE), load(case)

        def as_eager(
            models: Callable = models, strategies: tuple = ("liquid_fusion", "streaming"), **o: object
        ) -> bool:
            here, _ = models()
            for strategy in strategies:
                expected = run(here, strategy, 40, 40, eviction_interval=3, graph=False, **o)
                assert same(found := run(here, strategy, 40, 40, eviction_interval=3, **o), expected), (
                    f"{strategy}: {differing(found, expected)}"
                )
            return True

        def as_cpu(models: Callable = models) -> bool:
            found, expected = (run(where, "liquid_fusion", 40, 40) for where in models())
            assert alike(found, expected), differing(found, expected)
            return True

        def as_stalled(models: Callable = models) -> bool:
            here, _ = models()
            return same(run(here, "liquid_fusion", 40, 40), run(here, "liquid_fusion", 40, 40, overlap=False))

        def twice(models: Callable = models) -> bool:
            """A second prompt after a reset goes on with the graph, which was captured where it can be."""
            here, _ = models()
            kv = lf.KVCache(here, budget=40)
            given = {"max_new_tokens": 40, "do_sample": False, lf.cache_keyword(here): kv}
            first = here.generate(**prompt(vocabulary=100), **given)
            captured = kv._graph is not None and kv._graph.captured
            kv.reset()
            second = here.generate(**prompt(vocabulary=100), **given)
            return torch.equal(first, second) and (captured == kv._geometry.replayable or DEVICE == "cpu")

        yield f"{name}: graph equals eager", as_eager
        yield f"{name}: overlapped equals stalled", as_stalled
        yield f"{name}: as on the CPU", as_cpu
        yield f"{name}: the same again after a reset, replayed where it can be", twice
        if name in ("gemma2", "gpt_oss", "qwen3_next", "deepseek_v3"):
            yield (
                f"{name}: compiled, as without a graph",
                partial(as_eager, strategies=("liquid_fusion",), compile=True),
            )
        if name in ("gemma2", "gpt_oss", "gemma3_text"):
            yield f"{name}: with codes, graph equals eager", partial(as_eager, bits=4)


def main() -> int:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=DEVICE, choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="checks whose name has this in it")
    args = parser.parse_args()
    DEVICE, failed = args.device, 0
    for name, check in chain(families(), checks()):
        if args.only not in name:
            continue
        try:
            ok = check()
        except Exception as error:
            ok, name = False, f"{name} ({type(error).__name__}: {error})"
        failed += not ok
        print("ok  " if ok else "FAIL", name, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
