"""The lm-evaluation-harness adapter on a local task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmodel import directory
from liquidfusion.exceptions import ConfigError

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytestmark = pytest.mark.filterwarnings("default")

CHOICES = """\
task: pick
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""

WRITING = """\
task: write
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  until: ["#"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    rows = [
        {"context": f"{'once upon a time ' * 8}there were {n} of them", "choices": ["yes", "no", "ten"], "label": n % 3}
        for n in range(6)
    ]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "pick.yaml").write_text(CHOICES.format(data=data), encoding="utf8")
    (folder / "write.yaml").write_text(WRITING.format(data=data), encoding="utf8")
    return folder


def evaluate(tasks: Path, model: str, **arguments: Any) -> list[Any]:
    """Everything the model said: log-likelihoods and texts."""
    from lm_eval.tasks import TaskManager

    import liquidfusion.bench.lm_eval_adapter  # noqa: F401 - registers the model

    outcome = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(directory()), "device": "cpu", "dtype": "float32", **arguments},
        tasks=["pick", "write"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=3,
        bootstrap_iters=10,
    )
    samples = [sample for name in ("pick", "write") for sample in outcome["samples"][name]]
    return [response[0] for sample in sorted(samples, key=lambda s: s["doc_hash"]) for response in sample["resps"]]


def test_roomy_cache_says_what_the_plain_model_says(tasks: Path) -> None:
    plain = evaluate(tasks, "hf")
    roomy = evaluate(tasks, "liquidfusion", strategy="h2o", budget=1024)
    tight = evaluate(tasks, "liquidfusion", strategy="h2o", budget=16, chunk=16)
    assert len(plain) == 6 * 3 + 6
    for one, other in zip(plain, roomy, strict=True):
        if isinstance(one, str):
            assert one == other
        else:
            assert other[0] == pytest.approx(one[0], abs=1e-3)
    assert tight != roomy


def test_bad_parameters() -> None:
    from liquidfusion.bench.lm_eval_adapter import LiquidFusionLM

    with pytest.raises(ConfigError, match="strategy"):
        LiquidFusionLM(str(directory()), strategy="best")
    with pytest.raises(ConfigError, match="chunk"):
        LiquidFusionLM(str(directory()), chunk=0)
