"""The page of ``show``: a text with what was kept of it, by layer and head."""

import json
from html import escape

from liquidfusion.bench.jobs.showing import Kept
from liquidfusion.bench.report.charts import COLOURS

_SCRIPT = """
const T = document.querySelectorAll('#text span');
const L = document.getElementById('layer'), H = document.getElementById('head');
function draw() {
  let rows = [];
  D.forEach((heads, l) => heads.forEach((row, h) => {
    if ((L.value === '' || +L.value === l) && (H.value === '' || +H.value === h)) rows.push(row);
  }));
  T.forEach((span, i) => {
    let n = 0, sum = 0;
    for (const row of rows) if (row[i] !== '-') { n++; sum += +row[i]; }
    const share = n / rows.length, level = n ? sum / n / 9 : 0;
    span.className = n ? '' : 'gone';
    span.style.setProperty('--a', n ? (0.08 + 0.72 * level * share).toFixed(2) : 0);
    span.title = 'token ' + i + ': kept by ' + n + ' of ' + rows.length + ' heads'
      + (n ? ', attention rank ' + level.toFixed(2) : '');
  });
}
L.onchange = H.onchange = draw; draw();
"""

_STYLE = """
:root { color-scheme: light dark; %(light)s; --mark: 194 78 0 }
@media (prefers-color-scheme: dark) { :root { %(dark)s; --mark: 255 157 92 } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem } .soft, label { color: var(--soft) } select { font: inherit; margin: 0 1rem 0 .3rem }
#text { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--grid); border-radius: .5rem;
  padding: 1rem; line-height: 1.8 }
#text span { background: rgb(var(--mark) / var(--a)); border-radius: .2rem }
#text .gone { color: var(--soft); text-decoration: line-through }
#text .own { border-bottom: 2px solid var(--c0) }
""".strip()


def html(kept: Kept, title: str) -> str:
    """Return a page that needs nothing else; layer and head can be chosen on it."""
    light, dark = ("; ".join(f"--{name}: {pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    layers, heads, count = kept.kept.shape
    first_own = count - kept.written
    spans = "".join(
        f"<span>{'<b class=own>' if i >= first_own else ''}{escape(token)}{'</b>' if i >= first_own else ''}</span>"
        for i, token in enumerate(kept.tokens)
    )
    choices = {
        name: "<option value=''>all</option>" + "".join(f"<option>{index}</option>" for index in range(size))
        for name, size in (("layer", layers), ("head", heads))
    }
    unscored = "" if kept.mass is not None else " This strategy gathers no attention, so all kept tokens look alike."
    style = _STYLE % {"light": light, "dark": dark}
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main><h1>{escape(title)}</h1>"
        "<p class='soft'>The stronger the colour, the more attention a token gathered where it was kept; struck out: "
        f"kept by no head; underlined: written by the model. Point at a token for its numbers.{unscored}</p>"
        f"<p><label>layer <select id='layer'>{choices['layer']}</select></label>"
        f"<label>kv head <select id='head'>{choices['head']}</select></label></p>"
        f"<div id='text'>{spans}</div></main><script>const D = {json.dumps(kept.levels())};{_SCRIPT}</script>"
        "</body></html>\n"
    )
