/* The report's second half: loss against position, maps of what was kept, time, health, degeneration, failures.
 * Runs last: the calls at the end give the page its order. */
'use strict';

/* ---- P3: loss against position ---- */

function positions() {
  const list = D.bins.runs, width = D.bins.width_tokens, limit = M.model && M.model.window_tokens;
  if (!list.length) return void card('position', 'Loss against position', null, el('p', { class: 'empty' }, 'No teacher-forced turns were recorded.'));
  const base = list.find(b => RUNS[b.run].baseline) || list[0];
  const state = { a: base.run, b: -1, ppl: false };
  const box = plot('Loss against true position', (g, w) => {
    const left = 56, right = w - 18, top = 26, h = 290, bottom = h - 46;
    const lines = [state.a, state.b].filter(i => i >= 0).map((i, k) => ({ run: RUNS[i], rows: (list.find(b => b.run === i) || { rows: [] }).rows, dash: k ? '7 3' : null }));
    const f = v => (known(v) ? (state.ppl ? Math.exp(v) : v) : NaN);
    const all = lines.flatMap(l => l.rows.flatMap(r => [r[1], r[2], r[3], r[5]])).map(f).filter(known);
    const last = Math.max(...lines.flatMap(l => l.rows.map(r => (r[0] + 1) * width)), width), most = Math.max(...all, 1e-3), least = Math.min(...all, most);
    const x = linear(0, known(limit) && limit < last * 1.6 ? Math.max(last, limit * 1.02) : last, left, right);
    const y = state.ppl && most / Math.max(least, 1e-9) > 8 ? logarithmic(least / 1.2, most * 1.2, bottom, top) : linear(Math.max(0, least - 0.12 * (most - least)), most + 0.1 * (most - least || 1), bottom, top);
    axisY(g, y, left, right, { label: state.ppl ? 'perplexity' : 'NLL, nat per token', labelX: 0, labelY: 12 });
    if (known(limit) && limit <= x.hi) {
      const lx = x(limit);
      if (lx < right - 2) g.append(svg('rect', { x: lx, y: top, width: right - lx, height: bottom - top, fill: 'var(--wash)' }));
      g.append(svg('line', { x1: lx, x2: lx, y1: top, y2: bottom, stroke: 'var(--ink)', 'stroke-dasharray': '4 3' }),
        svg('text', { x: lx - 6, y: top + 12, 'text-anchor': 'end', class: 'strong' }, `trained window, ${fmt(limit)} tokens`));
    }
    const mid = r => x((r[0] + 0.5) * width);
    for (const l of lines) g.append(svg('path', { d: bandPath(l.rows.map(r => [mid(r), y(f(r[2])), y(f(r[3]))])), fill: l.run.colour, opacity: 0.15 }));
    g.append(svg('path', { d: linePath(lines[0].rows.map(r => [mid(r), y(f(r[5]))])), fill: 'none', stroke: 'var(--ink)', 'stroke-width': 1.5, 'stroke-dasharray': '1.5 3' }));
    for (const l of lines) {
      g.append(svg('path', { d: linePath(l.rows.map(r => [mid(r), y(f(r[1]))])), fill: 'none', stroke: l.run.colour, 'stroke-width': 1.9, 'stroke-dasharray': l.dash }));
      for (const r of l.rows) if (known(r[1])) g.append(tip(shape(l.run.shape, mid(r), y(f(r[1])), 3.4, { fill: l.run.colour }), [runText(l.run), ['tokens', `${fmt(r[0] * width)} to ${fmt((r[0] + 1) * width)}`],
        ['NLL', `${fmt(r[1])} (${fmt(r[2])} to ${fmt(r[3])})`], ['PPL', fmt(Math.exp(r[1]))], ['reference NLL', fmt(r[5])], ['dialogues', r[4]]]));
    }
    axisX(g, x, bottom, { from: left, to: right, n: w < 560 ? 4 : 10, label: `true position, tokens (bins of ${fmt(width)})` });
    return h;
  });
  const legend = el('ul', { class: 'legend' });
  const redraw = () => {
    legend.replaceChildren(...[state.a, state.b].filter(i => i >= 0).map((i, k) => el('li', {}, dashIcon(RUNS[i].colour, k ? '7 3' : null), icon(RUNS[i].shape, RUNS[i].colour, RUNS[i].open), runText(RUNS[i]))),
      el('li', {}, dashIcon('var(--ink)', '1.5 3'), 'reference of the first run'));
    box.redraw();
  };
  const have = r => list.some(b => b.run === r.i);
  card('position', 'Loss against position', 'Does the model break at its trained window, or before it? The first run is the full cache unless another is chosen.',
    el('div', { class: 'controls' }, chooser('run', runOptions(have), String(state.a), v => { state.a = +v; redraw(); }), chooser('and', [['-1', 'none'], ...runOptions(have)], '-1', v => { state.b = +v; redraw(); }),
      chooser('show', [['nll', 'NLL'], ['ppl', 'perplexity']], 'nll', v => { state.ppl = v === 'ppl'; redraw(); })),
    legend, box, foot('Teacher-forced. A turn\u2019s mean is spread over the bins it covers; shaded: 95 % bootstrap over dialogues.'));
  redraw();
}

/* ---- P4 and P5: where the kept tokens stand ---- */

const SHIFT_STEPS = 12;
function shiftColour(shift, limit) {
  if (shift === 0 || !limit) return 'var(--still)';
  const k = Math.ceil(SHIFT_STEPS * Math.min(1, Math.abs(shift) / limit)) / SHIFT_STEPS;
  return `color-mix(in srgb, ${shift < 0 ? 'var(--near)' : 'var(--far)'} ${Math.round(100 * (0.25 + 0.75 * k))}%, var(--still))`;
}

/* Cells of the flat raster lists: start bin, bins, share 1..9 (plus 10: ahead of the next query), shift. */
function eachCell(flat, use) {
  for (let i = 0; i < flat.length; i += 4) use(flat[i], flat[i + 1], flat[i + 2] % 10, flat[i + 3], flat[i + 2] > 10);
}

function shiftLegend(g, x, y, limit, anyFuture, short) {
  g.append(svg('text', { x, y: y + 10 }, short ? 'shift' : 'distance shift'));
  let at = x + (short ? 34 : 84);
  for (const [s, text] of [[-limit, fmt(-limit) + (short ? '' : ' (nearer)')], [0, '0'], [limit, '+' + fmt(limit) + (short ? '' : ' (farther)')]]) {
    g.append(svg('rect', { x: at, y, width: 14, height: 11, fill: shiftColour(s, limit) }));
    at += 18;
    if (text) {
      g.append(svg('text', { x: at, y: y + 10 }, text));
      at += text.length * 6.3 + 8;
    }
  }
  if (anyFuture) g.append(svg('rect', { x: at, y, width: 14, height: 11, fill: 'var(--near)' }), svg('rect', { x: at, y, width: 14, height: 11, fill: 'url(#hatch)' }), svg('text', { x: at + 18, y: y + 10 }, short ? 'future' : 'in the future'));
}

function drawMap(k, g, w) {
  const rows = k.heads, left = 56, right = w - 12, top = 46, rowH = Math.max(2, Math.min(14, 270 / rows.length)), bottom = top + rowH * rows.length;
  const x = linear(0, k.n_tokens, left, right), bw = (right - left) / k.n_bins, perBin = k.n_tokens / k.n_bins;
  let limit = 0, anyFuture = false;
  k.rasters.forEach(f => eachCell(f, (a, n, share, shift) => { limit = Math.max(limit, Math.abs(shift)); }));
  g.append(svg('defs', {}, svg('pattern', { id: 'hatch', width: 5, height: 5, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(45)' }, svg('rect', { width: 2, height: 5, fill: 'var(--card)', opacity: 0.55 }))));
  const paths = new Map();
  let future = '';
  rows.forEach((row, i) => eachCell(k.rasters[row[2]], (a, n, share, shift, ahead) => {
    const d = `M${(left + a * bw).toFixed(1)} ${(top + i * rowH).toFixed(1)}h${(n * bw).toFixed(1)}v${(rowH - (rowH > 4 ? 1 : 0)).toFixed(1)}h${(-n * bw).toFixed(1)}Z`;
    const key = shiftColour(shift, limit) + '|' + (share >= 9 ? 1 : share >= 6 ? 0.8 : share >= 3 ? 0.62 : 0.42);
    paths.set(key, (paths.get(key) || '') + d);
    if (ahead) future += d;
  }));
  g.append(svg('rect', { x: left, y: top, width: right - left, height: bottom - top, fill: 'var(--wash)' }));
  for (const [key, d] of paths) g.append(svg('path', { d, fill: key.split('|')[0], opacity: key.split('|')[1], 'shape-rendering': 'crispEdges' }));
  if (future) {
    anyFuture = true;
    g.append(svg('path', { d: future, fill: 'url(#hatch)' }));
  }
  shiftLegend(g, w > 470 ? left : 0, 2, limit || 1, anyFuture, w <= 470);
  g.append(svg('text', { x: 0, y: top - 8, class: 'strong' }, 'layer'));
  const layers = [...new Set(rows.map(r => r[0]))], every = Math.ceil(layers.length * 13 / Math.max(13, bottom - top));
  layers.forEach((l, i) => { if (i % every === 0) g.append(svg('text', { x: left - 7, y: top + rowH * rows.findIndex(r => r[0] === l) + Math.min(rowH, 9) / 2 + 6, 'text-anchor': 'end' }, l)); });
  axisX(g, x, bottom + 2, { from: left, to: right, n: w < 500 ? 4 : 7, label: 'true index in the conversation, tokens' });
  const hit = svg('rect', { x: left, y: top, width: right - left, height: bottom - top, fill: 'transparent' });
  hit.addEventListener('mousemove', e => {
    const box = hit.getBoundingClientRect(), bin = Math.min(k.n_bins - 1, Math.floor((e.clientX - box.left) / bw)), i = Math.min(rows.length - 1, Math.max(0, Math.floor((e.clientY - box.top) / rowH)));
    let said = ['kept', 'none'], moved = null;
    eachCell(k.rasters[rows[i][2]], (a, n, share, shift) => {
      if (bin >= a && bin < a + n) {
        said = ['kept', { 9: 'all', 6: 'two thirds or more', 3: 'a third or more', 1: 'under a third' }[share]];
        moved = shift;
      }
    });
    showTip([`layer ${rows[i][0]}, KV head ${rows[i][1]}`, ['tokens', `${fmt(bin * perBin)} to ${fmt((bin + 1) * perBin)}`], said, ['distance shift', moved === null ? '\u2013' : `${fmt(moved)} tokens`], ['slots held', fmt(rows[i][3])], ['next query stands at', fmt(rows[i][4])]], e.clientX, e.clientY);
  });
  hit.addEventListener('mouseleave', hideTip);
  g.append(hit);
  return bottom + 44;
}

function drawFold(k, run, g, w) {
  const left = 52, right = w - 14, top = 46, h = Math.max(250, Math.min(360, w * 0.86)), bottom = h - 46;
  const map = k.maps[0], s = map.segments;
  let most = map.next;
  for (let i = 0; i < s.length; i += 3) most = Math.max(most, s[i + 2] + s[i + 1] - s[i] + 1);
  most = most > 0.6 * k.n_tokens ? Math.max(most, k.n_tokens) : most * 1.2;
  const x = linear(0, k.n_tokens, left, right), y = linear(0, most, bottom, top);
  axisY(g, y, left, right, { n: 5, label: 'rope position', labelX: 0, labelY: top - 10 });
  g.append(svg('line', { x1: x(0), y1: y(0), x2: x(Math.min(k.n_tokens, most)), y2: y(Math.min(k.n_tokens, most)), stroke: 'var(--faint)', 'stroke-dasharray': '3 3' }));
  if (map.next < k.n_tokens) g.append(svg('rect', { x: left, y: top, width: right - left, height: Math.max(0, y(map.next) - top), fill: 'var(--wash)', opacity: 0.8 }),
    svg('text', { x: left + 6, y: top + 14 }, 'above the next query: its future'));
  let d = '';
  for (let i = 0; i < s.length; i += 3) d += `M${x(s[i]).toFixed(1)} ${y(s[i + 2]).toFixed(1)}L${x(s[i + 1] + 1).toFixed(1)} ${y(s[i + 2] + s[i + 1] - s[i] + 1).toFixed(1)}`;
  g.append(svg('path', { d, stroke: run.colour, 'stroke-width': 2.4, fill: 'none', 'stroke-linecap': 'round' }));
  g.append(svg('line', { x1: left, x2: right, y1: y(map.next), y2: y(map.next), stroke: 'var(--ink)', 'stroke-dasharray': '1.5 3' }));
  g.append(tip(shape('diamond', x(k.n_tokens), y(map.next), 5, { fill: 'var(--ink)' }), ['next query', ['true position', fmt(k.n_tokens)], ['rope position', fmt(map.next)]]));
  axisX(g, x, bottom, { from: left, to: right, n: w < 420 ? 4 : 5, label: 'true position, tokens' });
  return h;
}

function drawFrames(ev, run, g, w) {
  const n = ev.frames.length, left = 56, right = w - 12, top = 8, rowH = Math.max(4, Math.min(12, 150 / n)), bottom = top + n * rowH;
  g.append(svg('rect', { x: left, y: top, width: right - left, height: bottom - top, fill: 'var(--wash)' }));
  const paths = ['', '', '', ''];
  ev.frames.forEach(([, text], i) => {
    const bw = (right - left) / text.length;
    for (let a = 0, b; a < text.length; a = b) {
      for (b = a + 1; b < text.length && text[b] === text[a];) b++;
      const v = +text[a];
      if (v > 0) paths[v >= 9 ? 3 : v >= 6 ? 2 : v >= 3 ? 1 : 0] += `M${(left + a * bw).toFixed(1)} ${(top + i * rowH).toFixed(1)}h${((b - a) * bw).toFixed(1)}v${(rowH - (rowH > 4 ? 1 : 0)).toFixed(1)}h${(-(b - a) * bw).toFixed(1)}Z`;
    }
  });
  paths.forEach((d, i) => { if (d) g.append(svg('path', { d, fill: run.colour, opacity: [0.25, 0.45, 0.7, 0.95][i], 'shape-rendering': 'crispEdges' })); });
  const every = Math.ceil(n * 14 / Math.max(14, bottom - top));
  ev.frames.forEach(([i], k) => {
    if (k % every === 0) g.append(svg('text', { x: left - 7, y: top + k * rowH + Math.min(rowH, 9) / 2 + 5, 'text-anchor': 'end' }, fmt(i * ev.stride + 1)));
    const e = ev.list[i], hit = svg('rect', { x: left, y: top + k * rowH, width: right - left, height: rowH, fill: 'transparent' });
    g.append(tip(hit, [`eviction ${i * ev.stride + 1}`, ['turn, token', `${e[0]}, ${fmt(e[1])}`], ['path', e[2]], ['slots', `${fmt(e[3])} to ${fmt(e[4])}`], ['next rope position', fmt(e[5])], ['future share', percent(e[6])], ['health', fmt(e[7])]]));
  });
  axisX(g, linear(0, ev.n_tokens, left, right), bottom + 2, { from: left, to: right, n: w < 500 ? 4 : 7, label: 'true index in the conversation, tokens' });
  return bottom + 44;
}

function maps() {
  const have = RUNS.filter(r => D.keeps[r.i]);
  if (!have.length) return void card('maps', 'Where the kept tokens stand', null, el('p', { class: 'empty' }, 'No keep sets were recorded.'));
  let run = have.find(r => modeKind(r.position) === 'rollback' && !r.baseline) || have.find(r => !r.baseline) || have[0];
  const noFrames = () => !(D.events[run.i] && D.events[run.i].frames.length);
  const map = plot('Map of retained positions', (g, w) => drawMap(D.keeps[run.i], g, w));
  const fold = plot('True position against rope position', (g, w) => drawFold(D.keeps[run.i], run, g, w));
  const frames = plot('What one head held after each eviction', (g, w) => {
    if (!noFrames()) return drawFrames(D.events[run.i], run, g, w);
    g.append(svg('text', { x: 0, y: 16 }, 'This run evicted nothing.'));
    return 26;
  });
  const said = el('p', { class: 'foot' });
  const redraw = () => {
    const k = D.keeps[run.i], e = D.events[run.i];
    said.textContent = `Dialogue \u201c${cut(M.dialogues[k.dialogue].id, 60)}\u201d at its end, ${fmt(k.n_tokens)} tokens. ` +
      (k.rasters.length === 1 ? 'All heads hold the same set. ' : `${k.rasters.length} different rows among ${k.heads.length} heads. `) +
      `A cell is ${fmt(k.n_tokens / k.n_bins)} tokens, paler where it holds fewer of them. Shift: the distance the next query sees, less the true one. ` +
      (e && e.stride > 1 ? `Every ${e.stride}th eviction is drawn.` : '');
    for (const p of [map, fold, frames]) p.redraw();
  };
  card('maps', 'Where the kept tokens stand', 'Left: what every head still holds at the end, coloured by how far its rotation misplaces it. Right: under rollback the curve folds, and two tokens share a position.',
    el('div', { class: 'controls' }, chooser('run', have.map(r => [String(r.i), runText(r)]), String(run.i), v => { run = RUNS[+v]; redraw(); })),
    el('div', { class: 'two' }, el('div', {}, el('h3', {}, 'Kept positions, layer by layer (KV heads stacked)'), map, el('h3', {}, 'Layer 0, head 0 after each eviction (number at the left)'), frames),
      el('div', {}, el('h3', {}, `True against rope position, layer ${D.keeps[run.i].maps[0].layer}, head ${D.keeps[run.i].maps[0].kv_head}`), fold)), said);
  redraw();
}

/* ---- P9: where the time goes ---- */

const PARTS = [['tokenise', 'tokenise_ms'], ['prefill', 'prefill_ms'], ['decode', 'decode_ms'], ['score', 'score_ms'], ['select', 'select_ms'], ['move', 'move_ms']];

function latency() {
  let protocol = RUNS.some(r => D.turn_means[r.i][FR]) ? FR : TF, small = false;
  const rows = () => RUNS.map(r => ({ r, parts: PARTS.map(p => turnMean(r, p[1], protocol).v || 0), n: (D.turn_means[r.i][protocol] || {}).n })).filter(o => o.parts.some(v => v > 0));
  const box = plot('Time per turn, stacked', (g, w) => {
    const list = rows(), narrow = w < 620, left = narrow ? 8 : 272, right = w - 62, rowH = narrow ? 34 : 20, top = 6, bottom = top + rowH * list.length;
    if (!list.length) {
      g.append(svg('text', { x: 0, y: 20 }, 'No times were recorded.'));
      return 30;
    }
    const use = small ? [0, 3, 4, 5] : [0, 1, 2, 3, 4, 5], total = o => use.reduce((s, i) => s + o.parts[i], 0);
    const x = linear(0, Math.max(...list.map(total)) || 1, left, right);
    g.append(svg('defs', {}, svg('pattern', { id: 'stripes', width: 4, height: 4, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(45)' }, svg('rect', { width: 1.4, height: 4, fill: 'var(--card)', opacity: 0.5 }))));
    for (const v of x.ticks(narrow ? 4 : 7)) g.append(svg('line', { class: 'grid', x1: x(v), x2: x(v), y1: top, y2: bottom }));
    list.forEach((o, i) => {
      const y = top + i * rowH + (narrow ? 17 : 3), group = svg('g', {});
      const said = runText(o.r), most = narrow ? 52 : 41, name = cutName(o.r.name, most - (said.length - o.r.name.length)) + said.slice(o.r.name.length);
      g.append(shape(o.r.shape, narrow ? left + 4 : 8, y + (narrow ? -8 : 7), 4, { fill: o.r.colour }), svg('text', { x: narrow ? left + 13 : 18, y: y + (narrow ? -4 : 11), class: 'strong' }, name));
      let at = left;
      for (const k of use) {
        const width = o.parts[k] / x.hi * (right - left);
        if (width <= 0) continue;
        group.append(svg('rect', { x: at, y, width, height: 14, fill: `var(--${PARTS[k][0]})` }));
        if (k >= 3) group.append(svg('rect', { x: at, y, width, height: 14, fill: 'url(#stripes)' }));
        at += width;
      }
      g.append(tip(group, [runText(o.r), ...PARTS.map((p, k) => [p[0], `${fmt(o.parts[k])} ms`]), ['whole turn', `${fmt(o.parts.reduce((s, v) => s + v, 0))} ms`], ['turns', o.n]]));
      g.append(svg('text', { x: at + 6, y: y + 11 }, fmt(total(o))));
    });
    axisX(g, x, bottom + 3, { from: left, to: right, n: narrow ? 4 : 7, label: 'ms per turn, mean over turns' });
    return bottom + 46;
  });
  const both = RUNS.some(r => D.turn_means[r.i][FR]) && RUNS.some(r => D.turn_means[r.i][TF]);
  card('time', 'Where the time goes', 'One bar per run. Striped parts are the eviction: scoring, selecting, moving.',
    el('div', { class: 'controls' }, both ? chooser('protocol', [['1', 'free-running'], ['0', 'teacher-forced']], String(protocol), v => { protocol = +v; box.redraw(); }) : null,
      chooser('show', [['all', 'whole turn'], ['small', 'without prefill and decode']], 'all', v => { small = v === 'small'; box.redraw(); })),
    el('ul', { class: 'legend' }, PARTS.map((p, k) => el('li', {}, svg('svg', { width: 14, height: 12, 'aria-hidden': 'true' }, svg('rect', { width: 14, height: 12, fill: `var(--${p[0]})` }), k >= 3 ? svg('path', { d: 'M0 6 6 0M2 12 14 0M8 12 14 6', stroke: 'var(--card)', 'stroke-width': 1.5, opacity: 0.6 }) : null), p[0]))),
    box, foot('Times compare only within one machine and one session.')).classList.add('long');
}

/* ---- health, degeneration, evictions, failures ---- */

function gauge(v) {
  const g = svg('svg', { width: 90, height: 16, 'aria-hidden': 'true' }), x = q => q * 0.9;
  g.append(svg('rect', { x: 0, y: 4, width: 90, height: 8, rx: 2, fill: 'var(--grid)' }));
  if (known(v)) g.append(svg('rect', { x: 0, y: 4, width: Math.max(1, x(Math.min(100, Math.max(0, v)))), height: 8, rx: 2, fill: v >= 90 ? 'var(--rerotate)' : v >= 80 ? 'var(--keep)' : v >= 60 ? 'var(--maybe)' : 'var(--no)' }));
  for (const b of [60, 80, 90]) g.append(svg('line', { x1: x(b), x2: x(b), y1: 2, y2: 14, stroke: 'var(--ink)', opacity: 0.5 }));
  return g;
}
const healthWord = v => (!known(v) ? '' : v >= 90 ? 'good' : v >= 80 ? 'fair' : v >= 60 ? 'poor' : 'broken');
const protocolOf = r => (D.turn_means[r.i][TF] ? TF : FR);

function healthTable() {
  const own = (name, unit, column, pick, scale) => ({ name, unit, get: r => turnStat(name, unit, column, protocolOf(r), pick, scale).get(r) });
  const worst = r => Object.entries((D.turn_means[r.i][protocolOf(r)] || { worst: {} }).worst).sort((a, b) => b[1] - a[1])[0];
  card('health', 'Health and positional fidelity', 'Health predicts, without a reference, how close the next answer is to the full cache\u2019s. Its weights are priors set before any measurement, not fitted: it orders states, its number is not yet a KL. The other columns are its inputs.',
    table(RUNS, [policyColumn, modeColumn, budgetColumn, { name: 'health', unit: 'mean of turns, uncalibrated; marks at 60, 80, 90', text: true, get: r => { const v = turnMean(r, 'health', protocolOf(r)).v; return { sort: v, node: gauge(v), text: `${fmt(v)} ${healthWord(v)}` }; } },
      own('least', 'of turns', 'health', 'min'), { name: 'worst term', unit: 'most often', text: true, get: r => { const t = worst(r); return { sort: t ? t[0] : null, text: t ? t[0] : '\u2013' }; } },
      own('future', '%', 'future', 'v', 100), own('out of window', '%', 'out_of_window', 'v', 100), own('collision', '%', 'collision', 'v', 100), own('order', '%', 'order', 'v', 100), own('backward', '%', 'backward', 'v', 100),
      own('seam', '%', 'seam', 'v', 100), own('LDD', 'log\u2082', 'ldd'), own('RDDI', '0\u20132', 'rddi'), own('template', '% intact', 'template_integrity', 'v', 100)], { column: 3 }));
}

function degeneration() {
  const rows = RUNS.filter(r => D.turn_means[r.i][FR]);
  if (!rows.length) return void card('loops', 'Degeneration', null, el('p', { class: 'empty' }, 'No free-running turns: nothing was generated.'));
  const s = (name, unit, column, pick, scale) => turnStat(name, unit, column, FR, pick, scale);
  card('loops', 'Degeneration', 'What the model wrote when it ran free: repeated n-grams, loops, echoes of the prompt, missing ends.',
    table(rows, [policyColumn, modeColumn, budgetColumn, { name: 'turns', get: r => ({ v: D.turn_means[r.i][FR].n }) }, s('looped', '% of turns', 'looped', 'v', 100), s('rep-1', '', 'rep1'), s('rep-2', '', 'rep2'), s('rep-3', '', 'rep3'), s('rep-4', '', 'rep4'),
      s('longest repeat', 'tok, mean', 'longest_repeat'), s('max run', 'tok, most', 'max_run', 'max'), s('prompt echo', '%', 'prompt_echo', 'v', 100), s('no end', '% of turns', 'eos_missing', 'v', 100), s('generated', 'tok per turn', 'n_generated')], { column: 4, down: true }));
}

function evictions() {
  const rows = RUNS.filter(r => D.events[r.i].n > 0);
  if (!rows.length) return void card('events', 'Evictions', null, el('p', { class: 'empty' }, 'No run evicted anything.'));
  const col = (name, unit, column, pick = 0, scale = 1) => ({ name, unit, get: r => { const v = D.events[r.i].values[D.event_cols.indexOf(column)]; return { v: v ? v[pick] * scale : null }; } });
  const words = o => Object.entries(o).sort((a, b) => b[1] - a[1]).map(([k, n]) => `${k} ${fmt(n)}`).join(', ');
  card('events', 'Evictions', 'How often, on which path, and what an event costs.',
    table(rows, [policyColumn, modeColumn, budgetColumn, { name: 'events', get: r => ({ v: D.events[r.i].n }) }, { name: 'path', text: true, wrap: true, get: r => ({ sort: words(D.events[r.i].paths), text: words(D.events[r.i].paths) }) },
      { name: 'reason', text: true, wrap: true, get: r => ({ sort: words(D.events[r.i].reasons), text: words(D.events[r.i].reasons) }) }, col('before', 'slots', 'n_before'), col('after', 'slots', 'n_after'), col('evict', 'ms', 'evict_ms'), col('score', 'ms', 'score_ms'), col('select', 'ms', 'select_ms'),
      col('move', 'ms', 'move_ms'), col('longest', 'ms', 'evict_ms', 2), col('future', '%, most', 'future', 2, 100)], { column: 3, down: true })).classList.add('long');
}

function failures() {
  const f = D.failures, wanted = (M.protocols || []).map(p => (p === 'fr' ? FR : TF)), expected = M.runs.length * M.dialogues.length * Math.max(1, wanted.length);
  const missing = D.summary === null ? null : expected - D.summary.filter(row => !wanted.length || wanted.includes(row[2])).length;
  const rows = f.rows.map(r => ({ run: RUNS[r[0]], dialogue: M.dialogues[r[1]].id, turn: r[2], protocol: r[3] ? 'free-running' : 'teacher-forced', why: r[4] }));
  const said = (f.n ? `${fmt(f.n)} turns failed${f.n > rows.length ? `; the first ${rows.length} are listed` : ''}. ` : 'No turn failed. ') +
    (missing === null ? 'Rows of single dialogues were left out to keep this page small; summary.csv has them.' : missing > 0 ? `${fmt(missing)} of ${fmt(expected)} cells (run, dialogue, protocol) have no summary row.` : `All ${fmt(expected)} cells (run, dialogue, protocol) have a summary row.`);
  card('failures', 'Failures and gaps', said, rows.length ? table(rows, [{ name: 'run', text: true, get: r => ({ sort: runText(r.run), node: icon(r.run.shape, r.run.colour, r.run.open), text: runText(r.run) }) },
    { name: 'dialogue', text: true, wrap: true, get: r => ({ sort: r.dialogue, text: r.dialogue }) }, { name: 'turn', get: r => ({ v: r.turn }) }, { name: 'protocol', text: true, get: r => ({ sort: r.protocol, text: r.protocol }) },
    { name: 'what happened', text: true, wrap: true, get: r => ({ sort: r.why, text: r.why }) }]) : null).classList.add('long');
}

function reproduce() {
  const copy = el('button', { type: 'button', on: { click: () => { if (navigator.clipboard) navigator.clipboard.writeText(M.command || '').then(() => { copy.textContent = 'Copied'; }, () => {}); } } }, 'Copy');
  card('again', 'Run it again', 'The command, with paths cut to their last part.', el('pre', {}, M.command || 'not recorded'), el('div', { class: 'controls' }, copy),
    foot(`Model SHA-256 ${(M.model && M.model.sha256) || '?'}. Data ${(M.data && M.data.name) || '?'}, xxh64 ${(M.data && M.data.xxh64) || '?'}. Compiler ${M.compiler || '?'}. Everything but the times repeats exactly on the same instruction set.`),
    foot(FLOOR > 0 ? `Noise floor: KL ${fmt(FLOOR)} nat per token. A KL under ${fmt(10 * FLOOR)} is marked \u201cnot resolved\u201d everywhere on this page.` : 'Noise floor: not measured.'));
}

/* ---- the page ---- */

document.title = `Kvasir: ${(M.model && M.model.name) || ''}, ${M.suite || ''} suite`;
header();
/* With one position mode there is nothing for the first figure to answer: what the grid compares is the policies. */
const oneMode = new Set(RUNS.filter(r => !r.baseline).map(r => modeKind(r.position))).size < 2;
const first = oneMode ? [pareto, claims] : [claims, interaction, pareto];
const parts = [...first, mainTable, recall, curves, positions, maps, latency, healthTable, tracking, degeneration, evictions, failures, reproduce];
for (const part of parts) {
  try {
    part();
  } catch (e) { /* one odd figure must not hide the others */
    card('broken-' + part.name, 'A figure could not be drawn', `${part.name}: ${e.message}`);
  }
}
document.getElementById('top').append(el('nav', { 'aria-label': 'sections' }, sections.map(([id, title]) => el('a', { href: '#' + id }, title))));
document.body.append(el('footer', {}, `Written by kvasir ${(M.kvasir && M.kvasir.version) || ''}; one file, nothing loaded from anywhere. Schema ${M.schema}.`));
