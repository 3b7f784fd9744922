"""RULER's texts and scores against expectations worked out from its publication, not from our generators."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from benchmodel import loaded
from liquidfusion.bench import decoding, runner
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.tasks import ruler_data, ruler_documents
from liquidfusion.bench.tasks.answering import compose
from liquidfusion.bench.tasks.ruler import score, texts
from liquidfusion.bench.texts import DEFAULT_PROMPT, reference_text
from liquidfusion.exceptions import ConfigError

pytest.importorskip("wonderwords", reason="RULER's words are in the package wonderwords")

SOURCES = ruler_data.Sources(reference_text().split())


def made(name: str, size: int = 20, length: int = 1024, seed: int = 0) -> ruler_data.Sample:
    generator = ruler_data.TASKS[name](length, lambda text: len(text) // 4)
    return generator.sample(size, random.Random(seed), SOURCES)


def whole(sample: ruler_data.Sample) -> str:
    return sample.context + sample.question + sample.prefix


def test_the_thirteen_tasks() -> None:
    needles = {f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3)}
    assert set(ruler_data.TASKS) == {*needles, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"}
    tokens = {name: make(1024, len).tokens for name, make in ruler_data.TASKS.items()}
    assert {name.split("_")[0]: value for name, value in tokens.items()} == {
        "niah": 128,
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa": 32,
    }


ONE = (
    r"A special magic (number|uuid) is hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the \1 afterwards\.\n(?s:.*)\nWhat is the special magic \1 for (\S+) mentioned in the "
    r"provided text\? The special magic \1 for \2 mentioned in the provided text is"
)
SEVERAL = (
    r"Some special magic numbers are hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the numbers afterwards\.\n(?s:.*)\nWhat are all the special magic numbers for (.+) "
    r"mentioned in the provided text\? The special magic numbers for \1 mentioned in the provided text are"
)
WORD = r"[^:,?]+-[^:,?]+"
NUMBER = r"[1-9]\d{6}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.mark.parametrize(
    ("name", "needles", "key", "kind", "value", "asked"),
    [
        ("niah_single_1", 1, WORD, "numbers", NUMBER, 1),
        ("niah_single_2", 1, WORD, "numbers", NUMBER, 1),
        ("niah_single_3", 1, WORD, "uuids", UUID, 1),
        ("niah_multikey_1", 4, WORD, "numbers", NUMBER, 1),
        ("niah_multikey_2", 21, WORD, "numbers", NUMBER, 1),
        ("niah_multikey_3", 21, UUID, "uuids", UUID, 1),
        ("niah_multivalue", 4, WORD, "numbers", NUMBER, 4),
        ("niah_multiquery", 4, WORD, "numbers", NUMBER, 4),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_needles(name: str, needles: int, key: str, kind: str, value: str, asked: int, seed: int) -> None:
    sample = made(name, seed=seed, size=200 if name in ("niah_single_2", "niah_multikey_1") else 20)
    assert re.fullmatch(ONE if asked == 1 else SEVERAL, whole(sample))
    found = re.findall(rf"One of the special magic {kind} for ({key}) is: ({value})\.", sample.context)
    assert len(found) == needles == sample.context.count("One of the special magic")
    assert len(sample.outputs) == asked
    asked_for = re.search(r" for (.+) mentioned", sample.question)
    assert asked_for is not None
    keys = re.split(r", and |, ", asked_for[1])
    assert [number for wanted in keys for name, number in found if name == wanted] or keys
    assert sorted(sample.outputs) == sorted(number for name, number in found if name in keys)
    if name == "niah_multiquery":
        assert re.fullmatch(rf"{key}, {key}, {key}, and {key}", asked_for[1])
        # answers come in the order of the question
        assert sample.outputs == [dict(found)[wanted] for wanted in keys]
    if name == "niah_single_1":
        lines = sample.context.split("\n")[1:-1]
        noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        assert Counter(lines)[noise] == 20
        assert len(lines) == 21


def test_needles_in_an_essay_leave_it_as_it_is() -> None:
    sample = made("niah_multivalue", size=300)
    text = re.sub(r"One of the special magic numbers for \S+ is: \d+\.", "", sample.context)
    told = text.split("\n", 1)[1].split()
    assert told == SOURCES.haystack[:300]


def test_variables() -> None:
    sample = made("vt", size=9)
    example, text = re.split(r"\n\n(?=Memorize)", whole(sample))
    form = (
        r"Memorize and track the chain\(s\) of variable assignment hidden in the following text\.\n\n((?s:.*))\n"
        r"Question: Find all variables that are assigned the value (\d{5}) in the text above\. "
        r"Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assigned the "
        r"value \2, they are: "
    )
    for part, letters, lines in ((text, 5, 9), (example, 3, None)):
        found = re.match(form, part)
        assert found is not None
        links = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", found[1])
        names = [name for name, _ in links]
        assert [value for _, value in links] == [found[2], *names[:-1]]
        assert len(set(names)) == 5
        assert all(len(name) == letters and name.isupper() for name in names)
        assert lines is None or found[1].count("There and back again.") == lines
        answer = part[found.end() :].split()
        assert (names if part is example else []) == answer
    assert sample.outputs == re.findall(r"VAR (\w{5}) =", text)


def test_the_example_of_variables_is_the_longest_of_500_tokens() -> None:
    def count(text: str) -> int:
        return len(text.split())

    lines = ruler_data.variables(4096, count).example
    shown, longer = (
        count(whole(ruler_data.Variables(0).chain(size, random.Random(1), letters=3))) for size in (lines, lines + 1)
    )
    assert shown <= 500 < longer


@pytest.mark.parametrize(("length", "sizes"), [(1024, ((20, 3, 1), (30, 6, 1))), (4096, ((40, 10, 3), (30, 30, 3)))])
def test_common_words(length: int, sizes: tuple[tuple[int, int, int], ...]) -> None:
    sample = made("cwe", size=30, length=length)
    parts = re.split(r"\n(?=Below)", whole(sample))
    assert len(parts) == 2
    for part, (words, common, others) in zip(parts, sizes, strict=True):
        found = re.fullmatch(
            r"Below is a numbered list of words\. In these words, some appear more often than others\. "
            r"Memorize the ones that appear most often\.\n(.*)\nQuestion: What are the 10 most common words in the "
            r"above list\? Answer: The top 10 words that appear most often in the list are:(.*)",
            part,
        )
        assert found is not None
        listed = re.split(r" ?\d+\. ", found[1])[1:]
        assert len(listed) == 10 * common + (words - 10) * others
        counts = Counter(listed)
        assert len(counts) == words
        top = {word for word, times in counts.items() if times == common}
        told = re.split(r" \d+\. ", found[2])[1:] if part is parts[0] else sample.outputs
        assert set(told) == top
        assert len(top) == 10


def test_frequent_words() -> None:
    sample = made("fwe", size=400, length=1050)
    found = re.fullmatch(
        r"Read the following coded text and track the frequency of each coded word\. Find the three most frequently "
        r"appeared coded words\. (.*)\nQuestion: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. "
        r"What are the three most frequently appeared words in the above coded text\? Answer: According to the coded "
        r"text above, the three most frequently appeared words are:",
        whole(sample),
    )
    assert found is not None
    counts = Counter(found[1].split())
    (dots, first), *rest = counts.most_common()
    assert dots == "..."
    # 400 / zeta(2) = 243.17; its fourth, ninth and sixteenth parts
    assert first == 243
    assert [times for _, times in rest[:3]] == [60, 27, 15]
    assert [word for word, _ in rest[:3]] == sample.outputs
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in rest)
    assert len(counts) <= 20  # a fiftieth of the thousand tokens


def test_zeta_counts() -> None:
    assert ruler_data.zeta_counts(10**6, 2, 2.0) == [607927, 151981]  # 6 / pi² = 0.6079271


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"Town {a}.{p} lies on river {a}.",
                    "qas": [
                        {
                            "question": f"Where is {a}.{p}?",
                            "is_impossible": False,
                            "answers": [{"text": f"on river {a}"}, {"text": f"river {a}"}],
                        },
                        {"question": "Nonsense?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(3)
            ]
        }
        for a in range(4)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": articles}), encoding="utf8")
    return path


def test_questions_about_documents(squad: Path) -> None:
    sources = ruler_data.Sources([], {"qa_1": ruler_documents.squad(squad, 10)})
    for seed in range(8):
        sample = ruler_data.Questions("qa_1").sample(6, random.Random(seed), sources)
        told = (
            "Answer the question based on the given documents. "
            "Only give me the answer and do not output any other words."
        )
        found = re.fullmatch(
            re.escape(told) + r"\n\nThe following are given documents\.\n\n((?s:.*))\n\n" + re.escape(told)
            + r"\n\nQuestion: Where is (\d)\.(\d)\? Answer:",
            whole(sample),
        )  # fmt: skip
        assert found is not None
        documents = re.findall(r"Document (\d+):\n(.*)", found[1])
        assert [int(number) for number, _ in documents] == [1, 2, 3, 4, 5, 6]
        listed = [text for _, text in documents]
        # the document asked about, the others of its article, then any
        assert {f"Town {found[2]}.{p} lies on river {found[2]}." for p in range(3)} <= set(listed)
        assert len(set(listed)) == 6
        assert sample.outputs == [f"on river {found[2]}", f"river {found[2]}"]


def test_hotpotqa_files(tmp_path: Path) -> None:
    row = {"question": "Who?", "answer": "Ada", "context": [["One", ["A. ", "B."]], ["Two", ["C."]]]}
    (tmp_path / "hotpot.json").write_text(json.dumps([row]), encoding="utf8")
    as_rows = {**row, "context": {"title": ["One", "Two"], "sentences": [["A. ", "B."], ["C."]]}}
    (tmp_path / "hotpot.jsonl").write_text(json.dumps(as_rows) + "\n", encoding="utf8")
    plain = ruler_documents.hotpotqa(tmp_path / "hotpot.json", 10)
    assert plain == ruler_documents.hotpotqa(tmp_path / "hotpot.jsonl", 10)
    assert plain.texts == ["One\nA. B.", "Two\nC."]
    assert plain.rows == [("Who?", ["Ada"], [0, 1], [])]


@pytest.mark.parametrize(
    ("name", "text", "outputs", "expected"),
    [
        # string_match_all: the mean over references of "stands in the answer, whatever its case"
        ("niah_multivalue", " 111, 222 and 333.", ["111", "222", "333", "444"], 75.0),
        ("vt", "ABC\x00def", ["abc", "DEF"], 100.0),
        ("cwe", "1. apple 2. pears", ["apple", "pear", "plum"], pytest.approx(200 / 3)),
        ("fwe", "", ["a", "b", "c"], 0.0),
        # string_match_part: one of the references is enough
        ("qa_1", "It is Paris", ["paris", "the city of Paris"], 100.0),
        ("qa_2", "It is Rome", ["paris", "the city of Paris"], 0.0),
    ],
)
def test_scores(name: str, text: str, outputs: list[str], expected: float) -> None:
    assert score(name, text, outputs) == expected


@pytest.mark.parametrize("name", [name for name in ruler_data.TASKS if not name.startswith("qa")])
def test_texts_fill_the_length_and_follow_the_seed(name: str) -> None:
    tokenizer: PreTrainedTokenizerBase = loaded().tokenizer  # of characters: lengths are letters
    length = 12000 if name == "cwe" else 5000
    found = texts(tokenizer, name, length, 3, sources=SOURCES, chat=True, seed=1)
    assert found == texts(tokenizer, name, length, 3, sources=SOURCES, chat=True, seed=1)
    assert found != texts(tokenizer, name, length, 3, sources=SOURCES, chat=True, seed=2)
    for sample in found:
        used = len(decoding.encode(tokenizer, whole(sample))) + ruler_data.TASKS[name](length, len).tokens
        assert 0.8 * length < used <= length


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="niah_single_1 at context 300: the context is too short"):
        texts(loaded().tokenizer, "niah_single_1", 300, 1, sources=SOURCES, chat=True, seed=0)


def test_run(squad: Path) -> None:
    options = {
        "subtasks": "niah_single_1,fwe,qa_1",
        "squad": str(squad),
        "limit": 2,
        "context": [1200],
        "batch_size": 3,
    }
    document = runner.run(loaded(), "ruler", CacheOptions(budget=64), text=DEFAULT_PROMPT, **options)
    figures = document["metrics"]
    assert set(figures) == {
        "ruler",
        "niah_single_1",
        "fwe",
        "qa_1",
        "cache_bytes",
        "share",
        "seconds_per_question",
        "passes",
    }
    assert figures["cache_bytes"]["value"] < figures["cache_bytes"]["full"]
    assert figures["share"]["value"] < 0.1
    tasks = [item["request"]["subtask"] for item in document["results"]]
    assert tasks == ["niah_single_1"] * 2 + ["fwe"] * 2 + ["qa_1"] * 2
    for item in document["results"]:
        found = item["result"]["scores"]
        assert not found["second_pass"]
        assert not found["question_seen"]
        assert found["prompt_tokens"] <= 1200


def test_two_lengths_have_their_own_figures() -> None:
    document = runner.run(
        loaded(), "ruler", CacheOptions(strategy="full"), subtasks="niah_single_1", limit=1, context=[900, 1200]
    )
    assert {"ruler", "ruler_900", "ruler_1200", "niah_single_1_900"} <= set(document["metrics"])
    assert document["metrics"]["ruler_900"]["full"] == document["metrics"]["ruler_900"]["value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subtasks": "niah"}, "subtask 'niah' is unknown; accepted: niah_single_1"),
        ({"subtasks": "qa_1"}, "subtask qa_1 needs documents: squad=FILE, or squad=hub"),
        ({"subtasks": "fwe", "question": "maybe"}, "question 'maybe' is unknown; accepted: unseen, seen"),
        ({"text": "a b", "essays": "some/essays"}, "give a text or essays, not both"),
    ],
)
def test_refusals(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        runner.run(loaded(), "ruler", limit=1, **{"context": [1200], **options})


def test_the_chat_template_frames_text_and_question() -> None:
    tokenizer = loaded().tokenizer
    assert getattr(tokenizer, "chat_template", None) is None
    context, question = compose(tokenizer, "text ", "question?", " Answer:")
    assert tokenizer.decode(context + question) == "text question? Answer:"
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}> {% endif %}"
    )
    try:
        context, question = compose(tokenizer, "text ", "question?", " Answer:")
        assert tokenizer.decode(context) == "[text "
        assert tokenizer.decode(question) == "question?]>  Answer:"
        assert compose(tokenizer, "text", "", chat=False)[0] == decoding.encode(tokenizer, "text")
    finally:
        tokenizer.chat_template = None
