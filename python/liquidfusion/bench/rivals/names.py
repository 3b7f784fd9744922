"""From the words after ``--rival`` to rivals that a task can measure."""

import ast
import importlib
import inspect
import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from liquidfusion.bench.rivals.process import Process, process
from liquidfusion.exceptions import ConfigError

PYTHON = "LIQUIDFUSION_RIVAL_PYTHON"
"""Environment variable that names the interpreter for kvpress, where none is given."""

_ACCEPTED = "kvpress:NAME, transformers:NAME or python:MODULE.CLASS"
_SETUP = (
    "make one: python -m venv rivals && rivals/bin/pip install kvpress, then --rival-python rivals/bin/python "
    f"(or set {PYTHON})"
)


@dataclass(frozen=True, slots=True)
class Press:
    """A press of kvpress at a size; its prompts are answered in another process.

    Attributes
    ----------
    press
        An expression: ``SnapKVPress``, ``AdaKVPress(SnapKVPress(window_size=32))``; ``full`` keeps everything.
    python
        The interpreter of an environment with kvpress; None: what the environment variable names.
    cache_size
        Percent of context and question together, above 0 and up to 100; what is kept of the context, as kvpress
        counts: question and answer come on top.
    budget
        Tokens kept of the context for each layer, row and kv head on average.
    memory
        Bytes kept of the context of each row. One of the three sizes is accepted, and needed but for ``full``.
    """

    press: str
    python: str | None = None
    cache_size: float | None = None
    budget: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("cache_size", "budget", "memory")}
        given = [f"{name} {size}" for name, size in sizes.items() if size is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given; one of {', '.join(sizes)} is accepted")
        if self.cache_size is not None and not 0 < self.cache_size <= 100:
            raise ConfigError(f"cache_size {self.cache_size:g} is not above 0 and at most 100 percent")
        for name in ("budget", "memory"):
            if sizes[name] is not None and sizes[name] < 1:
                raise ConfigError(f"{name} {sizes[name]} is not at least 1")
        if self.press != "full" and not given:
            raise ConfigError(f"rival kvpress:{self.press} needs a size: one of {', '.join(sizes)}")
        _check(self.press)

    @property
    def strategy(self) -> str:
        """The name under which results are filed."""
        return f"kvpress:{self.press}"

    def as_dict(self) -> dict[str, Any]:
        """Return what tells this rival from others, as JSON can say it."""
        sizes = {name: getattr(self, name) for name in ("cache_size", "budget", "memory")}
        return {"strategy": self.strategy, **{name: size for name, size in sizes.items() if size is not None}}

    def kept(self, tokens: int, token_bytes: int = 1) -> int:
        """Return how many tokens of a prompt are kept.

        Parameters
        ----------
        tokens
            The length of the prompt.
        token_bytes
            What a token takes in all layers and heads.
        """
        if self.memory is not None:
            return max(1, self.memory // token_bytes)
        if self.budget is not None:
            return self.budget
        return tokens if self.cache_size is None else max(1, int(tokens * self.cache_size / 100))

    def make(self, model: PreTrainedModel, prompt_tokens: int) -> Cache:  # noqa: ARG002 - every cache has it
        """Refuse: a press is no cache of this process.

        Raises
        ------
        ConfigError
            Always: the task needs a cache here.
        """
        raise ConfigError(f"rival {self.strategy} answers in a process of its own: this task cannot use it")

    def start(self, model: PreTrainedModel) -> Process:
        """Return the process that answers for a model of this process.

        Raises
        ------
        ConfigError
            No interpreter is named.
        RivalError
            It cannot be started.
        """
        python = self.python or os.environ.get(PYTHON)
        if not python:
            raise ConfigError(f"rival {self.strategy} needs an interpreter with kvpress; {_SETUP}")
        dtype = str(model.dtype).removeprefix("torch.")
        return process(python, str(model.config.name_or_path), dtype, str(model.device), torch.get_num_threads())


@dataclass(frozen=True, slots=True)
class Framework:
    """A cache made in this process: one that transformers ships, or a class of your own.

    Attributes
    ----------
    call
        ``QuantizedCache(backend='quanto', nbits=4)``, or with the module of your class before it,
        ``my_cache.MyCache(window=64)``: looked for in the working directory, too. It is made with the model's
        ``config``, with these arguments, and, if its ``__init__`` has that name, with ``budget``, the run's size.
    family
        ``"transformers"``, or ``"python"`` for a class of your own.
    cache_size
        Percent of context and question together, from which ``budget`` follows.
    budget
        Tokens for each layer, row and kv head.
    """

    call: str
    family: str = "transformers"
    cache_size: float | None = None
    budget: int | None = None

    memory = None
    """Only the class itself could tell what a token takes."""

    def __post_init__(self) -> None:
        if self.family == "transformers":
            _check(self.call)
        else:
            self._class()

    def as_dict(self) -> dict[str, Any]:
        """Return what tells this rival from others, as JSON can say it."""
        sizes = {name: getattr(self, name) for name in ("cache_size", "budget")}
        return {"strategy": self.strategy, **{name: size for name, size in sizes.items() if size is not None}}

    @property
    def strategy(self) -> str:
        """The name under which results are filed."""
        return f"{self.family}:{self.call}"

    def make(self, model: PreTrainedModel, prompt_tokens: int) -> Cache:
        """Return a fresh cache for prompts of `prompt_tokens` tokens.

        Raises
        ------
        ConfigError
            There is no such class, or it does not take these arguments.
        """
        kind = self._class()
        node = _parsed(self.call)
        named = {word.arg: ast.literal_eval(word.value) for word in getattr(node, "keywords", []) if word.arg}
        if "budget" in inspect.signature(kind).parameters and "budget" not in named:
            share = None if self.cache_size is None else max(1, int(prompt_tokens * self.cache_size / 100))
            named |= {"budget": self.budget if share is None else share}
        try:
            made: Cache = kind(config=model.config, **named)
        except (ImportError, TypeError, ValueError) as error:
            raise ConfigError(f"rival {self.strategy}: {' '.join(str(error).split())}") from error
        return made

    def _class(self) -> Any:
        node = _parsed(self.call)
        name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        module, _, last = name.rpartition(".")
        if self.family == "transformers":
            found, where = getattr(transformers, name, None), f"transformers {transformers.__version__}"
        else:
            found, where = getattr(_module(self.strategy, module), last, None), f"module {module!r}"
        if not (isinstance(found, type) and issubclass(found, Cache)):
            raise ConfigError(f"{where} has no cache {last!r}: a subclass of transformers.Cache is accepted")
        return found

    @staticmethod
    def held(cache: Cache) -> int:
        """Return the bytes of every tensor in a cache's layers, those within quantised tensors included."""
        return sum(_bytes(value) for layer in cache.layers for value in vars(layer).values())


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    if not isinstance(value, torch.Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):  # a wrapper, whose own size is that of what it stands for
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes


def _module(rival: str, name: str) -> ModuleType:
    """The module of somebody's own class; a command does not look for it where it was typed, so this does."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"rival {rival}: python:MODULE.CLASS is accepted, with arguments if wanted")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"rival {rival}: {error}") from error


Rival = Press | Framework


def parse(
    text: str,
    *,
    python: str | None = None,
    cache_size: float | None = None,
    budget: int | None = None,
    memory: int | None = None,
) -> list[Rival]:
    """Return the rivals of one ``--rival``: names with commas between them, after their family and a colon.

    Parameters
    ----------
    text
        ``kvpress:KeyDiffPress,SnapKVPress(window_size=32),transformers:QuantizedCache(backend='quanto')``; what comes
        after a comma belongs to the last family named.
    python
        The interpreter with kvpress.
    cache_size, budget, memory
        The size of presses, and of your own classes but for `memory`; transformers' caches keep every token.

    Raises
    ------
    ConfigError
        A family is unknown, a name is no expression of names and constants, or a size is missing or out of range.
    """
    found: list[Rival] = []
    family = ""
    for word in _split(text):
        before, colon, after = word.partition(":")
        if colon and before.isidentifier():
            family, word = before, after.strip()
        if family == "kvpress":
            size = (None, None, None) if word == "full" else (cache_size, budget, memory)
            found.append(Press(word, python, *size))
        elif family == "transformers":
            found.append(Framework(word))
        elif family == "python":
            found.append(Framework(word, family, cache_size, budget))
        else:
            raise ConfigError(f"rival {word!r}: {_ACCEPTED} is accepted")
    if not found:
        raise ConfigError(f"no rival is named: {_ACCEPTED} is accepted")
    return found


def _split(text: str) -> list[str]:
    """Return the words between the commas that stand outside brackets."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words if word.strip()]


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        raise ConfigError(f"rival {text!r} is not a name, or a call such as SnapKVPress(window_size=32)") from None


def _check(text: str) -> None:
    """Refuse an expression that is more than names, calls of names, and constants."""

    def fine(node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return True
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Name) and all(map(fine, [*node.args, *(w.value for w in node.keywords)]))
        try:
            ast.literal_eval(node)
        except ValueError:
            return False
        return True

    node = _parsed(text)
    if not isinstance(node, ast.Name | ast.Call) or not fine(node):
        raise ConfigError(f"rival {text!r} is not a name, or a call such as SnapKVPress(window_size=32)")
