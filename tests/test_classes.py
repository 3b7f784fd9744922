"""Language model classes that people run most, small, by the script that looks at all of them."""

from __future__ import annotations

import json

import pytest
import transformers
from packaging.version import Version

from classes.families import cases
from classes.probe import HF_FAILS, REFUSED, WORKS, probe
from classes.table import RECORD, recorded, waiting

SERVED = (
    "llama", "mistral", "mixtral", "ministral3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "gemma", "gemma2",
    "gemma3_text", "gemma3n_text", "gemma4_text#shared_kv(E2B,E4B)", "gemma4_text#kv_heads(26B,31B)", "gpt_oss",
    "granite", "granitemoehybrid", "nemotron_h", "falcon_h1", "lfm2", "qwen3_next", "qwen3_5_text", "bamba", "jamba",
    "zamba2", "olmo2", "olmo3", "olmo_hybrid", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "minicpm3", "mistral4",
    "llama4_text", "stablelm", "biogpt", "smollm3", "exaone4", "cohere2", "jetmoe",
    "gemma3", "gemma4", "paligemma", "deepseek_vl", "qwen2_5_vl", "qwen3_vl", "llava",
)  # fmt: skip
NOT_SERVED = ("doge", "diffllama", "bloom", "falcon", "mpt", "mamba", "deepseek_v32", "bert#is_decoder=False")
FOUND = {case.name: case for case in cases()}


EXPECTED = [*((name, WORKS) for name in SERVED), *((name, REFUSED) for name in NOT_SERVED)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "status"), EXPECTED)
def test_served_or_refused_before_any_work(name: str, status: str) -> None:
    if name not in FOUND:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    outcome = probe(FOUND[name])
    assert outcome["status"] == status, outcome


def test_nothing_on_record_is_wrong() -> None:
    """The table of the documentation: no class that answers wrongly, crashes, or is refused only half-way."""
    statuses = {key: outcome["status"] for key, outcome in recorded().items()}
    assert set(statuses.values()) <= {WORKS, REFUSED, HF_FAILS}
    assert {FOUND[name].key for name in SERVED if name in FOUND} - set(waiting()) <= {
        key for key, status in statuses.items() if status == WORKS
    }


def test_every_class_is_on_record() -> None:
    """A newer transformers brings new classes: `make classes CLASSES_ARGS="--new --write"` looks at them."""
    made_with = json.loads(RECORD.read_text())["transformers"]
    if Version(transformers.__version__) < Version(made_with):
        pytest.skip(f"the record was made with transformers {made_with}")
    new = sorted({case.key for case in cases()} - set(recorded()) - set(waiting()))
    assert not new, f"new in transformers {transformers.__version__}: {', '.join(new)}"
