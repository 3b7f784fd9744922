"""Heads split over two processes: each decides for its own, tokens and kept positions are those of one process.

The file is its own worker: the test starts it under torchrun, twice the same script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import liquidfusion as lf
from tiny import build, cache_keyword, padded

PROCESSES = 2
# Grouped heads, one query head per kv head, and norms on queries and keys.
MODELS = {"llama": 2, "qwen2": 4}
CASES = [("full", None), ("streaming", 24), ("h2o", 24), ("liquid_fusion", 24)]
OPTIONS = {
    "greedy": {"do_sample": False, "max_new_tokens": 30},
    "chunks": {"do_sample": False, "max_new_tokens": 30, "prefill_chunk_size": 7},
    "sampled": {"do_sample": True, "max_new_tokens": 30, "temperature": 0.8},
    "beams": {"do_sample": False, "max_new_tokens": 12, "num_beams": 2},
}


def answers(model: PreTrainedModel) -> dict[str, Any]:
    """Tokens, kept positions `[layers, batch, kv_heads, slots]` and evictions of every case."""
    ids, mask = padded((40, 27))
    results = {}
    for strategy, budget in CASES:
        for name, options in OPTIONS.items():
            cache = lf.KVCache(model, strategy, budget)
            torch.manual_seed(3)
            out = model.generate(ids, attention_mask=mask, **options, **{cache_keyword(model): cache})
            positions = torch.stack([cache.positions(layer) for layer in range(len(cache))]).sort(-1).values
            results[f"{strategy}, {name}"] = {
                "tokens": out.tolist(),
                "positions": positions.tolist(),
                "evictions": cache.evictions,
            }
    return results


class Collectives(TorchDispatchMode):
    """How many collective operations run inside the context."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(t is DTensor for t in types):
            return NotImplemented  # it comes again as what it is made of
        if "c10d" in func.namespace and not func.__name__.startswith(("wait", "_wrap")):
            self.count += 1
        return func(*args, **(kwargs or {}))


def collectives(model: PreTrainedModel, cache: Any) -> int:
    """Collectives of a prompt and eight decode steps."""
    ids, _ = padded((40,))
    with torch.no_grad(), Collectives() as counted:
        for start, end in [(0, 32), *((i, i + 1) for i in range(32, 40))]:
            model(ids[:, start:end], **{cache_keyword(model): cache})
    return counted.count


def work(folder: Path) -> None:
    """One process: load its share of each model and write down what it gets."""
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
        ).eval()
        result[name] = answers(model) | {
            "collectives": [
                collectives(model, cache)
                for cache in (DynamicCache(), *(lf.KVCache(model, strategy, 24) for strategy, _ in CASES))
            ]
        }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process gets, and what each of two gets."""
    folder = tmp_path_factory.mktemp("parallel")
    alone = {}
    for name in MODELS:
        model = build(name)
        model.save_pretrained(folder / name)
        alone[name] = answers(model)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}", "--standalone"]
    done = subprocess.run(
        [*command, __file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return alone, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strategy", [strategy for strategy, _ in CASES])
@pytest.mark.parametrize("name", MODELS)
def test_each_process_decides_for_its_own_heads(ranks: Any, name: str, strategy: str, options: str) -> None:
    alone, each = ranks
    case = f"{strategy}, {options}"
    expected, own = alone[name][case], MODELS[name] // PROCESSES
    for rank, result in enumerate(each):
        got = result[name][case]
        assert got["tokens"] == expected["tokens"]
        heads = slice(rank * own, (rank + 1) * own)
        assert got["positions"] == [[row[heads] for row in layer] for layer in expected["positions"]]
    assert sum(result[name][case]["evictions"] for result in each) == expected["evictions"]


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_adds_no_communication(ranks: Any, name: str) -> None:
    """As many collectives as with transformers' own cache."""
    for result in ranks[1]:
        theirs, *ours = result[name]["collectives"]
        assert theirs > 0
        assert ours == [theirs] * len(CASES)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    work(Path(sys.argv[1]))
