"""From the words of a command line to the keyword options of a task."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
