"""The texts of RULER: thirteen generators with the original's templates, needles and rules, for any tokenizer.

Written from the publication and the definitions of its tasks; the random draws are this program's own.

Source: C. Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
https://arxiv.org/abs/2404.06654 and https://github.com/NVIDIA/RULER.
"""

import math
import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from liquidfusion.bench.data import require
from liquidfusion.bench.tasks.ruler_documents import Documents
from liquidfusion.exceptions import ConfigError


@dataclass(frozen=True, slots=True)
class Sample:
    """One text with its question, as strings: the original's ``input`` is context and question.

    Attributes
    ----------
    context, question, prefix
        What is read, what is asked after it, and what the answer begins with.
    outputs
        What the answer must contain.
    """

    context: str
    question: str
    prefix: str
    outputs: list[str]


@dataclass(frozen=True, slots=True)
class Sources:
    """What the texts are made of.

    Attributes
    ----------
    haystack
        The essay in which needles are hidden, as words.
    questions
        Task → its questions with their documents, see :mod:`liquidfusion.bench.tasks.ruler_documents`.
    """

    haystack: list[str]
    questions: dict[str, Documents] = field(default_factory=dict)


Count = Callable[[str], int]
"""Returns the tokens of a text."""

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_DEPTHS = [round(index * 100 / 39) for index in range(40)]

_NIAH_CONTEXT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
)
_NIAH_QUESTION = "What are all the special magic {kind} for {query} mentioned in the provided text?"
_NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"

_VT_CONTEXT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
_VT_QUESTION = "Question: Find all variables that are assigned the value {query} in the text above."
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)

_CWE_CONTEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
)
_CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

_FWE_CONTEXT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
)
_FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"

_QA_TOLD = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_QA_CONTEXT = _QA_TOLD + "\n\nThe following are given documents.\n\n{context}\n\n"
_QA_QUESTION = _QA_TOLD + "\n\nQuestion: {query}"
_QA_PREFIX = " Answer:"


@lru_cache(maxsize=1)
def word_lists() -> tuple[list[str], list[str], list[str]]:
    """Return the adjectives, the nouns and all words that RULER draws from: those of the package wonderwords.

    Raises
    ------
    ConfigError
        The package is not installed.
    """
    module = require("wonderwords.random_word", "wonderwords")
    nouns, adjectives, verbs = (
        module._get_words_from_text_file(f"{kind}list.txt") for kind in ("noun", "adjective", "verb")
    )
    return sorted(set(adjectives)), sorted(set(nouns)), sorted({*nouns, *adjectives, *verbs})


def _value(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        adjectives, nouns, _ = word_lists()
        return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@dataclass(frozen=True, slots=True)
class Needles:
    """``niah_*``: sentences hidden in noise, in an essay, or among others of their kind.

    Attributes
    ----------
    haystack
        ``"noise"``, ``"essay"`` or ``"needle"``.
    keys, values
        Kinds: ``"words"``, ``"numbers"`` or ``"uuids"``.
    count, each, asked
        Keys hidden, values of each key, and keys asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    count: int = 1
    each: int = 1
    asked: int = 1
    tokens = 128

    def sample(self, size: int, rng: random.Random, sources: Sources) -> Sample:
        """Return a text with `size` words or sentences of haystack."""
        keys = [_value(self.keys, rng) for _ in range(self.count)]
        values = [[_value(self.values, rng) for _ in range(self.each)] for _ in keys]
        needles = [
            _NEEDLE.format(kind=self.values, key=key, value=value)
            for key, row in zip(keys, values, strict=True)
            for value in row
        ]
        rng.shuffle(needles)
        if self.haystack == "essay":
            context = _hide_in_essay(needles, size, rng, sources.haystack)
        else:
            lines = [_NOISE] * size
            if self.haystack == "needle":
                lines = [
                    _NEEDLE.format(kind=self.values, key=_value(self.keys, rng), value=_value(self.values, rng))
                    for _ in range(size)
                ]
            places = sorted(rng.sample(range(max(size, len(needles))), len(needles)), reverse=True)
            for place, needle in zip(places, needles, strict=True):
                lines.insert(place, needle)
            context = "\n".join(lines)
        chosen = rng.sample(range(self.count), self.asked)
        names = [keys[index] for index in chosen]
        query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
        kind, parts = self.values, (_NIAH_CONTEXT, _NIAH_QUESTION, _NIAH_PREFIX)
        if self.asked * self.each == 1:
            kind = kind.removesuffix("s")
            parts = tuple(_singular(part) for part in parts)  # type: ignore[assignment]
        told, question, prefix = (part.replace("{kind}", kind).replace("{query}", query) for part in parts)
        outputs = [value for index in chosen for value in values[index]]
        return Sample(told.replace("{context}", context), question, prefix, outputs)


def _singular(template: str) -> str:
    """Return a template of ``niah`` for one value, by the original's four replacements in their order."""
    for plural, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(plural, one)
    return template


def _hide_in_essay(needles: list[str], size: int, rng: random.Random, words: list[str]) -> str:
    """Return `size` words of the essay, repeated as needed, with needles between its sentences."""
    text = " ".join((words * math.ceil(size / len(words)))[:size])
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    places = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(_DEPTHS, len(needles)))
    parts = []
    for begin, end, needle in zip([0, *places], [*places, len(sentences)], [*needles, None], strict=True):
        parts.append(" ".join(sentences[begin:end]))
        if needle is not None:
            parts.append(needle)
    return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Variables:
    """``vt``: a chain of variables that hand a value on, hidden in noise, after an example of another chain.

    Attributes
    ----------
    example
        Lines of noise in the example, see :func:`variables`.
    hops
        Assignments after the first.
    """

    example: int
    hops: int = 4
    tokens = 30

    def sample(self, size: int, rng: random.Random, sources: Sources) -> Sample:  # noqa: ARG002 - as the others
        """Return an example and a text with `size` lines of noise."""
        text = self.chain(size, rng)
        other = self.chain(self.example, rng, letters=3)
        shown = f"{other.context}{other.question}{other.prefix} {' '.join(other.outputs)}\n\n"
        return Sample(shown + text.context, text.question, text.prefix, text.outputs)

    def chain(self, size: int, rng: random.Random, letters: int = 5) -> Sample:
        """Return one text with `size` lines of noise, whose variables have names of `letters` letters."""
        names: list[str] = []
        while len(names) < self.hops + 1:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        value = str(rng.randrange(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {after} = VAR {before} " for before, after in pairwise(names)]
        lines = [_NOISE] * size
        places = sorted(rng.sample(range(max(size, len(chain))), len(chain)))
        for done, (place, link) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + done, link)
        context = _VT_CONTEXT.format(context="\n".join(lines).replace(". \n", ".\n"))
        prefix = _VT_PREFIX.format(count=self.hops + 1, query=value)
        return Sample(context, _VT_QUESTION.format(query=value), prefix, names)


def variables(length: int, count: Count) -> Variables:  # noqa: ARG001 - as the other generators are made
    """Return ``vt`` with the longest example of at most 500 tokens, whatever the length of the text."""
    rng, longest = random.Random(0), 5
    while longest < 100:
        shown = Variables(0).chain(longest + 1, rng, letters=3)
        if count(shown.context + shown.question + shown.prefix) > 500:
            break
        longest += 1
    return Variables(longest)


@dataclass(frozen=True, slots=True)
class CommonWords:
    """``cwe``: ten words that stand in a list more often than all others, after a short example.

    Attributes
    ----------
    length
        Tokens of the whole text: below 4,096 the original repeats the words less often.
    """

    length: int
    tokens = 120

    def sample(self, size: int, rng: random.Random, sources: Sources) -> Sample:  # noqa: ARG002 - as the others
        """Return an example and a list with `size` different words."""
        short = self.length < 4096
        example, known = _word_list(20 if short else 40, *((3, 1) if short else (10, 3)), rng)
        listed, outputs = _word_list(size, *((6, 1) if short else (30, 3)), rng)
        answer = " ".join(f"{index}. {word}" for index, word in enumerate(known, 1))
        shown = f"{_CWE_CONTEXT.format(context=example)}{_CWE_QUESTION}{_CWE_PREFIX} {answer}\n"
        return Sample(shown + _CWE_CONTEXT.format(context=listed), _CWE_QUESTION, _CWE_PREFIX, outputs)


def _word_list(size: int, common: int, others: int, rng: random.Random) -> tuple[str, list[str]]:
    """Return a numbered list in which ten of `size` words stand `common` times and the rest `others` times."""
    adjectives, nouns, words = word_lists()
    size = max(size, 10)
    if size <= len(words):
        chosen = rng.sample(words, size)
    else:  # past its list of words the original draws from a larger one; pairs of adjective and noun are enough
        pairs = rng.sample(range(len(adjectives) * len(nouns)), size)
        chosen = [f"{adjectives[pair // len(nouns)]}-{nouns[pair % len(nouns)]}" for pair in pairs]
    listed = chosen[:10] * common + chosen[10:] * others
    rng.shuffle(listed)
    return " ".join(f"{index}. {word}" for index, word in enumerate(listed, 1)), chosen[:10]


@dataclass(frozen=True, slots=True)
class FrequentWords:
    """``fwe``: coded words whose counts follow a zeta distribution; the three after the dots are asked for.

    Attributes
    ----------
    length
        Tokens of the whole text: a fiftieth of it is the number of different words.
    """

    length: int
    tokens = 50
    alpha = 2.0

    def sample(self, size: int, rng: random.Random, sources: Sources) -> Sample:  # noqa: ARG002 - as the others
        """Return a text in which the counts of words add up to about `size`."""
        count = max(4, (self.length - self.tokens) // 50)
        words: list[str] = []
        while len(words) < count:
            word = "".join(rng.choices(string.ascii_lowercase, k=6))
            if word not in words:
                words.append(word)
        words[0] = "..."
        text = [
            word for word, times in zip(words, zeta_counts(size, count, self.alpha), strict=True) for _ in range(times)
        ]
        rng.shuffle(text)
        return Sample(_FWE_CONTEXT.format(context=" ".join(text)), _FWE_QUESTION, _FWE_PREFIX, words[1:4])


def zeta_counts(total: int, ranks: int, alpha: float) -> list[int]:
    """Return how often the words of ranks 1, 2, … stand in a text: ``⌊total · rank^-alpha / ζ(alpha)⌋``."""
    # ζ by its first terms and the integral of the rest (Euler and Maclaurin); alpha 2 to ten digits.
    terms = 1000
    zeta = sum(k**-alpha for k in range(1, terms)) + terms ** (1 - alpha) / (alpha - 1) + 0.5 * terms**-alpha
    zeta += alpha / 12 * terms ** (-alpha - 1)
    return [int(total * rank**-alpha / zeta) for rank in range(1, ranks + 1)]


@dataclass(frozen=True, slots=True)
class Questions:
    """``qa_*``: a question about one of many documents.

    Attributes
    ----------
    name
        The task, whose documents the sources hold.
    """

    name: str
    tokens = 32

    def sample(self, size: int, rng: random.Random, sources: Sources) -> Sample:
        """Return a question with `size` documents."""
        documents = sources.questions[self.name]
        query, answers, own, more = documents.rows[rng.randrange(len(documents.rows))]
        wanted, count = max(0, size - len(own)), len(documents.texts)
        if size >= count:
            chosen = [index % count for index in range(size)]
        elif wanted <= len(more):
            chosen = [*own, *rng.sample(more, wanted)]
        else:
            others = [index for index in range(count) if index not in {*own, *more}]
            chosen = [*own, *more, *rng.sample(others, min(wanted - len(more), len(others)))]
        rng.shuffle(chosen)
        listed = "\n\n".join(f"Document {i}:\n{documents.texts[index]}" for i, index in enumerate(chosen, 1))
        told = _QA_CONTEXT.replace("{context}", listed)
        return Sample(told, _QA_QUESTION.replace("{query}", query), _QA_PREFIX, answers)


Generator = Needles | Variables | CommonWords | FrequentWords | Questions

TASKS: dict[str, Callable[[int, Count], Generator]] = {
    "niah_single_1": lambda *_: Needles("noise"),
    "niah_single_2": lambda *_: Needles("essay"),
    "niah_single_3": lambda *_: Needles("essay", values="uuids"),
    "niah_multikey_1": lambda *_: Needles("essay", count=4),
    "niah_multikey_2": lambda *_: Needles("needle"),
    "niah_multikey_3": lambda *_: Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": lambda *_: Needles("essay", each=4),
    "niah_multiquery": lambda *_: Needles("essay", count=4, asked=4),
    "vt": variables,
    "cwe": lambda length, _: CommonWords(length),
    "fwe": lambda length, _: FrequentWords(length),
    "qa_1": lambda *_: Questions("qa_1"),
    "qa_2": lambda *_: Questions("qa_2"),
}
"""Name → the generator for texts of a length, with the parameters of the original's ``synthetic.yaml``."""


def fit(generator: Generator, fits: Callable[[Sample], bool], upper: int, rng: random.Random, sources: Sources) -> int:
    """Return the largest haystack, at most `upper`, whose text fits, by bisection.

    Raises
    ------
    ConfigError
        Even the smallest does not.
    """
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        if fits(generator.sample(middle, rng, sources)):
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise ConfigError("the context is too short for this task")
    return low
