"""The look of the report page: one style sheet, light and dark, wide screens and phones. Nothing is fetched.

Figures are inline SVG whose colours are these variables, so they follow the reader's theme like the text does.
"""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --soft: #5b6470; --line: #e1e5ea; --code: #f0f2f5;
  --good: #11794a; --good-back: #e2f5ea; --bad: #b3261e; --bad-back: #fce8e6; --warn: #8a5300; --warn-back: #fdf1dc;
  --s0: #2f6fde; --s1: #e0781c; --s2: #1d9a6c; --s3: #8b5cc4; --s4: #8a94a1; }
@media (prefers-color-scheme: dark) { :root {
  --page: #101317; --card: #181c22; --ink: #e8ebef; --soft: #9aa4b0; --line: #2b323b; --code: #20262e;
  --good: #5fd39a; --good-back: #12301f; --bad: #ff8a80; --bad-back: #3b1715; --warn: #f2bd62; --warn-back: #362710;
  --s0: #74a5ff; --s1: #f6a65b; --s2: #56cfa0; --s3: #bd98ef; --s4: #8c97a4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 18px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 1.2rem; margin: 0; letter-spacing: -0.01em; }
h3 { font-size: 0.98rem; margin: 26px 0 8px; }
p { margin: 6px 0; max-width: 75ch; }
.soft { color: var(--soft); font-size: 0.9rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 8px; margin: 16px 0 20px; }
nav a { text-decoration: none; color: inherit; border: 1px solid var(--line); background: var(--card);
  border-radius: 10px; padding: 5px 12px; font-size: 0.9rem; }
section { background: var(--card);
  border: 1px solid var(--line); border-radius: 14px; padding: 20px 22px; margin: 0 0 20px; }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 10px; justify-content: space-between; }
.pill { display: inline-block; border-radius: 999px; padding: 1px 11px; font-size: 0.82rem;
  font-weight: 600; white-space: nowrap; }
.good { color: var(--good); background: var(--good-back); } .bad { color: var(--bad); background: var(--bad-back); }
.warn { color: var(--warn); background: var(--warn-back); } .plain { color: var(--soft); background: var(--code); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; margin: 16px 0 4px; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: 9px 13px; min-width: 0; }
.tile b { display: block; font-size: 1.32rem; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; line-height: 1.25; }
.tile span { color: var(--soft); font-size: 0.8rem; }
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--soft); font-weight: 550; padding: 5px 10px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
  td.text { white-space: normal; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr));
  gap: 18px; margin: 14px 0 4px; }
figure { margin: 0; min-width: 0; } figure svg { width: 100%; height: auto; display: block; }
.clip { margin: 14px 0 4px; } .clip img, .clip video { max-width: 100%; height: auto; display: block; border-radius: 10px; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: 0.82rem; margin-top: 2px; }
details { margin: 12px 0 0; } summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
pre { background: var(--code); border-radius: 10px; padding: 12px; overflow: auto; max-height: 460px; font-size: 0.78rem;
  line-height: 1.45; }
code { background: var(--code); border-radius: 5px; padding: 1px 5px; font-size: 0.85em; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 0.85rem; }
@media (max-width: 520px) { main { padding: 18px 10px 40px; } section { padding: 15px 13px; border-radius: 12px; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
