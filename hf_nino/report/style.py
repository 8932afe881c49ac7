"""The page's style sheet: light and dark, from a phone's width on."""

CSS = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1d2330; --soft: #5d6675; --grid: #e7e9ee; --axis: #b8bfcb;
  --train: #a9b2c3; --eval: #2457d6; --plain: #6b7280;
  --good: #0f7b4c; --short: #a86400; --back: #c4302b; --no: #697386;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12151b; --card: #1a1e26; --ink: #e5e8ee; --soft: #98a2b3; --grid: #262b35; --axis: #4a5261;
    --train: #565f70; --eval: #7da2ff; --plain: #9aa3b2;
    --good: #45c486; --short: #e3ac45; --back: #ff7a70; --no: #98a2b3;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 2rem; }
header { margin-bottom: 1.25rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
.kind { margin: .15rem 0 .75rem; color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; font-size: .875rem; }
dl div { display: flex; gap: .4rem; min-width: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.tiles > div {
  background: var(--card); border-radius: .5rem; padding: .7rem .9rem; display: flex; flex-direction: column;
}
.tiles span, .tiles small { color: var(--soft); font-size: .8125rem; }
.tiles strong { font-size: 1.5rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
section { margin-top: 2.25rem; }
figure { margin: 0; }
.plot { display: block; overflow: visible; margin: .7rem 0 1.6rem 3rem; width: calc(100% - 3.9rem); }
.space { display: block; width: 100%; aspect-ratio: 16 / 9; background: var(--card); border-radius: .5rem; }
.curves { overflow: hidden; }
.axis-title { color: var(--soft); font-size: .8125rem; }
.axis-title.below { text-align: right; padding-right: .9rem; margin-top: -.1rem; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.y { text-anchor: end; }
svg text.x { text-anchor: middle; }
.grid { stroke: var(--grid); }
.axis { stroke: var(--axis); }
.zero { stroke: var(--soft); stroke-width: 1.25; }
.curve {
  fill: none; stroke-width: 1.75; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round;
}
.curve.train { stroke: var(--train); stroke-width: 1.25; }
.curve.eval { stroke: var(--eval); }
.curve.plain { stroke: var(--plain); stroke-dasharray: 5 4; }
.curve.walk { stroke: var(--eval); stroke-width: 1.5; opacity: .7; }
.curve.jump.accepted { stroke: var(--good); }
.curve.jump.shortened { stroke: var(--short); }
.curve.jump.taken-back { stroke: var(--back); }
.curve.jump.back { stroke-dasharray: 3 4; }
.mark { fill: var(--no); stroke: var(--paper); stroke-width: 1; }
.mark.accepted { fill: var(--good); }
.mark.shortened { fill: var(--short); }
.mark.taken-back { fill: var(--back); }
.mark.cross { fill: none; stroke: var(--no); stroke-width: 2; }
.mark.ring { fill: var(--paper); stroke: var(--no); stroke-width: 1.5; }
.mark.ring.observed { stroke: var(--eval); }
.mark.dense { transform: scale(.6); }
.mark.start { stroke: var(--ink); }
.mark.end { fill: var(--ink); }
.whisker { stroke: var(--no); stroke-width: 1.25; opacity: .65; }
.whisker.accepted { stroke: var(--good); }
.whisker.shortened { stroke: var(--short); }
.whisker.taken-back { stroke: var(--back); }
.lost { fill: var(--back); opacity: .1; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .5rem 0 0; padding: 0;
  font-size: .875rem;
}
.legend li { display: flex; align-items: center; gap: .4rem; }
.key { flex: none; overflow: visible; }
.note { color: var(--soft); font-size: .875rem; margin: .7rem 0 0; max-width: 46rem; }
.plain { margin: 0; padding-left: 1.1rem; font-size: .9375rem; }
details { margin-top: .6rem; font-size: .875rem; }
summary { color: var(--soft); cursor: pointer; }
.scroll { overflow-x: auto; max-height: 24rem; overflow-y: auto; margin-top: .4rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 60%; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td { min-width: 3.5rem; }
td:last-child { min-width: 6rem; }
.bar { display: block; height: .6rem; margin-top: .4rem; border-radius: .3rem; background: var(--eval); }
footer { max-width: 60rem; margin: 0 auto; padding: 1rem; color: var(--soft); font-size: .8125rem; }
@media print { details { display: none; } }
"""
