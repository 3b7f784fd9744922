"""What a cache kept of a text: in colours on a terminal, with marks elsewhere."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from liquidfusion.bench.jobs.showing import Kept

_SHADES = ("grey30", "dark_orange3", "orange3", "gold1", "yellow1")


def coloured(kept: Kept, layer: int | None = None, head: int | None = None) -> Text:
    """Return the text for a terminal: the more attention the brighter, evicted tokens struck out."""
    text = Text()
    share, intensity = kept.share(layer, head), kept.intensity(layer, head)
    for index, token in enumerate(kept.tokens):
        if share[index] == 0:
            style = "dim strike"
        else:
            style = (
                f"{_SHADES[min(int(intensity[index] * share[index] * 5), 4)]}{' bold' if share[index] > 0.5 else ''}"
            )
        text.append(token, f"{style}{' underline' if index >= len(kept.tokens) - kept.written else ''}")
    return text


def marked(kept: Kept, layer: int | None = None, head: int | None = None) -> str:
    """Return the text with marks as wdiff's: ``[-kept by no head-]`` and ``{+written by the model+}``."""
    marks = {"gone": ("[-", "-]"), "own": ("{+", "+}"), "kept": ("", "")}
    share, parts, now = kept.share(layer, head), [], "kept"
    for index, token in enumerate(kept.tokens):
        own = index >= len(kept.tokens) - kept.written
        kind = "gone" if share[index] == 0 else "own" if own else "kept"
        if kind != now:
            parts += [marks[now][1], marks[kind][0]]
            now = kind
        parts.append(token)
    return "".join([*parts, marks[now][1]])


def print_kept(kept: Kept, layer: int | None, head: int | None, strategy: str, page: Path | None) -> None:
    """Print a text with what was kept of it, and where the page is."""
    console = Console()
    share = kept.share(layer, head)
    told = (
        f"{strategy}: of {len(kept.tokens)} tokens a head keeps {share.sum():.0f}; "
        f"{(share == 0).sum()} are kept by none, {(share == 1).sum()} by all"
    )
    if console.is_terminal:
        console.print(coloured(kept, layer, head))
    else:
        print(marked(kept, layer, head))
        told += (
            "\n[-…-] is kept by no head, {+…+} was written by the model; --html FILE and --json tell it of each head"
        )
    console.print(Text(f"\n{told}", style="dim"), soft_wrap=True)
    if page is not None:
        console.print(Text(str(page)), style="dim", soft_wrap=True)
