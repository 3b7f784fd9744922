"""``show``: which tokens of a text a cache kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liquidfusion.bench.commands.options import INPUT, OUTPUT, Model, Shown, takes_options
from liquidfusion.exceptions import ConfigError

if TYPE_CHECKING:
    from liquidfusion.bench.caches import CacheOptions
else:
    CacheOptions = Any


@dataclass(frozen=True, slots=True)
class Text:
    """What a cache reads, and which part of it is looked at."""

    prompt: Annotated[str | None, typer.Option(help="The text.", show_default="built in", **INPUT)] = None
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text.", **INPUT)] = None
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens to write after it.", **INPUT)] = 0
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens fed in one call.", show_default="the whole text", **INPUT)
    ] = None
    layer: Annotated[int | None, typer.Option(help="One layer only.", show_default="all")] = None
    head: Annotated[int | None, typer.Option(help="One kv head only.", show_default="all")] = None


@takes_options(without=("graph", "compile", "overlap"), cache_size=20.0)
def show(
    model: Model,
    cache: CacheOptions,
    given: Text = Text(),
    page: Annotated[Path | None, typer.Option("--html", help="Also write a page into this file.", **OUTPUT)] = None,
    shown: Shown = Shown(),  # noqa: B008 - frozen
) -> None:
    """Show which tokens of a text a cache kept: bright ones gathered much attention, evicted ones are struck out.

    Where the output is no terminal, evicted text stands in [-…-] and what the model wrote in {+…+}.
    """
    from liquidfusion import files
    from liquidfusion.bench import models, results, texts
    from liquidfusion.bench.jobs import showing
    from liquidfusion.bench.report.kept import html
    from liquidfusion.bench.terminal.kept import print_kept
    from liquidfusion.bench.terminal.result import Terminal

    if given.prompt is not None and given.prompt_file is not None:
        raise ConfigError("give --prompt or --prompt-file, not both")
    text = given.prompt if given.prompt_file is None else texts.read_text(given.prompt_file)
    if page is not None:
        files.check_writable(page.parent)
    with Terminal(quiet=shown.quiet or shown.as_json).waiting(f"loading {model.model}"):
        loaded = models.load(model.model, device=model.device, dtype=model.dtype)
    layer, head = given.layer, given.head
    showing.check_place(loaded.model.config, layer, head)
    text = texts.DEFAULT_PROMPT if text is None else text
    kept = showing.keep(loaded, text, cache, max_tokens=given.max_tokens, chunk=given.chunk)
    if page is not None:
        files.write_text(page, html(kept, f"What {cache.strategy} kept of {len(kept.tokens)} tokens"))
    if shown.as_json:
        share, intensity = kept.share(layer, head).tolist(), kept.intensity(layer, head).tolist()
        typer.echo(results.to_json({"tokens": kept.tokens, "share": share, "attention_rank": intensity}), nl=False)
    elif shown.quiet:
        typer.echo(page or "")
    else:
        print_kept(kept, layer, head, cache.strategy, page)
