"""From the words of a command line to the keyword options of a task."""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liquidfusion.bench.caches import HOW
from liquidfusion.bench.parameters import KINDS, table
from liquidfusion.bench.runner import find_task
from liquidfusion.bench.tasks.task import Task
from liquidfusion.bench.texts import read_prompts, read_text
from liquidfusion.exceptions import ConfigError

_INPUTS = {"prompt": ("prompts", "text"), "prompt_file": ("prompts", "text", "data")}
"""Option → the options of tasks that it fills, the first of them that a task has."""


def task_options(task: Task, common: Mapping[str, Any], extra: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options that `task` takes.

    Parameters
    ----------
    common
        Options by name, None for those not given. ``prompt`` and ``prompt_file`` are the task's input: prompts, a text,
        or a file of examples. ``context`` may be several numbers with commas between them.
    extra
        ``NAME=VALUE`` for any other option of the task.

    Raises
    ------
    ConfigError
        A value cannot be read, or the task has no use for an option that is given.
    """
    known = task.options()
    given = {name: value for name, value in common.items() if value is not None}
    if "prompt" in given and "prompt_file" in given:
        raise ConfigError("give --prompt or --prompt-file, not both")
    if given.get("prompt") == "":
        raise ConfigError("the prompt is empty")
    for name in given:
        if not takes(task, name):
            raise ConfigError(f"--{name.replace('_', '-')}: task {task.name!r} has no use for it; see `tasks`")
    options = {name: value for name, value in given.items() if name in known}
    if "prompt" in given:
        name = _filled(task, "prompt")
        options[name] = [given["prompt"]] if name == "prompts" else given["prompt"]
    if "prompt_file" in given:
        name, path = _filled(task, "prompt_file"), given["prompt_file"]
        options[name] = (
            read_prompts(path, given.get("limit")) if name == "prompts" else read_text(path) if name == "text" else path
        )
    if "context" in options:
        options["context"] = _lengths(options["context"], several=isinstance(known["context"], tuple))
    for item in extra:
        name, separator, value = item.partition("=")
        if not separator or name not in known:
            raise ConfigError(f"--set {item}: NAME=VALUE with one of {', '.join(known)} is accepted")
        options[name] = literal(name, value, known[name])
    return options


def takes(task: Task, name: str) -> bool:
    """Whether a task has a use for a common option."""
    return bool(_filled(task, name)) if name in _INPUTS else name in task.options()


def _filled(task: Task, name: str) -> str:
    return next((option for option in _INPUTS[name] if option in task.options()), "")


def options_by_task(
    names: Sequence[str], common: Mapping[str, Any], extra: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return task → its options, as :func:`task_options` reads them.

    An option goes to the tasks that have a use for it, so that one command line serves several.

    Raises
    ------
    ConfigError
        As of :func:`task_options`; or no task has a use for an option.
    """
    tasks = {name: find_task(name) for name in names}
    for item in extra:
        if not any(item.partition("=")[0] in task.options() for task in tasks.values()):
            raise ConfigError(f"--set {item}: none of the tasks {', '.join(names)} has such an option")
    for option, value in common.items():
        if tasks and value is not None and not any(takes(task, option) for task in tasks.values()):
            raise ConfigError(f"--{option.replace('_', '-')}: none of the tasks {', '.join(names)} has a use for it")
    found = {}
    for name, task in tasks.items():
        own = [item for item in extra if item.partition("=")[0] in task.options()]
        options = task_options(task, {key: value for key, value in common.items() if takes(task, key)}, own)
        found[name] = {key: _plain(value) for key, value in options.items()}
    return found


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def words(text: str | None) -> list[str]:
    """Return the words between commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def numbers(name: str, text: str | None, kind: type[int] | type[float]) -> list[Any]:
    """Return the numbers between commas.

    Raises
    ------
    ConfigError
        One of them is not a number.
    """
    found = []
    for word in words(text):
        try:
            found.append(kind(word))
        except ValueError:
            raise ConfigError(f"--{name} {word!r}: {'whole ' if kind is int else ''}numbers with commas") from None
    return found


def parameters(items: Sequence[str]) -> dict[str, list[Any]]:
    """Return the cache parameters of ``NAME=VALUE`` words, each with its values.

    Raises
    ------
    ConfigError
        There is no such parameter.
    """
    known = [*table(), *HOW]
    found = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or name not in known:
            raise ConfigError(f"--parameter {item}: NAME=VALUE with one of {', '.join(known)} is accepted")
        found[name] = values(name, value)
    return found


def values(name: str, text: str) -> list[Any]:
    """Return the values between commas of a parameter of the strategies or of the cache.

    Raises
    ------
    ConfigError
        One of them is of another kind than the parameter.
    """
    kind = KINDS[table()[name].kind] if name in table() else None
    found = [_as_kind(name, word, kind) for word in words(text)]
    if not found:
        raise ConfigError(f"{name} is empty: give at least one value")
    return found


def _as_kind(name: str, word: str, kind: type | None) -> Any:
    value = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}.get(word.lower(), word)
    if kind is str or (kind is None and name == "positions"):
        return word
    if not isinstance(value, bool):
        try:
            value = ast.literal_eval(word)
        except (ValueError, SyntaxError):
            raise ConfigError(f"{name} {word!r} is not a value of it") from None
    return float(value) if kind is float and isinstance(value, int) and not isinstance(value, bool) else value


def _lengths(value: str | int | Sequence[int], *, several: bool) -> int | tuple[int, ...]:
    words = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        numbers = tuple(int(word) for word in words)
    except ValueError:
        raise ConfigError(f"context {value!r} is not a whole number, or several with commas") from None
    if not several and len(numbers) > 1:
        raise ConfigError(f"context {value!r}: this task takes one length")
    return numbers if several else numbers[0]


def literal(name: str, text: str, default: Any) -> Any:
    """Return the value that a text says for an option with this default.

    Raises
    ------
    ConfigError
        It is of another kind.
    """
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if (
        default is not None
        and not isinstance(value, type(default))
        and not (isinstance(default, float) and isinstance(value, int))
    ):
        raise ConfigError(f"{name}={text}: a value like {default!r} is accepted")
    return value
