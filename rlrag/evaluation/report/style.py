"""The style sheet of the report, for light and dark mode."""

from __future__ import annotations

_LIGHT = ("#1f6fc0", "#d1600a", "#0d8a68", "#b8418f", "#6b4fb5", "#8a6a10", "#3b93bd", "#697079")
_DARK = ("#6fb1f2", "#f39a4d", "#45c79f", "#ec8cc8", "#b3a2f5", "#d8b95c", "#83d4f5", "#aab3bd")


def _variables(
    colours: tuple[str, ...], page: str, text: str, muted: str, rule: str, good: str, bad: str
) -> str:
    named = "".join(f"--c{i}: {colour}; " for i, colour in enumerate(colours))
    return (
        f"--page: {page}; --text: {text}; --muted: {muted}; --rule: {rule}; "
        f"--good: {good}; --bad: {bad}; {named}"
    )


STYLE = (
    f":root {{ color-scheme: light dark; "
    f"{_variables(_LIGHT, '#ffffff', '#1c2024', '#5b636b', '#dfe3e7', '#0a6b4f', '#b3261e')}}}\n"
    "@media (prefers-color-scheme: dark) { :root { "
    f"{_variables(_DARK, '#15181b', '#e6e9ec', '#a3abb3', '#343a40', '#4fd0a8', '#ff8f84')}}} }}\n"
    + "".join(
        f".c{i} {{ stroke: var(--c{i}); }} .f{i} {{ fill: var(--c{i}); }}\n"
        for i in range(len(_LIGHT))
    )
    + """\
.cn { stroke: var(--muted); } .fn { fill: var(--muted); }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.45;
  font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 8px 0 4px; }
h2 { font-size: 19px; margin: 36px 0 10px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 22px 0 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums;
  margin: 6px 0 10px; }
caption { text-align: left; color: var(--muted); padding-bottom: 4px; }
th, td { padding: 4px 14px 4px 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; }
thead th { color: var(--muted); font-weight: 500; }
th:first-child, table.prose th, table.prose td { text-align: left; }
table.prose td { white-space: normal; }
table.prose td:nth-child(-n+3) { min-width: 3.5em; }
.warning { border-left: 3px solid var(--c1); padding-left: 10px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr));
  gap: 22px 28px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 2px; }
.note, .empty { color: var(--muted); font-size: 12.5px; margin: 0; }
.empty { padding: 24px 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0; padding: 0;
  font-size: 12.5px; color: var(--muted); }
svg { display: block; width: 100%; height: auto; max-width: 620px; }
.legend .key { display: inline-block; width: 18px; height: 8px; margin-right: 5px; }
svg text { fill: var(--text); font-size: 12px; }
svg .tick { fill: var(--muted); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
.grid { stroke: var(--rule); fill: none; }
.axis { stroke: var(--muted); fill: none; }
.line, .raw { fill: none; stroke-linejoin: round; stroke-linecap: round; stroke-width: 2; }
.raw { stroke-width: 1; opacity: 0.35; }
rect { stroke: var(--page); stroke-width: 1; }
details { margin-top: 8px; }
summary { cursor: pointer; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
#question-controls { display: flex; flex-wrap: wrap; gap: 8px 16px; font-size: 13.5px; }
#question-controls label { color: var(--muted); }
#question-controls [hidden] { display: none; }
select, input, button { font: inherit; color: var(--text); background: var(--page);
  border: 1px solid var(--muted); border-radius: 4px; padding: 3px 7px; max-width: 100%; }
button { cursor: pointer; padding: 4px 14px; }
button[aria-disabled=true] { color: var(--muted); border-color: var(--rule); cursor: default; }
#question-status { color: var(--muted); font-size: 13.5px; margin: 10px 0 6px; }
#question-list { list-style: none; margin: 0; padding: 0; border-top: 1px solid var(--rule); }
#question-list > li { border-bottom: 1px solid var(--rule); }
#question-pages { display: flex; align-items: center; gap: 12px; font-size: 13.5px; }
.question { margin: 0; overflow-wrap: anywhere; }
.question > summary { display: flex; gap: 12px; padding: 7px 4px; align-items: baseline; }
.question > summary::before { content: "▸"; color: var(--muted); }
.question[open] > summary::before { content: "▾"; }
.question > summary:hover { background: color-mix(in srgb, var(--rule) 45%, transparent); }
.question .asked { flex: 1; min-width: 0; }
.question .scores, .question .facts { color: var(--muted); font-size: 12.5px; margin: 0; }
.scores, .change { font-variant-numeric: tabular-nums; white-space: nowrap; }
.change { font-size: 13px; font-weight: 600; width: 3.4em; text-align: right; }
.change.gained { color: var(--good); } .change.lost { color: var(--bad); }
.change.same, .change.unanswered { color: var(--muted); }
.question[open] { padding: 0 4px 12px; }
.question[open] > summary { padding-inline: 0; }
.question[open] > summary .asked { font-weight: 600; }
.question p { margin: 4px 0; }
.answers { white-space: normal; }
table.answers td { min-width: 4.2em; }
table.answers td.answer, table.answers td:last-child { min-width: 13em; }
.answers .compared th { border-left: 3px solid var(--c0); padding-left: 7px; }
.answers .none { color: var(--muted); font-style: italic; }
.picks { margin: 0; padding-left: 1.3em; }
.gold { font-size: 11.5px; font-weight: 600; color: var(--good); border: 1px solid currentColor;
  border-radius: 3px; padding: 0 4px; }
.found { font-size: 13.5px; }
.found ol { margin: 4px 0; padding-left: 2em; }
.found li details { margin: 0; }
.passage { color: var(--muted); max-width: 72ch; }
@media (max-width: 600px) { .question > summary { flex-wrap: wrap; gap: 2px 10px; }
  .question .asked { flex-basis: 70%; } .question .scores { margin-left: auto; } }
"""
)
