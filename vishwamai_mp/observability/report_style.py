"""How a report looks, and what it shows on hover. Charts are chosen among by style sheets: they need no script."""

STYLE = """
.controls { position: sticky; top: 0; z-index: 5; display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center;
  padding: 8px 0; background: var(--paper); border-bottom: 1px solid var(--line); }
.controls fieldset { border: 0; margin: 0; padding: 0; display: flex; gap: 10px; } .controls label { cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 14px; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px 4px;
  display: flex; flex-direction: column; justify-content: space-between; }
.chart svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
figcaption b { color: var(--ink); font-weight: 600; margin-right: 10px; }
.key { display: inline-block; margin-right: 12px; overflow-wrap: anywhere; }
.key::before { content: ''; display: inline-block; width: 14px; margin: 0 5px 4px 0;
  border-top: 3px solid var(--key); } .key.dashed::before { border-top-style: dashed; }
.axis, .tick path { fill: none; stroke: var(--line); }
.tick text { font: 12px system-ui, sans-serif; fill: var(--faint); }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.dots { fill: none; stroke-width: 5; stroke-linecap: round; stroke-dasharray: none !important; }
.smooth { stroke-width: 2.2; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; }
.cross { stroke: var(--faint); visibility: hidden; }
body:has(#smoothed:checked) .raw { opacity: .25; stroke-width: 1; }
body:not(:has(#smoothed:checked)) .smooth { display: none; }
body:has(#across-steps:checked) .x-tokens:not(.x-steps) { display: none; }
body:has(#across-tokens:checked) .x-steps:not(.x-tokens) { display: none; }
body:has(#up-linear:checked) .y-log { display: none; } body:has(#up-log:checked) .y-linear { display: none; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td + td { overflow-wrap: anywhere; min-width: 64px; }
td.differs { background: color-mix(in srgb, var(--c1) 14%, transparent); } .wrong { color: var(--wrong); }
h3 { font-size: 14px; margin: 18px 0 4px; } .gantt { margin: 10px 0; } .gantt rect:hover { opacity: .6; }
details { margin: 6px 0; } summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px;
  font: 12px/1.5 ui-monospace, monospace; }
"""
SCRIPT = """
for (const figure of document.querySelectorAll('figure.chart:not(.gantt)')) {
  const svg = figure.querySelector('svg'), cross = figure.querySelector('.cross');
  const lines = JSON.parse(figure.querySelector('script').textContent);
  const shown = i => [...svg.querySelectorAll(`[data-line="${i}"]`)].find(p => getComputedStyle(p).display !== 'none');
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const found = lines.map((line, i) => {
      const places = shown(i).getAttribute('d').match(/(?<=[ML])[\\d.]+/g).map(Number);
      let best = 0;
      places.forEach((place, j) => { if (Math.abs(place - x) < Math.abs(places[best] - x)) best = j; });
      return {line, best, place: places[best]};
    });
    const nearest = found.reduce((a, b) => Math.abs(b.place - x) < Math.abs(a.place - x) ? b : a);
    const parts = [];
    for (const {line, best} of found) {
      const swatch = document.createElement('span');
      swatch.className = 'swatch';
      swatch.style.background = `var(--c${line.colour})`;
      const step = line.steps[best], tokens = line.tokens[best];
      const where = `step ${step.toLocaleString('en')}` +
        (tokens === undefined ? '' : `, ${tokens.toLocaleString('en')} tokens`);
      parts.push(swatch, ` ${line.label}: ${line.values[best]}\\n   ${where}\\n`);
    }
    showTip(event.clientX, event.clientY, ...parts);
    cross.setAttribute('x1', nearest.place); cross.setAttribute('x2', nearest.place);
    cross.style.visibility = 'visible';
  });
  svg.addEventListener('pointerleave', () => { hideTip(); cross.style.visibility = 'hidden'; });
}
"""
