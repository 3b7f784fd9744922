"""One HTML page that needs nothing else, and the same as Markdown."""

from collections.abc import Sequence
from html import escape

from liquidfusion.bench.report import curves
from liquidfusion.bench.report.charts import COLOURS, Section
from liquidfusion.bench.report.rows import Found, blocks
from liquidfusion.bench.report.sections import section

TITLE = "LiquidFusion: results"


def sections(found: Found) -> list[Section]:
    """Return the parts of a report, in the order in which they are shown."""
    tasks = [section(block) for block in blocks(found.rows)]
    speeds = [curves.speed(document) for document in found.speeds]
    return tasks + speeds + curves.streams(found.streams) + curves.loads(found.loads)


def facts(found: Found) -> str:
    """Return the machine, the precision and the versions; several of what differs."""
    documents = [*(d for row in found.rows for d in row.documents), *found.speeds, *found.streams, *found.loads]
    told: dict[str, dict[str, None]] = {"machine": {}, "dtype": {}, "torch": {}, "transformers": {}, "LiquidFusion": {}}
    for document in documents:
        metadata = document["metadata"]
        machine, versions = metadata.get("machine"), metadata.get("versions") or {}
        if machine:
            told["machine"][str(machine.get("gpu") or f"{machine.get('processor')}, {machine.get('cores')} cores")] = (
                None
            )
            told["dtype"][str(metadata.get("dtype"))] = None
        for name in ("torch", "transformers", "LiquidFusion"):
            told[name][str(versions.get(name.lower()))] = None
    return "; ".join(
        " and ".join(values) if name in ("machine", "dtype") else f"{name} {' and '.join(values)}"
        for name, values in told.items()
        if values
    )


def markdown(parts: Sequence[Section], errors: Sequence[dict[str, str]] = (), skipped: str = "") -> str:
    """Return a table for each section, the cells that failed, and the files that are no results."""
    lines = ["# Results", ""]
    for part in parts:
        lines += [f"## {part.title}, {part.subject}", "", part.caption, ""]
        lines += [f"| {' | '.join(part.header)} |", f"|{'---|' * len(part.header)}"]
        lines += [f"| {' | '.join(line)} |" for line in part.body] + [""]
    lines += [f"- failed: {error['task']}: {error['error']}" for error in errors]
    lines += [f"- {skipped}"] if skipped else []
    return "\n".join(lines).rstrip() + "\n"


_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
@media print { :root { color-scheme: light; %(light)s } figure, tr { break-inside: avoid } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere }
p { max-width: 46rem; margin: .3rem 0 } .soft { color: var(--soft) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%%, 22rem), 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid var(--grid); border-radius: .5rem; padding: .3rem }
svg { display: block; width: 100%%; height: auto }
[data-key] { cursor: pointer } [data-key].off { opacity: .35 } [data-line].off { display: none }
[data-key]:focus-visible { outline: 2px solid var(--ink) }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0; font-size: .9rem }
summary { cursor: pointer; color: var(--soft); margin: .5rem 0 }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
@media (max-width: 30rem) { th:first-child, td:first-child { white-space: normal; min-width: 7rem } }
""".strip()

_SCRIPT = """
for (const key of document.querySelectorAll('[data-key]')) {
  const line = key.closest('svg').querySelector(`[data-line="${key.dataset.key}"]`);
  const toggle = () => { key.setAttribute('aria-pressed', line.classList.toggle('off')); key.classList.toggle('off'); };
  key.setAttribute('role', 'button'); key.setAttribute('tabindex', 0); key.onclick = toggle;
  key.onkeydown = event => { if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); toggle(); } };
}
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(part => { part.open = true; }));
""".strip()


def html(title: str, intro: Sequence[str], parts: Sequence[Section], notes: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return one page that needs nothing else.

    Parameters
    ----------
    intro
        Paragraphs under the title, as text.
    parts
        Sections with charts and tables.
    notes
        Titles and lines of what is listed at the end: failures, files that are no results.
    """
    light, dark = ("; ".join(f"--{name}: {pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    body = [f"<h1>{escape(title)}</h1>", *(f"<p class='soft'>{escape(line)}</p>" for line in intro)]
    for part in parts:
        body.append(f"<section><h2>{escape(part.title)} <span class='soft'>{escape(part.subject)}</span></h2>")
        if part.summary:
            body.append(f"<p>{escape(part.summary)}</p>")
        if part.charts:
            drawn = "".join(f"<figure>{chart.svg()}</figure>" for chart in part.charts.values())
            body.append(f"<div class='charts'>{drawn}</div>")
        body.append(_table(part.caption, part.header, part.body))
        if part.more is not None:
            body.append(f"<details><summary>quality, bytes and speed of each</summary>{_table(*part.more)}</details>")
        body.append("</section>")
    for name, lines in notes:
        listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
        body.append(f"<section><h2>{escape(name)}</h2><ul>{listed}</ul></section>")
    style = _STYLE % {"light": light, "dark": dark}
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def page(found: Found) -> str:
    """Return the page of a directory of results."""
    intro = [
        facts(found),
        "Whiskers and grey bands are 95 % bootstrap intervals. A line across is a reference: the full cache, or a "
        "floor. Point at a mark to read its value; choose a name under a chart to hide its line.",
    ]
    notes = [("Failed", [f"{error['task']}: {error['error']}" for error in found.errors])] if found.errors else []
    if found.skipped:
        notes.append(("Skipped files", [f"{name}: {reason}" for name, reason in found.skipped.items()]))
    return html(TITLE, intro, sections(found), notes)


def _table(caption: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    lines = "".join(
        f"<tr><th scope='row'>{escape(line[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in line[1:])}</tr>"
        for line in body
    )
    return (
        f"<p class='soft'>{escape(caption)}</p><div class='scroll'><table aria-label='{escape(caption)}'>"
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
