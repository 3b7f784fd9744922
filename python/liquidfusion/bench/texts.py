"""Texts that a measurement reads when none is given; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

from liquidfusion.exceptions import ConfigError

DEFAULT_PROMPT = """\
A small harbour town kept its weather records in a row of wooden drawers. Every morning the keeper of the lighthouse \
wrote down the pressure, the wind and the height of the tide on a card, and every evening the card went into the \
first drawer. When the drawer was full, its cards moved to the second, and so on, until after some forty years there \
was no room left in the whole building, and nobody could find anything any more.

The first proposal was to throw away the oldest cards. It was cheap and quick, but the oldest cards held the great \
flood, and the engineers who wanted to build a sea wall needed exactly that week. The second proposal was to keep \
the first card of all, because everyone who came to visit started by looking at it, together with the cards of the \
last month. That made the visitors happy, yet the engineers still went home without an answer. The third proposal \
was to count how often each card was taken out. A card that many people had asked for should stay; a card that \
nobody had touched could go. This worked better, although a new card never had the time to become popular, and cards \
that had been fashionable ten years ago stayed for ever.

In the end the keeper, a patient woman named Ines Carvalho, combined what was good in each of them. She kept the \
first four cards as they were. She kept the newest ones, since tomorrow's weather is mostly like today's. From the \
rest she kept those that were often taken out, but let their count fade a little every week, so that old fashions \
could die. And she put a red mark on any card that had once been studied with great attention, even if only a single \
time, because someone would surely come back for it. The number of drawers never changed again. The code for the \
locked drawer with the red cards, she told her successor, was 73914.

Years later a student asked her why she had not simply built a larger house. She answered that a larger house would \
also be full one day, and that walking along all the drawers took longer each year. With her method the walk always \
took the same time, and the important cards were nearly always there.

Question: How did the keeper decide which cards to keep?
Answer:"""


def reference_text() -> str:
    """Return the English reference text of Python's standard library, ``pydoc_data.topics``: about 465,000 characters.

    The text differs a little between versions of Python; results say which one they used.
    """
    from pydoc_data import topics

    return "\n\n".join(text.strip() for _, text in sorted(topics.topics.items()))


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises
    ------
    ConfigError
        The file cannot be read, is not text or is empty.
    """
    try:
        text = path.read_text(encoding="utf8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text") from error
    if not text.strip():
        raise ConfigError(f"{path} is empty")
    return text


def read_jsonl(path: Path, required: tuple[str, ...], limit: int | None = None) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, the first `limit` of them.

    Raises
    ------
    ConfigError
        The file cannot be read, or a line is not an object with the `required` keys; the message names the line.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        if limit is not None and len(rows) == limit:
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not JSON: {error.msg}") from error
        missing = [key for key in required if not isinstance(row, dict) or key not in row]
        if missing:
            raise ConfigError(f"{path}, line {number}: an object with the keys {', '.join(required)} is needed")
        rows.append(row)
    return rows


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Return prompts: one for each ``prompt`` of a ``.jsonl`` file, or the whole text of any other file."""
    if path.suffix == ".jsonl":
        return [str(row["prompt"]) for row in read_jsonl(path, ("prompt",), limit)]
    return [read_text(path)]
