"""``stream``: a text without end through one cache."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liquidfusion.bench.commands.options import INPUT, Model, Output, takes_options

if TYPE_CHECKING:
    from liquidfusion.bench.caches import CacheOptions
else:
    CacheOptions = Any


@takes_options()
def stream(
    model: Model,
    cache: CacheOptions,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file",
            "--data",
            help="Text, repeated when it ends; - is standard input, to its end.",
            show_default="Python's reference, repeated",
            **INPUT,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to feed; a --cache-size refers to them.", **INPUT)] = 16384,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens fed in one call; 1 measures decoding.", **INPUT)] = 64,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a reported row.", **INPUT)] = 1024,
    output: Output = Output(),  # noqa: B008 - frozen
) -> None:
    """Feed a text without end through one cache; show perplexity, step time and memory as they go."""
    from liquidfusion import files
    from liquidfusion.bench import models, results
    from liquidfusion.bench.jobs import streaming
    from liquidfusion.bench.terminal.result import Terminal
    from liquidfusion.bench.terminal.stream import StreamView

    text = streaming.read(prompt_file)
    files.check_writable(output.output_dir)
    silent = output.quiet or output.as_json
    with Terminal(quiet=silent).waiting(f"loading {model.model}"):
        loaded = models.load(model.model, device=model.device, dtype=model.dtype)
    size = results.size_label(cache.cache_size, cache.budget, cache.memory)
    name = f"{results.file_stem(cache.strategy, loaded.name, size)}_stream_{results.stamp()}.json"
    path = output.output_dir / name
    rows, start, document = [], time.perf_counter(), {}
    ids = streaming.read_tokens(loaded.tokenizer, text)
    try:
        with StreamView(tokens, quiet=silent) as view:
            for row in streaming.stream(loaded, ids, cache, tokens=tokens, chunk=chunk, window=window):
                rows.append(row)
                seconds = time.perf_counter() - start
                document = streaming.document(loaded, cache, rows, seconds=seconds, tokens=tokens, chunk=chunk)
                files.write_text(path, results.to_json(document))
                view.show(row)
    finally:  # interrupted or failed: what was measured is kept
        if output.as_json and rows:
            typer.echo(results.to_json(document), nl=False)
        elif rows:
            typer.echo(path)
