"""The report's style sheet: colours for light and dark pages, tables, figures and their lines."""

from __future__ import annotations

_LIGHT = ("#1f6fc0", "#d1600a", "#0d8a68", "#b8418f", "#6b4fb5", "#8a6a10", "#3b93bd", "#697079")
_DARK = ("#6fb1f2", "#f39a4d", "#45c79f", "#ec8cc8", "#b3a2f5", "#d8b95c", "#83d4f5", "#aab3bd")


def _variables(colours: tuple[str, ...], page: str, text: str, muted: str, rule: str) -> str:
    named = "".join(f"--c{i}: {colour}; " for i, colour in enumerate(colours))
    return f"--page: {page}; --text: {text}; --muted: {muted}; --rule: {rule}; {named}"


STYLE = (
    f":root {{ color-scheme: light dark; "
    f"{_variables(_LIGHT, '#ffffff', '#1c2024', '#5b636b', '#dfe3e7')}}}\n"
    "@media (prefers-color-scheme: dark) { :root { "
    f"{_variables(_DARK, '#15181b', '#e6e9ec', '#a3abb3', '#343a40')}}} }}\n"
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
"""
)
