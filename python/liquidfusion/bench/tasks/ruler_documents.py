"""The questions and documents of RULER's ``qa_1`` and ``qa_2``: SQuAD and HotpotQA, from files or the hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liquidfusion.bench.data import load_dataset
from liquidfusion.bench.texts import read_text
from liquidfusion.exceptions import ConfigError


@dataclass(frozen=True, slots=True)
class Documents:
    """Questions about documents.

    Attributes
    ----------
    texts
        Every document.
    rows
        Question, answers, the documents that hold the answer, and more documents of the same article.
    """

    texts: list[str]
    rows: list[tuple[str, list[str], list[int], list[int]]]


def squad(path: Path | None, limit: int) -> Documents:
    """Return SQuAD 2's questions that have an answer: of its JSON file, of a ``.jsonl`` file, or of the hub.

    Raises
    ------
    ConfigError
        The data cannot be read.
    """
    if path is not None and path.suffix != ".jsonl":
        data = _json(path)
        rows = [
            {
                "title": number,
                "context": part["context"],
                "question": qa["question"],
                "answers": {"text": [a["text"] for a in qa["answers"]]},
            }
            for number, article in enumerate(data["data"])
            for part in article["paragraphs"]
            for qa in part["qas"]
            if not qa.get("is_impossible")
        ]
    else:
        rows = _rows(path, "rajpurkar/squad_v2", None, "validation", limit)
    texts = sorted({row["context"] for row in rows})
    index = {text: number for number, text in enumerate(texts)}
    articles: dict[Any, list[int]] = {}
    for row in rows:
        known = articles.setdefault(row["title"], [])
        if index[row["context"]] not in known:
            known.append(index[row["context"]])
    questions = [
        (
            row["question"],
            list(row["answers"]["text"]),
            [own := index[row["context"]]],
            [other for other in articles[row["title"]] if other != own],
        )
        for row in rows
        if row["answers"]["text"]
    ]
    return Documents(texts, questions)


def hotpotqa(path: Path | None, limit: int) -> Documents:
    """Return HotpotQA's questions with ten paragraphs each: of its JSON file, of a ``.jsonl`` file, or of the hub.

    Raises
    ------
    ConfigError
        The data cannot be read.
    """
    if path is not None and path.suffix != ".jsonl":
        found = [(row["question"], row["answer"], [(t, p) for t, p in row["context"]]) for row in _json(path)]
    else:
        rows = _rows(path, "hotpotqa/hotpot_qa", "distractor", "validation", limit)
        found = [
            (
                row["question"],
                row["answer"],
                list(zip(row["context"]["title"], row["context"]["sentences"], strict=True)),
            )
            for row in rows
        ]
    joined = [(q, a, [f"{title}\n{''.join(sentences)}" for title, sentences in parts]) for q, a, parts in found]
    texts = sorted({text for _, _, parts in joined for text in parts})
    index = {text: number for number, text in enumerate(texts)}
    return Documents(texts, [(q, [a], [index[text] for text in parts], []) for q, a, parts in joined])


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error.msg}") from error


def _rows(path: Path | None, hub_id: str, name: str | None, split: str, limit: int) -> list[dict[str, Any]]:
    if path is None:
        return load_dataset(hub_id, name, split, limit)
    return [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
