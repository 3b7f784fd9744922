"""From the words of a command line to the keyword options of a task."""

import ast
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.runner import find_task
from liquidfusion.bench.tasks.task import Task
from liquidfusion.bench.texts import read_prompts, read_text
from liquidfusion.exceptions import ConfigError


def task_options(
    task: Task,
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    context: str | int | Sequence[int] | None = None,
    extra: Sequence[str] = (),
    **common: Any,
) -> dict[str, Any]:
    """Return the options that `task` takes, with None left out.

    A common option that the task has no use for is ignored, so that one command line serves several tasks; an `extra`
    one is an error.

    Parameters
    ----------
    prompt, prompt_file
        The task's input: prompts, a text, or a file of examples.
    context
        One number, or several with commas between them.
    extra
        ``NAME=VALUE`` for any other option of the task.

    Raises
    ------
    ConfigError
        A value cannot be read, or an extra option is unknown.
    """
    known = task.options()
    options = {name: value for name, value in common.items() if value is not None and name in known}
    if prompt is not None and prompt_file is not None:
        raise ConfigError("give --prompt or --prompt-file, not both")
    if prompt == "":
        raise ConfigError("the prompt is empty")
    if prompt is not None:
        if "prompts" in known:
            options["prompts"] = [prompt]
        elif "text" in known:
            options["text"] = prompt
    if prompt_file is not None:
        if "prompts" in known:
            options["prompts"] = read_prompts(prompt_file, common.get("limit"))
        elif "text" in known:
            options["text"] = read_text(prompt_file)
        elif "data" in known:
            options["data"] = prompt_file
    if context is not None and "context" in known:
        options["context"] = _lengths(context, several=isinstance(known["context"], tuple))
    for item in extra:
        name, separator, value = item.partition("=")
        if not separator or name not in known:
            raise ConfigError(f"--set {item}: NAME=VALUE with one of {', '.join(known)} is accepted")
        options[name] = _literal(name, value, known[name])
    return options


def options_by_task(names: Sequence[str], *, extra: Sequence[str] = (), **common: Any) -> dict[str, dict[str, Any]]:
    """Return task → its options, as :func:`task_options` reads them.

    An `extra` option goes to the tasks that know it.

    Raises
    ------
    ConfigError
        As :func:`task_options`; or no task knows an extra option.
    """
    tasks = {name: find_task(name) for name in names}
    for item in extra:
        if not any(item.partition("=")[0] in task.options() for task in tasks.values()):
            raise ConfigError(f"--set {item}: none of the tasks {', '.join(names)} has such an option")
    found = {}
    for name, task in tasks.items():
        own = [item for item in extra if item.partition("=")[0] in task.options()]
        found[name] = {key: _plain(value) for key, value in task_options(task, extra=own, **common).items()}
    return found


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def words(text: str) -> list[str]:
    """Return the words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(name: str, text: str | None, kind: type[int] | type[float]) -> list[Any]:
    """Return the numbers between commas.

    Raises
    ------
    ConfigError
        One of them is not a number.
    """
    found = []
    for word in words(text or ""):
        try:
            found.append(kind(word))
        except ValueError:
            raise ConfigError(f"--{name} {word!r}: {'whole ' if kind is int else ''}numbers with commas") from None
    return found


def parameters(items: Sequence[str]) -> dict[str, Any]:
    """Return the strategy parameters of ``NAME=VALUE`` words.

    Raises
    ------
    ConfigError
        There is no such parameter.
    """
    known = [f.name for f in fields(CacheOptions) if f.name not in ("strategy", "cache_size", "budget")]
    found = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or name not in known:
            raise ConfigError(f"--parameter {item}: NAME=VALUE with one of {', '.join(known)} is accepted")
        found[name] = _literal(name, value, None)
    return found


def _lengths(value: str | int | Sequence[int], *, several: bool) -> int | tuple[int, ...]:
    words = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        numbers = tuple(int(word) for word in words)
    except ValueError:
        raise ConfigError(f"context {value!r} is not a whole number, or several with commas") from None
    if not several and len(numbers) > 1:
        raise ConfigError(f"context {value!r}: this task takes one length")
    return numbers if several else numbers[0]


def _literal(name: str, text: str, default: Any) -> Any:
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
