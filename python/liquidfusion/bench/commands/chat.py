"""``chat``: a conversation without end."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liquidfusion.bench.commands.options import INPUT, OUTPUT, Model, takes_options

if TYPE_CHECKING:
    from liquidfusion.bench.caches import CacheOptions
else:
    CacheOptions = Any


@dataclass(frozen=True, slots=True)
class Talk:
    """How answers are written, and where the conversation is kept."""

    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.", **INPUT)] = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", **INPUT)] = 512
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.", **INPUT)] = 0.0
    seed: Annotated[int, typer.Option(help="Seeds what is drawn.", **INPUT)] = 0
    load: Annotated[
        Path | None, typer.Option(help="Go on with the conversation in this file; the cache is as it was.", **INPUT)
    ] = None
    save: Annotated[Path | None, typer.Option(help="Keep the conversation in this file.", **OUTPUT)] = None


@takes_options(without=("cache_size",))
def chat(
    model: Model,
    cache: CacheOptions,
    talk: Talk = Talk(),
    as_json: Annotated[bool, typer.Option("--json", help="Print each turn as one line of JSON.", **OUTPUT)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the answers.", **OUTPUT)] = False,
) -> None:
    """Chat without end in constant memory: each turn feeds only what is new. /reset, /stats, /quit."""
    from liquidfusion import files
    from liquidfusion.bench import models
    from liquidfusion.bench.jobs import chatting
    from liquidfusion.bench.terminal.result import Terminal

    chatting.check_session(cache, talk.load, talk.system)
    if talk.save is not None:
        files.check_writable(talk.save.parent)
    with Terminal(quiet=quiet or as_json).waiting(f"loading {model.model}"):
        loaded = models.load(model.model, device=model.device, dtype=model.dtype)
    own = {name: getattr(talk, name) for name in ("system", "max_tokens", "temperature", "seed")}
    conversation = chatting.Chat(loaded, cache, session=talk.load, **own)
    try:
        chatting.converse(conversation, as_json=as_json, quiet=quiet)
    finally:  # also when Ctrl-C ends it between two answers
        if talk.save is not None:
            conversation.save(talk.save)
