"""Each task against the same thing computed directly with transformers, and the figures made of the records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmodel import loaded
from liquidfusion.bench import decoding, runner, stats, tasks, texts
from liquidfusion.bench.caches import CacheOptions, FrameworkCache
from liquidfusion.bench.parameters import strategy_names
from liquidfusion.bench.tasks import choice, needle, perplexity, recall, summarize
from liquidfusion.exceptions import ConfigError

ROOMY = {name: CacheOptions(strategy=name, budget=4096) for name in strategy_names()}
TEXT = texts.DEFAULT_PROMPT


def direct_nll(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = loaded().model(torch.tensor([ids])).logits[0]
    return -logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("strategy", strategy_names())
def test_generate_with_room_is_transformers_greedy(strategy: str) -> None:
    model, tokenizer = loaded().model, loaded().tokenizer
    prompts = ["a quick brown fox", "jumps over", "the lazy dog again and again"]
    records = tasks.generate(model, tokenizer, ROOMY[strategy], prompts=prompts, max_tokens=12, batch_size=3)
    for prompt, item in zip(prompts, records, strict=True):
        ids = torch.tensor([decoding.encode(tokenizer, prompt)])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected = expected[0, ids.shape[1] :].tolist()
        written = item["result"]["choices"][0]
        assert written["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        nll = direct_nll([*ids[0].tolist(), *expected])[ids.shape[1] - 1 :]
        count = len(written["logprobs"]["token_logprobs"])
        assert np.allclose(written["logprobs"]["token_logprobs"], -nll[:count], atol=1e-3)
        assert len(item["result"]["scores"]["steps"]) <= 11


def test_sampling_follows_the_seed() -> None:
    def text(seed: int) -> str:
        records = tasks.generate(loaded().model, loaded().tokenizer, prompts=["hello"], temperature=1.5, seed=seed)
        return str(records[0]["result"]["choices"][0]["text"])

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stop_string_and_end_token() -> None:
    model, tokenizer = loaded().model, loaded().tokenizer
    ids = decoding.encode(tokenizer, "a quick brown fox")
    (free,), _ = decoding.generate(model, tokenizer, [ids], FrameworkCache().make(model, 1), max_tokens=8)
    cut = free.text[3]
    (stopped,), _ = decoding.generate(
        model, tokenizer, [ids], FrameworkCache().make(model, 1), max_tokens=8, stop=[cut]
    )
    assert stopped.text == free.text[: free.text.index(cut)]
    assert stopped.finish_reason == "stop"
    assert free.finish_reason == "length"


@pytest.mark.parametrize("strategy", strategy_names())
def test_perplexity_with_room_is_the_models_own(strategy: str) -> None:
    ids = decoding.encode(loaded().tokenizer, TEXT)
    document = runner.run(loaded(), "perplexity", ROOMY[strategy], text=TEXT, limit=2, context=256, chunk=32)
    expected = torch.cat([direct_nll(ids[at : at + 256])[63:] for at in (0, 256)]).mean().exp().item()
    figures = document["metrics"]
    assert figures["perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
    assert figures["perplexity"]["full"] == pytest.approx(expected, rel=1e-4)
    assert figures["perplexity_ratio"]["value"] == pytest.approx(1.0, abs=1e-4)
    assert figures["perplexity"]["low"] < figures["perplexity"]["value"] < figures["perplexity"]["high"]


def test_perplexity_does_not_depend_on_batches() -> None:
    def nll(batch_size: int, chunk: int) -> list[float]:
        cache = CacheOptions(strategy="streaming", budget=48)
        options = {"text": TEXT, "limit": 3, "context": 192, "chunk": chunk, "batch_size": batch_size}
        records = perplexity(loaded().model, loaded().tokenizer, cache, **options)
        return [value for item in records for value in item["result"]["scores"]["nll"]]

    assert np.allclose(nll(1, 16), nll(3, 16), atol=1e-4)
    assert not np.allclose(nll(3, 1), nll(3, 64), atol=1e-2)


def test_needle_trials_are_what_they_claim() -> None:
    tokenizer = loaded().tokenizer
    seen: list[list[int]] = []
    model = loaded().model
    hook = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0].tolist()))
    try:
        records = needle(
            model, tokenizer, ROOMY["full"], limit=4, depths=2, context=(600, 800), needles=3, batch_size=1
        )
    finally:
        hook.remove()
    fed = tokenizer.decode([token for call in seen for token in call])
    assert [item["request"]["length"] for item in records] == [600] * 4 + [800] * 4
    assert [item["request"]["depth"] < 0.5 for item in records] == [True, False] * 4
    for item in records:
        assert f"is {item['request']['answer']}. Remember" in fed
    # context + question + the answer without its last token, which is not fed
    assert sum(map(len, seen)) == 4 * (600 - 1) + 4 * (800 - 1)
    assert fed.count("Remember it") == 8 * 3
    assert fed.count("Question: What") == 8


@pytest.mark.parametrize("mentions", [1, 2])
def test_needle_is_mentioned_so_often(mentions: int) -> None:
    model, tokenizer = loaded().model, loaded().tokenizer
    seen: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.extend(inputs[0][0].tolist()))
    try:
        options: dict[str, Any] = {"text": TEXT * 2, "limit": 1, "context": (600,), "mentions": mentions}
        (item,) = needle(model, tokenizer, ROOMY["full"], **options)
    finally:
        hook.remove()
    assert tokenizer.decode(seen).count(f"magic number is {item['request']['answer']}.") == mentions
    assert item["request"]["length"] == 600
    with pytest.raises(ConfigError, match="mentions 3"):
        needle(model, tokenizer, mentions=3)


def test_retrieval_scores_exact_matches() -> None:
    from liquidfusion.bench.tasks import retrieval
    from liquidfusion.bench.tasks.task import record

    hits = [record("", {"recall": float(i % 4 == 0)}, length=(512, 1024)[i % 2], seconds=1.0) for i in range(64)]
    figures = retrieval.metrics(hits, hits)
    assert figures["recall"].value == figures["recall"].full == 0.25
    assert figures["recall_512"].value == 0.5
    assert figures["recall_1024"].value == 0.0
    assert figures["recall"].low is not None
    assert 0.1 < figures["recall"].low < 0.25


def test_recall_asks_for_a_pair_of_its_list() -> None:
    records = recall(loaded().model, loaded().tokenizer, ROOMY["h2o"], limit=3, context=(300,))
    assert [item["request"]["depth"] for item in records] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    for item in records:
        prompt, answer = item["request"]["prompt"], item["request"]["answer"]
        asked = prompt.rpartition("\n")[2]
        assert asked.endswith(" is ")
        assert f"{asked}{answer}.\n" in prompt
    with pytest.raises(ConfigError, match="too short"):
        recall(loaded().model, loaded().tokenizer, context=(64,))


def test_summarize_scores_with_rouge(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    path = tmp_path / "news.jsonl"
    rows = [{"article": f"News number {'x' * n}.", "summary_gt": "One."} for n in (30, 5, 60)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    document = runner.run(loaded(), "summarize", CacheOptions(cache_size=20), data=path, max_tokens=4, batch_size=2)
    assert ["x" * n in item["request"]["prompt"] for n, item in zip((30, 5, 60), document["results"], strict=True)]
    assert document["metrics"].keys() == {"rouge1", "rouge2", "rougeL"}
    assert document["metrics"]["rougeL"]["full"] is not None
    path.write_text('{"headline": "x"}', encoding="utf8")
    with pytest.raises(ConfigError, match="article"):
        summarize(loaded().model, loaded().tokenizer, data=path)


@pytest.mark.parametrize("strategy", ["full", "liquid_fusion"])
def test_choice_is_the_likelihood_of_each_continuation(strategy: str, tmp_path: Path) -> None:
    rows = [
        {"context": "The man fell because", "choices": ["he slipped", "of ice on the road", "x"], "label": 1},
        {"context": "It rained, therefore", "choices": ["it was wet", "dry"], "label": 0},
    ]
    path = tmp_path / "choices.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    records = choice(loaded().model, loaded().tokenizer, ROOMY[strategy], data=path)
    for row, item in zip(rows, records, strict=True):
        context = decoding.encode(loaded().tokenizer, row["context"])
        expected = []
        for text in row["choices"]:
            nll = direct_nll(decoding.encode(loaded().tokenizer, f"{row['context']} {text}"))
            expected.append(-nll[len(context) - 1 :].sum().item())
        scores = item["result"]["scores"]
        assert scores["loglikelihoods"] == pytest.approx(expected, abs=1e-3)
        assert scores["accuracy"] == float(np.argmax(expected) == row["label"])
        lengths = [len(text) for text in row["choices"]]
        assert scores["accuracy_normalised"] == float(np.argmax(np.divide(expected, lengths)) == row["label"])


@pytest.mark.parametrize(
    ("dataset", "row", "context", "right"),
    [
        (
            "copa",
            {"premise": "It rained.", "question": "effect", "choice1": "It dried.", "choice2": "He ran.", "label": 1},
            "It rained therefore",
            " he ran.",
        ),
        (
            "piqa",
            {"goal": "Open it", "sol1": "Pull", "sol2": "Push", "label": 0},
            "Question: Open it\nAnswer:",
            " Pull",
        ),
        (
            "hellaswag",
            {"activity_label": "Run", "ctx_a": "He [step] runs.", "ctx_b": "he", "endings": ["a", "b"], "label": "1"},
            "Run: He runs. He",
            " b",
        ),
        ("mmlu", {"question": "1+1?", "choices": ["1", "2"], "answer": 1}, "1+1?\nA. 1\nB. 2\nAnswer:", " B"),
    ],
)
def test_choice_reads_rows_of_known_data_sets(
    dataset: str, row: dict[str, Any], context: str, right: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf8")
    (item,) = choice(loaded().model, loaded().tokenizer, ROOMY["full"], data=path, dataset=dataset)
    assert item["request"]["prompt"] == context
    assert item["request"]["choices"][item["request"]["label"]] == right


def test_bootstrap_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        _, low, high = stats.bootstrap(rng.normal(3.0, 1.0, 50), rounds=400)
        inside += low < 3.0 < high
    assert 0.88 < inside / 200 < 0.99
    assert stats.bootstrap([1.0, 3.0], weights=[3, 1])[0] == 1.5
    assert math.isclose(stats.mean_metric([0.5], "", [0.7]).full or 0, 0.7)


def test_runner_refuses_unknown_options() -> None:
    with pytest.raises(ConfigError, match="no option 'depth'"):
        runner.run(loaded(), "perplexity", depth=3)
    with pytest.raises(ConfigError, match="chunk"):
        runner.run(loaded(), "perplexity", chunk=0)
    with pytest.raises(ConfigError, match="unknown"):
        runner.run(loaded(), "guess")


def test_reference_text_is_long_enough_for_every_default() -> None:
    assert len(texts.reference_text()) > 400_000
