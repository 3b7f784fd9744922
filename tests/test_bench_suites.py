"""`longbench`, `multiturn` and `reasoning`: prompts, scores and figures, each against a naive twin or by hand."""

from __future__ import annotations

import copy
import importlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmodel import loaded
from liquidfusion.bench import decoding, runner
from liquidfusion.bench.caches import CacheOptions, FrameworkCache
from liquidfusion.bench.models import Loaded
from liquidfusion.bench.tasks.answering import Prompt, answer, full_bytes
from liquidfusion.exceptions import ConfigError

# The package exports the measurements under the names of their modules.
longbench, multiturn, reasoning = (
    importlib.import_module(f"liquidfusion.bench.tasks.{name}") for name in ("longbench", "multiturn", "reasoning")
)

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty() -> Loaded:
    """The tiny model with a tokenizer that has a chat template."""
    tokenizer = copy.deepcopy(loaded().tokenizer)
    tokenizer.chat_template = TEMPLATE
    return Loaded(loaded().name, loaded().model, tokenizer)


def prompts(*pairs: tuple[str, str], tokens: int = 6) -> list[Prompt]:
    tokenizer = loaded().tokenizer
    return [Prompt(decoding.encode(tokenizer, one), decoding.encode(tokenizer, two), tokens) for one, two in pairs]


@pytest.mark.parametrize("cache", [FrameworkCache(), CacheOptions(budget=4096)])
@pytest.mark.parametrize("chunk", [None, 7])
def test_answers_with_room_are_transformers_greedy(cache: Any, chunk: int | None) -> None:
    asked = prompts(("a quick brown fox", " jumps"), ("over", " the lazy dog"), ("again and again", "?"))
    model = loaded().model
    found = answer(model, loaded().tokenizer, cache, asked, chunk=chunk, batch_size=3)
    for prompt, one in zip(asked, found, strict=True):
        ids = torch.tensor([prompt.context + prompt.question])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        written = expected[0, ids.shape[1] :].tolist()
        assert one.tokens == [token for token in written if token != 1]
        assert one.facts["passes"] == 1.0


def test_a_batch_answers_as_one_by_one() -> None:
    asked = prompts(*((f"{n} and then " * (9 + n % 2), "what?" * (1 + n % 3)) for n in range(5)))
    cache = CacheOptions(budget=32)
    alone = answer(loaded().model, loaded().tokenizer, cache, asked, batch_size=1)
    together = answer(loaded().model, loaded().tokenizer, cache, asked, batch_size=5)
    assert [one.tokens for one in alone] == [one.tokens for one in together]


def test_an_answer_ends_with_what_is_looked_for_or_a_stop_string() -> None:
    tried = prompts(*((f"some text {n}", " here") for n in range(20)), tokens=9)
    written = answer(loaded().model, loaded().tokenizer, FrameworkCache(), tried)
    base, free = next(pair for pair in zip(tried, written, strict=True) if len(set(pair[1].text)) == 9)
    part = free.text[2:5]
    until = Prompt(base.context, base.question, 9, until=(part.upper(),))
    (found,) = answer(loaded().model, loaded().tokenizer, FrameworkCache(), [until])
    assert found.text == free.text[: free.text.lower().index(part.lower()) + len(part)]
    assert found.finish_reason == "stop"
    stop = Prompt(base.context, base.question, 9, stop=(part,))
    (cut,) = answer(loaded().model, loaded().tokenizer, FrameworkCache(), [stop])
    assert cut.text == free.text[: free.text.index(part)]


def test_a_question_that_is_seen_is_read_with_the_context() -> None:
    (prompt,) = prompts(("some text", " here"))
    seen = prompt.seen()
    assert seen.context + seen.question == prompt.context + prompt.question
    assert len(seen.question) == 1


def test_full_bytes_are_those_of_a_dynamic_cache() -> None:
    (one,) = answer(loaded().model, loaded().tokenizer, FrameworkCache(), prompts(("some text", " here"), tokens=1))
    assert one.facts["cache_bytes"] == full_bytes(loaded().model, len("some text here"))


# LongBench


@pytest.mark.parametrize(
    ("name", "text", "row", "expected"),
    [
        # F1 of words without articles, case and punctuation: 2 of 3 and 2 of 2 words shared
        ("qasper", "The red, big house", {"answers": ["big house", "none"]}, 80.0),
        ("hotpotqa", "", {"answers": ["x"]}, 0.0),
        ("trec", "\n\nCity\nType: x", {"answers": ["City"], "all_classes": ["City", "Country"]}, 100.0),
        ("trec", "City or Country", {"answers": ["City"], "all_classes": ["City", "Country"]}, 50.0),
        (
            "trec",
            "Other location",
            {"answers": ["Other location"], "all_classes": ["location", "Other location"]},
            100.0,
        ),
        ("trec", "Date", {"answers": ["City"], "all_classes": ["City", "Date"]}, 0.0),
        ("passage_count", "There are 7, not 8", {"answers": ["7"]}, 50.0),
        ("passage_count", "none", {"answers": ["7"]}, 0.0),
        ("passage_retrieval_en", "Paragraph 12", {"answers": ["Paragraph 12"]}, 100.0),
        ("passage_retrieval_zh", "段落3", {"answers": ["段落3"]}, 100.0),
        # the first line without a comment or a fence; 6 of 7 letters are shared in order: 2 · 6 / 13 = 0.92
        ("lcc", "\n# note\nreturn x", {"answers": ["return x"]}, 100.0),
        ("lcc", "returns", {"answers": ["return"]}, 92.0),
        ("v2", "**The correct answer is (B)**.", {"answer": "B"}, 100.0),
        ("v2", "The correct answer is C", {"answer": "C"}, 100.0),
        ("v2", "B", {"answer": "B"}, 0.0),
    ],
)
def test_longbench_scores(name: str, text: str, row: dict[str, Any], expected: float) -> None:
    assert longbench.score(name, text, row) == pytest.approx(expected)


def test_longbench_knows_the_21_data_sets() -> None:
    assert len(longbench.subsets()) == 21
    for entry in longbench.subsets().values():
        assert entry["template"].count("{context}") == 1
        assert entry["score"] in longbench.SCORES
        assert entry["tokens"] in (32, 64, 128, 512)


def test_longbench_reads_files_of_both_versions(tmp_path: Path, chatty: Loaded) -> None:
    rows = [
        {"dataset": name, "input": f"Q{n}", "context": "word " * 30, "answers": ["x"], "all_classes": None, "length": n}
        for n in range(3)
        for name in ("qasper", "trec", "lcc")
    ]
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    document = runner.run(chatty, "longbench", CacheOptions(budget=64), data=path, subtasks="qasper,trec", limit=2)
    asked = [item["request"] for item in document["results"]]
    assert [one["subtask"] for one in asked] == ["qasper", "trec"] * 2
    assert asked[0]["prompt"].startswith("<user>You are given a scientific article")
    assert asked[1]["prompt"].startswith("Please determine the type of the question below.")
    assert {"longbench", "qasper", "trec", "cache_bytes"} <= set(document["metrics"])
    choices = {f"choice_{letter}": f"C{letter}" for letter in "ABCD"}
    path.write_text(json.dumps({"context": " text ", "question": "Q", "answer": "A", **choices}), encoding="utf8")
    document = runner.run(chatty, "longbench", CacheOptions(budget=64), data=path, limit=2)
    assert [item["request"]["subtask"] for item in document["results"]] == ["v2"]
    shown = document["results"][0]["request"]["prompt"]
    assert shown.startswith(
        "<user>Please read the following text and answer the question below.\n\n<text>\ntext\n</text>"
    )
    assert shown.endswith('"The correct answer is (insert answer here)".</><assistant>')


def test_longbench_leaves_the_middle_of_a_long_text_out(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    row = {"input": "Q?", "context": "abcdefghij" * 60, "answers": ["x"]}
    path.write_text(json.dumps(row), encoding="utf8")
    document = runner.run(loaded(), "longbench", CacheOptions(strategy="full"), data=path, subtasks="trec", context=300)
    assert document["results"][0]["result"]["scores"]["prompt_tokens"] == 236
    with pytest.raises(ConfigError, match="no room for a question"):
        runner.run(loaded(), "longbench", CacheOptions(), data=path, subtasks="qasper", context=400)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"context": "x"}, {}, "each object needs input, context and answers, or version 2's"),
        ({"context": "x", "input": "y", "answers": ["z"]}, {}, "has no row of qasper, hotpotqa, trec"),
        ({"context": "x", "input": "y", "answers": ["z"]}, {"subtasks": "qaspar"}, "subtask 'qaspar' is unknown"),
        ({"context": "x"}, {"version": 3}, "version 3 is unknown; accepted: 1, 2"),
    ],
)
def test_longbench_refusals(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row), encoding="utf8")
    with pytest.raises(ConfigError, match=re.escape(message)):
        runner.run(loaded(), "longbench", CacheOptions(), data=path, **options)


# multiturn


def test_multiturn_tells_before_it_asks(chatty: Loaded) -> None:
    document = runner.run(chatty, "multiturn", CacheOptions(budget=64), limit=5, context=[1500], facts=3, batch_size=5)
    for index, item in enumerate(document["results"]):
        (fact,) = item["request"]["outputs"]
        assert item["request"]["turns"] > 1
        assert 1000 < item["result"]["scores"]["prompt_tokens"] <= 1500
        assert item["result"]["scores"]["budget"] == 64
        assert fact in " ".join(words for *_, words in multiturn._FACTS), index
    assert {"multiturn", "cache_bytes", "share"} <= set(document["metrics"])
    again = runner.run(chatty, "multiturn", CacheOptions(budget=64), limit=5, context=[1500], facts=3, batch_size=5)
    assert [i["request"] for i in again["results"]] == [i["request"] for i in document["results"]]


def test_multiturn_is_what_the_template_makes_of_the_turns(chatty: Loaded) -> None:
    prompt, fact, _ = multiturn._conversation(chatty.tokenizer, ["word"] * 50, 900, 2, 1, random.Random(0))
    context, question = (chatty.tokenizer.decode(part) for part in (prompt.context, prompt.question))
    turns = re.findall(r"<(\w+)>(.*?)</>", context, flags=re.DOTALL)
    assert "".join(f"<{role}>{text}</>" for role, text in turns) == context
    assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert f"{fact}." in turns[2][1]
    assert re.fullmatch(r"<user>[^<]*\?</><assistant>You[^<]*", question)


def test_multiturn_refusals(chatty: Loaded) -> None:
    with pytest.raises(ConfigError, match="needs a model with a chat template"):
        runner.run(loaded(), "multiturn", CacheOptions())
    with pytest.raises(ConfigError, match="facts 9: 1 to 8 can be told"):
        runner.run(chatty, "multiturn", CacheOptions(), facts=9)
    with pytest.raises(ConfigError, match="context 50 is too short for 4 facts"):
        runner.run(chatty, "multiturn", CacheOptions(), context=[50])


# reasoning


def test_generated_problems_show_how_they_are_solved() -> None:
    problems = reasoning._arithmetic(3, 5, 2, random.Random(0))
    assert len({problem.told for problem in problems}) == 3
    for problem in problems:
        *shown, last = problem.told.split("\n\n")
        assert len(shown) == 2
        for part in shown:
            found = re.fullmatch(r"Problem: ([\d +]+) = \?\nSteps: (.*)\. Answer: (\d+)", part)
            assert found is not None
            numbers = [int(number) for number in found[1].split(" + ")]
            assert len(numbers) == 5
            assert int(found[3]) == sum(numbers)
            for done, step in enumerate(found[2].split("; "), 1):
                assert step == f"{sum(numbers[:done])} + {numbers[done]} = {sum(numbers[: done + 1])}"
        asked = re.fullmatch(r"Problem: ([\d +]+) = \?\nSteps:", last)
        assert asked is not None
        assert int(problem.truth) == sum(map(int, asked[1].split(" + ")))


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        (" 3 + 4 = 7. Answer: 7\n", "7", True),
        ("so Answer: 8.", "7", False),
        ("we get 1,234 apples", "1234", True),
        ("First 5, then 12.0", "12", True),
        (r"hence \boxed{\dfrac{1}{2}} and so on", r"\frac{1}{2}", True),
        (r"\boxed{3} no, \boxed{ 4 }", "4", True),
        (r"\boxed{x^{2}+1}", "x^{2} + 1", True),
        (r"\boxed{\text{Monday}}", "Monday", True),
        (r"\boxed{10\%}", "10", True),
        (r"\boxed{unclosed", "unclosed", False),
        ("", "7", False),
        ("Answer: 1/2", "2", False),
    ],
)
def test_final_answers(text: str, truth: str, right: bool) -> None:
    assert reasoning.same(text, truth) is right


@pytest.mark.parametrize(
    ("solution", "expected"),
    [("3+4=7\n#### 1,007", "1,007"), (r"thus $\boxed{\frac{3}{4}}$.", r"\frac{3}{4}"), (" 204 ", "204")],
)
def test_reference_answers(solution: str, expected: str) -> None:
    assert reasoning.final(solution) == expected


def test_reasoning_runs_on_files_and_counts_tokens(tmp_path: Path, chatty: Loaded) -> None:
    path = tmp_path / "gsm.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "two\n#### 2"}) + "\n", encoding="utf8")
    document = runner.run(chatty, "reasoning", CacheOptions(budget=32), data=path, max_tokens=40)
    (item,) = document["results"]
    assert item["request"]["outputs"] == ["2"]
    assert item["request"]["prompt"].endswith("final answer within \\boxed{}.</><assistant>")
    figures = document["metrics"]
    assert figures["tokens_per_second"]["value"] > 0
    assert figures["answer_tokens"]["value"] == item["result"]["scores"]["tokens"] <= 40
    assert figures["cache_bytes"]["value"] < figures["cache_bytes"]["full"]


def test_reasoning_generates_by_default() -> None:
    document = runner.run(loaded(), "reasoning", CacheOptions(budget=64), limit=2, terms=4, max_tokens=8)
    assert len(document["results"]) == 2
    for options, message in (
        ({"terms": 1}, "terms 1 is not at least 2"),
        ({"examples": -1}, "examples -1 is negative"),
        ({"dataset": "sums"}, "dataset 'sums' is unknown; accepted: arithmetic, gsm8k"),
    ):
        with pytest.raises(ConfigError, match=message):
            runner.run(loaded(), "reasoning", CacheOptions(), **options)
