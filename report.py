"""Tables and Plotly charts → one HTML page that opens without a network; the tables as Markdown too. For compare.py."""

import html
import json
import re
from dataclasses import dataclass
from string import Template

COLORS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()
DASHES = "solid dash dot dashdot longdash".split()
GREY = dict(type="line", line=dict(color="grey", dash="dot"))  # of a shape

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<!-- nothing is fetched: scripts and styles stand in this file -->
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;
  form-action 'none'; base-uri 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { margin: 2rem auto; max-width: 1500px; padding: 0 1.5rem; font: 15px/1.5 system-ui, "Noto Sans",
  "Noto Sans Devanagari", "Lohit Devanagari", "Nirmala UI", "Kohinoor Devanagari", "Mangal", sans-serif; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; opacity: .75; max-width: 65rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid rgba(128, 128, 128, .3); }
td { vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; text-align: left; }
.numbers td, .numbers th { text-align: right; white-space: nowrap; }
.numbers th { white-space: normal; }
.words td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 7rem; }
tr > :first-child { text-align: left !important; position: sticky; left: 0; background: Canvas; font-weight: 600; }
td.mark { background: rgba(255, 180, 0, .25); }
#charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); gap: 1.5rem; }
iframe { width: 100%; height: 420px; border: 1px solid #8884; border-radius: 12px; }
#charts > div { height: 420px; min-width: 0; margin-top: 1.5rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$text</p>
$above
<div id="charts"></div>
$below
<script>$plotly</script>
<script type="application/json" id="data">$charts</script>
<script>
const charts = JSON.parse(document.getElementById("data").textContent);
const settings = { displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "" };  // no upload
const ink = () => getComputedStyle(document.body).color;
const area = document.getElementById("charts");
const boxes = charts.map(() => area.appendChild(document.createElement("div")));  // all, so that each has its width
charts.forEach(({ data, layout }, i) => {
  const font = { color: ink(), family: getComputedStyle(document.body).fontFamily };
  Plotly.newPlot(boxes[i], data, { ...layout, font }, settings);
});
addEventListener("message", ({ source, data }) => {  // a player says how high it is
  const frame = [...document.querySelectorAll("iframe")].find(f => f.contentWindow === source);
  if (frame && data.height > 0) frame.style.height = Math.min(4000, Math.ceil(data.height) + 2) + "px";
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  boxes.forEach(box => Plotly.relayout(box, { "font.color": ink() })));
</script>
$players
</body>
</html>
""")


class Mark(str):
    """A cell that stands out."""


@dataclass
class Table:
    title: str
    note: str
    header: list
    lines: list  # of lists of str
    words: bool = False  # cells of text, not figures: to the left, and behind the charts


def style(i, j=0):
    """The line of the j-th seed of the i-th group: a colour a group, a dash a seed."""
    return dict(color=COLORS[i % len(COLORS)], dash=DASHES[(j + i // len(COLORS)) % len(DASHES)], width=2)


def chart(title, x, y, lines, xtype="linear", shapes=()):
    """lines: (name, style, points (x, y) or (x, y, standard error), more of the trace). None if there is no point."""
    data, clear = [], "rgba(0,0,0,0)"
    for name, style, points, more in lines:
        points = [(*p, None)[:3] for p in points if None not in p[:2]]
        if points:
            xs, ys, errors = zip(*points, strict=True)
            more = dict(mode="lines+markers", error_y=dict(array=errors, thickness=1, visible=any(errors))) | more
            name = html.escape(name, quote=False)  # Plotly reads some HTML
            data.append(dict(type="scatter", x=xs, y=ys, name=name, legendgroup=name, line=style, **more))
    axis = lambda of: dict(title=dict(text=of, standoff=8), gridcolor="rgba(128,128,128,.25)", zeroline=False)  # noqa: E731
    layout = dict(
        title=dict(text=title, x=0.02, font=dict(size=16)), xaxis=axis(x) | dict(type=xtype), yaxis=axis(y),
        legend=dict(orientation="h", yanchor="top", y=-0.2), margin=dict(l=60, r=15, t=45, b=40), showlegend=True,
        paper_bgcolor=clear, plot_bgcolor=clear, modebar=dict(bgcolor=clear), hoverlabel=dict(namelength=-1),
        shapes=shapes,
    )  # fmt: skip
    return dict(data=data, layout=layout) if data else None


def to_html(table):
    cell = lambda c: f"<td{' class=mark' * isinstance(c, Mark)}>{html.escape(c)}</td>"  # noqa: E731
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.header)
    body = "\n".join(f"<tr>{''.join(map(cell, line))}</tr>" for line in table.lines)
    whole = f'<table class="{"words" if table.words else "numbers"}">\n<tr>{head}</tr>\n{body}\n</table>'
    return f'<h2>{table.title}</h2>\n<p>{html.escape(table.note)}</p>\n<div class="scroll">{whole}</div>'


def to_markdown(title, text, tables):
    def cell(c):
        safe = "<br>".join(re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(c, quote=False)).splitlines())
        return f"**{safe}**" if isinstance(c, Mark) else safe

    parts = [f"# {title}", cell(text)]
    for table in tables:
        lines = [table.header, ["---"] * len(table.header), *table.lines]
        parts += [f"## {table.title}", table.note, "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def to_page(title, text, tables, charts, players=()):
    """The HTML, with plotly.js in it. players: (name, a page of traces.html). Raises ValueError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError("report.html needs plotly: pip install plotly==7.1.0") from None
    above, below = ("\n".join(to_html(table) for table in tables if table.words == words) for words in (False, True))
    data = json.dumps(charts, ensure_ascii=False, allow_nan=False).replace("<", r"\u003c")  # no </script> in it
    title, text = html.escape(title), html.escape(text)
    frame = '<h2>{}</h2>\n<iframe sandbox="allow-scripts" title="player" srcdoc="{}"></iframe>'  # reaches nothing here
    players = "\n".join(frame.format(html.escape(f"Writing: {name}"), html.escape(page)) for name, page in players)
    parts = dict(title=title, text=text, above=above, below=below, players=players, charts=data)
    return PAGE.substitute(parts, plotly=get_plotlyjs())
