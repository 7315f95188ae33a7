"""The style sheet of a report: light and dark, phone and desktop."""

STYLE = """
:root {
  --ground: #fbfbfa; --card: #fff; --ink: #1d2126; --dim: #626a73; --edge: #dfe2e6;
  --good: #1a7f4b; --bad: #b3372b; --grid: #e7e9ec;
  --c0: #2463c9; --c1: #c46a11; --c2: #2a8a57; --c3: #a8366f; --c4: #6b4fc0; --c5: #52606d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --card: #1c2024; --ink: #e6e8ea; --dim: #9aa3ad; --edge: #32383f;
    --good: #5bc78d; --bad: #f08a7e; --grid: #2b3036;
    --c0: #7aa9f7; --c1: #f0a558; --c2: #6fce9b; --c3: #ec85b7; --c4: #b09bf2; --c5: #a9b4bf;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 36px 0 10px; }
p { margin: 6px 0; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
.kicker, .dim, footer { color: var(--dim); }
.kicker { margin: 0; font-size: .85rem; }
.status { font-weight: 600; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 14px 0; }
.tile { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: 8px 14px; min-width: 110px; flex: 1 0 110px; max-width: 220px; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: .85rem; }
.scroll { overflow-x: auto; max-width: 100%; margin-bottom: 14px; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: 4px 18px 4px 0;
  border-bottom: 1px solid var(--edge); font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--dim); white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 5em; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .85em; }
pre { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; margin: 4px 0;
  padding: 8px 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.scroll { white-space: pre; overflow-wrap: normal; }
.figures { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: 10px 12px; min-width: 0; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--dim); font-size: 11px; }
svg .grid { stroke: var(--grid); }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 5 4; }
svg .band { opacity: .15; stroke: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .82rem; color: var(--dim); }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.legend i { display: inline-block;
  width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
i.c0, .band.c0, circle.c0 { background: var(--c0); fill: var(--c0); }
i.c1, .band.c1, circle.c1 { background: var(--c1); fill: var(--c1); }
i.c2, .band.c2, circle.c2 { background: var(--c2); fill: var(--c2); }
i.c3, .band.c3, circle.c3 { background: var(--c3); fill: var(--c3); }
i.c4, .band.c4, circle.c4 { background: var(--c4); fill: var(--c4); }
i.c5, .band.c5, circle.c5 { background: var(--c5); fill: var(--c5); }
details { font-size: .84rem; color: var(--dim); }
summary { cursor: pointer; }
details ul { padding-left: 18px; margin: 4px 0; }
article { border-top: 1px solid var(--edge); padding: 10px 0; }
.prompt { font-weight: 600; white-space: pre-wrap; }
.pair { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.pair > div { min-width: 0; }
footer { margin-top: 36px; font-size: .85rem; }
"""
