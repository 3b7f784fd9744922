"""``summarize``: one-sentence summaries of news articles, scored with ROUGE against those that people wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liquidfusion.bench import decoding
from liquidfusion.bench.caches import CacheMaker, CacheOptions, facts
from liquidfusion.bench.data import load_dataset, require
from liquidfusion.bench.stats import Metric, mean_metric
from liquidfusion.bench.tasks.generate import logprobs
from liquidfusion.bench.tasks.task import Progress, Record, Task, record, scores
from liquidfusion.bench.texts import read_jsonl
from liquidfusion.exceptions import ConfigError

DATASETS = {
    "xsum": ("EdinburghNLP/xsum", None, "test", "document", "summary"),
    "xlsum": ("csebuetnlp/xlsum", "english", "test", "text", "summary"),
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", "test", "article", "highlights"),
}
"""Name → hub id, configuration, split, column of the article, column of the summary."""

_ROUGE = ("rouge1", "rouge2", "rougeL")
_FIELDS = (("article", "summary_gt"), ("document", "summary"), ("article", "highlights"), ("text", "summary"))


def summarize(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: CacheMaker = CacheOptions(),  # noqa: B008 - frozen
    *,
    data: Path | None = None,
    dataset: str = "xsum",
    limit: int = 16,
    max_tokens: int = 64,
    temperature: float = 0.0,
    chunk: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Summarise articles in one sentence and score the summaries.

    Parameters
    ----------
    data
        A ``.jsonl`` file whose objects have an article and its summary: ``article`` and ``summary_gt``, ``document``
        and ``summary``, ``article`` and ``highlights``, or ``text`` and ``summary``. An article that already ends in
        an instruction is used as it is.
    dataset
        Without `data`, a name from :data:`DATASETS`, read through the package ``datasets``.
    limit
        Articles, from the first on.
    chunk
        Prompt tokens fed in one call; None: all at once.
    batch_size
        Articles of similar length decoded together, padded on the left. A percentage refers to the shortest of them.

    Returns
    -------
    list of Record
        ``scores``: ``rouge1``, ``rouge2``, ``rougeL`` (F-measures, with stemming).

    Raises
    ------
    ConfigError
        The data cannot be read or a package is missing.
    """
    scorer = require("rouge_score.rouge_scorer", "rouge-score").RougeScorer(_ROUGE, use_stemmer=True)
    pairs = _read(data, dataset, limit)
    prompts = [prompt(article) for article, _ in pairs]
    rows = [decoding.prefix(tokenizer) + decoding.encode(tokenizer, text) for text in prompts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    records: dict[int, Record] = {}
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        store = cache.make(model, min(len(rows[index]) for index in batch))
        completions, timing = decoding.generate(
            model,
            tokenizer,
            [rows[index] for index in batch],
            store,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            chunk=chunk,
            stop=("###", "\n\n"),
        )
        for index, completion in zip(batch, completions, strict=True):
            rouge = scorer.score(pairs[index][1], completion.text)
            records[index] = record(
                prompts[index],
                {**{name: rouge[name].fmeasure for name in _ROUGE}, "tokens": len(rows[index]), **facts(store)},
                text=completion.text,
                logprobs=logprobs(tokenizer, completion),
                finish_reason=completion.finish_reason,
                temperature=temperature,
                max_tokens=max_tokens,
                seconds=timing.total,
                batch_size=len(batch),
                reference=pairs[index][1],
            )
        if progress is not None:
            progress(len(records), len(rows))
    return [records[index] for index in range(len(rows))]


def prompt(article: str) -> str:
    """Return the prompt for an article: the form that H2O's authors used.

    Sources: Z. Zhang et al., H2O, https://arxiv.org/abs/2306.14048.
    """
    if "Summarize the above article" in article:
        return article
    return f"###\nArticle: {article.strip()}\n\nSummarize the above article in 1 sentence.\n"


def _read(data: Path | None, dataset: str, limit: int) -> list[tuple[str, str]]:
    if data is not None:
        pairs = []
        for row in read_jsonl(data, (), limit):
            fields = next((pair for pair in _FIELDS if pair[0] in row and pair[1] in row), None)
            if fields is None:
                raise ConfigError(f"{data}: each object needs an article and its summary, like article and summary_gt")
            pairs.append((str(row[fields[0]]), str(row[fields[1]])))
        return pairs
    if dataset not in DATASETS:
        raise ConfigError(f"dataset {dataset!r} is unknown; accepted: {', '.join(DATASETS)}, or a .jsonl file")
    hub_id, name, split, article, summary = DATASETS[dataset]
    return [(str(row[article]), str(row[summary])) for row in load_dataset(hub_id, name, split, limit)]


def metrics(records: Sequence[Record], full: Sequence[Record] | None = None) -> dict[str, Metric]:
    """Return mean ROUGE-1, -2 and -L."""
    return {name: mean_metric(scores(records, name) or [], "", scores(full, name)) for name in _ROUGE}


TASK = Task(
    name="summarize",
    summary="summarise news articles; ROUGE against people's summaries",
    measure=summarize,
    metrics=metrics,
    reference=CacheOptions(strategy="full"),
    baseline=True,
    main="rougeL",
)
