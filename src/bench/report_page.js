/* The report: what each figure and table shows. Numbers come from the data block as C computed them; nothing is
 * estimated here. Colour is always the position mode, shape is always the policy. */
'use strict';

const D = JSON.parse(document.getElementById('data').textContent);
const M = D.manifest, TF = 0, FR = 1;
const main = document.getElementById('main');
const FLOOR = known(M.noise_floor_kl) ? M.noise_floor_kl : 0;

/* ---- runs, policies, modes ---- */

const MODES = ['rollback', 'keep', 'rerotate', 'gapcap', 'recompute'];
const DASH = { rollback: null, keep: '7 3', rerotate: '2.5 2.5', gapcap: '9 3 2 3', recompute: '1 3' };
const modeKind = position => String(position).split(':')[0];
const modeColour = position => (MODES.includes(modeKind(position)) ? `var(--${modeKind(position)})` : 'var(--none)');
const modeDash = position => DASH[modeKind(position)] || null;

const policies = [...new Set(M.runs.map(r => r.policy))];
const heads = policies.map(p => p.split(/[: ]|\+(?=[a-z]+=)/)[0]); // kvzip+ is a name
const count = (n, word) => `${n} ${word}${n === 1 ? '' : 's'}`;
const cut = (s, n) => (s.length > n ? s.slice(0, n - 1) + '\u2026' : s);
/* Two policies of one preset are told apart by the words that only one of them has. */
const LATE = ' (full first)';
const specWords = i => policies[i].slice(heads[i].length).replace(LATE, '').split(/[:,\s]+/).filter(Boolean);
const policyName = policies.map((p, i) => {
  const family = policies.map((q, k) => k).filter(k => heads[k] === heads[i]);
  return [heads[i], ...specWords(i).filter(word => !family.every(k => specWords(k).includes(word)))].join(' ') +
    (p.endsWith(LATE) ? LATE : '');
});
/* Shortened in the preset's name, since its words are what tells it apart. */
function cutName(name, n) {
  const head = name.split(' ')[0], tail = name.slice(head.length);
  return name.length <= n ? name : tail && tail.length + 5 < n ? cut(head, n - tail.length) + tail : cut(name, n);
}
const isBaseline = policy => /^(baseline|full|none)\b/.test(policy);
const RUNS = M.runs.map((r, i) => {
  const p = policies.indexOf(r.policy);
  return Object.assign({}, r, { i, p, name: policyName[p], shape: SHAPES[p % SHAPES.length], open: p >= SHAPES.length,
    colour: modeColour(r.position), dash: modeDash(r.position), baseline: isBaseline(r.policy) });
});
const budgetKeys = [...new Set(RUNS.filter(r => !r.baseline).map(r => r.budget_bytes))].sort((a, b) => a - b);
const budgetText = r => (known(r.budget_bytes) ? fmt(r.budget_bytes / MIB) + '\u2009MiB' : '\u2013') + (known(r.budget_tokens) && r.budget_tokens ? `, ${fmt(r.budget_tokens)} tok` : '');
const runText = r => `${r.name}, ${r.position}` + (r.share ? `, ${r.share}` : r.baseline || budgetKeys.length < 2 ? '' : `, ${known(r.budget_tokens) && r.budget_tokens ? fmt(r.budget_tokens) + ' tok' : fmt(r.budget_bytes / MIB) + ' MiB'}`);

/* [mean, low, high, n] of a summary column; the other protocol stands in where the wanted one has no value. */
function mean(run, column, protocol = TF) {
  const c = D.summary_cols.indexOf(column);
  for (const p of [protocol, 1 - protocol]) {
    const m = D.means[run.i][p] && D.means[run.i][p][c];
    if (m && known(m[0])) return { v: m[0], lo: m[1], hi: m[2], n: m[3], protocol: p };
  }
  return { v: null, lo: null, hi: null, n: 0, protocol };
}
function turnMean(run, column, protocol) {
  const t = D.turn_means[run.i][protocol];
  const v = t && t.values[D.turn_cols.indexOf(column)];
  return v ? { v: v[0], lo: null, hi: null, min: v[1], max: v[2], n: v[3] } : { v: null, n: 0 };
}
const ciText = m => (known(m.lo) ? `${fmt(m.lo)} to ${fmt(m.hi)}` : 'n\u2009=\u2009' + m.n + ', no interval');
const unresolved = v => FLOOR > 0 && known(v) && v <= 10 * FLOOR;

/* ---- page furniture ---- */

const sections = [];
function card(id, title, note, ...body) {
  const s = el('section', { id, 'aria-labelledby': id + '-h' }, el('h2', { id: id + '-h' }, title), note ? el('p', { class: 'note' }, note) : null, ...body);
  sections.push([id, title]);
  main.append(s);
  return s;
}
function chooser(label, options, value, onchange) {
  const s = el('select', { on: { change: () => onchange(s.value) } }, options.map(([v, text]) => el('option', { value: v }, text)));
  s.value = value;
  return el('label', {}, label, s);
}
const runOptions = filter => RUNS.filter(filter || (() => true)).map(r => [String(r.i), runText(r)]);
const foot = text => el('p', { class: 'foot' }, text);

/* Highlighting by policy: hovering or focusing a legend entry dims the other policies. */
function policyLegend(box, shown) {
  const light = p => { for (const g of box.querySelectorAll('[data-p]')) g.classList.toggle('dim', p !== null && +g.dataset.p !== p); };
  return el('ul', { class: 'legend' },
    el('li', { class: 'word' }, 'policy'),
    shown.map(p => el('li', { tabindex: '0', title: policies[p], on: { mouseenter: () => light(p), mouseleave: () => light(null), focus: () => light(p), blur: () => light(null) } },
      icon(SHAPES[p % SHAPES.length], 'var(--soft)', p >= SHAPES.length), policyName[p])),
    el('li', { class: 'gap' }), el('li', { class: 'word' }, 'position mode'),
    MODES.filter(m => RUNS.some(r => modeKind(r.position) === m)).map(m => el('li', {}, dashIcon(modeColour(m), DASH[m]), m)));
}

/* From the rows themselves: a suite may run only some dialogues freely. */
function protocolText() {
  const n = Math.max(0, ...RUNS.map(r => { const m = mean(r, 'ttft_ms_median', FR); return m.protocol === FR ? m.n : 0; }));
  const said = RUNS.some(r => D.turn_means[r.i][TF]) ? ['teacher-forced'] : [];
  if (RUNS.some(r => D.turn_means[r.i][FR])) said.push('free-running' + (n && n < M.dialogues.length ? ` (${n} of ${M.dialogues.length})` : ''));
  return said.join(' and ');
}

function header() {
  const m = M.model || {}, d = M.data || {}, c = M.cpu || {}, k = M.kvasir || {};
  if (M.preliminary || D.claims.preliminary || M.complete === false) {
    const ribbon = document.getElementById('ribbon');
    ribbon.hidden = false;
    ribbon.textContent = (M.complete === false ? 'INCOMPLETE: this run was stopped before its end. ' : '') +
      (M.preliminary || D.claims.preliminary ? `PRELIMINARY: too few dialogues for a verdict (${D.claims.n_dialogues ?? M.dialogues.length}); leanings are shown instead.` : '');
  }
  const fact = (name, value, small) => el('div', {}, el('dt', {}, name), el('dd', {}, value, small ? el('small', {}, small) : null));
  const dark = () => document.documentElement.dataset.theme === 'dark' || (!document.documentElement.dataset.theme && matchMedia('(prefers-color-scheme: dark)').matches);
  const toggle = el('button', { type: 'button', on: { click: () => setTheme(dark() ? 'light' : 'dark') } }, 'Light / dark');
  const day = t => (t ? String(t).replace('T', ' ').replace(/(:\d\d)(\.\d+)?Z?$/, '$1') : '?');
  document.getElementById('top').append(
    el('div', { class: 'headline' }, el('div', {}, el('h1', {}, 'What a KV-cache budget costs'),
      el('p', { class: 'lead' }, 'Each cache policy and position mode against the full cache, on the same dialogues, in space, time, accuracy and positional fidelity.')), toggle),
    el('dl', { class: 'facts' },
      fact('model', m.name || '?', `${m.n_layers ?? '?'} layers, ${m.n_kv_heads ?? '?'} KV heads of ${m.head_dim ?? '?'}, window ${fmt(m.window_tokens)}`),
      fact('suite', M.suite || '?', `${count(M.runs.length, 'run')}, ${count(M.dialogues.length, 'dialogue')}, ${protocolText()}`),
      fact('data', d.name || '?', `${d.licence || 'licence not stated'}, xxh64 ${d.xxh64 || '?'}`),
      fact('machine', c.model || '?', `${c.isa || '?'}, ${c.threads ?? '?'} threads, ${M.os || '?'}`),
      fact('numbers', `${M.arith || '?'} arithmetic, ${M.kv_type || '?'} cache`, `${fmt(m.kv_bytes_per_token)} B per token, seed ${M.seed}`),
      fact('build', `kvasir ${k.version || '?'}`, `${String(k.commit || '?').slice(0, 12)}${k.dirty ? ', changed tree' : ''}; ${day(M.started)} to ${day(M.ended)} UTC`)));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem('kvs-theme', theme); } catch (e) { /* a page from a file may have no storage */ }
}
{
  const wanted = /theme=(dark|light)/.exec(location.hash);
  let kept = null;
  try { kept = localStorage.getItem('kvs-theme'); } catch (e) { /* as above */ }
  if (wanted || kept === 'dark' || kept === 'light') document.documentElement.dataset.theme = wanted ? wanted[1] : kept;
}

/* ---- claims ---- */

const TONE = { SUPPORTED: 'yes', PASS: 'yes', REFUTED: 'no', FAIL: 'no', INCONCLUSIVE: 'maybe', PRELIMINARY: 'early', 'NOT RUN': 'none' };

function verdictIcon(verdict) {
  const g = svg('svg', { width: 18, height: 18, viewBox: '-9 -9 18 18', 'aria-hidden': 'true' });
  const line = { fill: 'none', stroke: 'var(--card)', 'stroke-width': 2, 'stroke-linecap': 'round', 'stroke-linejoin': 'round' };
  const c = `var(--${TONE[verdict] || 'none'})`;
  const check = svg('path', Object.assign({ d: 'M-3.6 .2 -1 2.9 3.8 -2.8' }, line));
  const cross = svg('path', Object.assign({ d: 'M-2.8 -2.8 2.8 2.8M-2.8 2.8 2.8 -2.8' }, line));
  switch (verdict) {
  case 'SUPPORTED': g.append(shape('circle', 0, 0, 8, { fill: c }), check); break;
  case 'PASS': g.append(svg('rect', { x: -8, y: -8, width: 16, height: 16, rx: 4, fill: c }), check); break;
  case 'REFUTED': g.append(shape('square', 0, 0, 8.6, { fill: c }), cross); break;
  case 'FAIL': g.append(svg('path', { d: 'M-3.5 -8H3.5L8 -3.5V3.5L3.5 8H-3.5L-8 3.5V-3.5Z', fill: c }), cross); break;
  case 'INCONCLUSIVE': g.append(shape('diamond', 0, 0, 6.7, { fill: c }), svg('path', Object.assign({ d: 'M-2.8 0H2.8' }, line))); break;
  case 'PRELIMINARY': g.append(svg('circle', { r: 7.2, fill: 'none', stroke: c, 'stroke-width': 1.8 }), svg('path', { d: 'M0 -7.2A7.2 7.2 0 0 1 0 7.2Z', fill: c })); break;
  default: g.append(svg('circle', { r: 7, fill: 'none', stroke: c, 'stroke-width': 1.6, 'stroke-dasharray': '3 2.4' }));
  }
  return g;
}

/* Estimate and interval against the threshold, on a log axis where everything is positive and far apart. */
function intervalPlot(claim) {
  return plot(`${claim.id} interval`, (g, w) => {
    const e = claim.estimate, t = claim.threshold, lo = known(claim.ci_low) ? claim.ci_low : e, hi = known(claim.ci_high) ? claim.ci_high : e;
    const all = [e, lo, hi, t].filter(known), least = Math.min(...all), most = Math.max(...all);
    const pad = 16, y = 24, log = least > 0 && most / least > 20;
    const span = most - least || Math.abs(most) || 1;
    const x = log ? logarithmic(least / 1.6, most * 1.6, pad, w - pad) : linear(least - 0.12 * span, most + 0.12 * span, pad, w - pad);
    g.append(svg('line', { class: 'axis', x1: pad, x2: w - pad, y1: y + 0.5, y2: y + 0.5 }));
    if (known(t)) {
      const tx = x(t), anchor = tx > w * 0.7 ? 'end' : tx < w * 0.3 ? 'start' : 'middle';
      g.append(svg('line', { x1: tx, x2: tx, y1: y - 11, y2: y + 11, stroke: 'var(--ink)', 'stroke-width': 1.5, 'stroke-dasharray': '3 2' }));
      g.append(svg('text', { x: anchor === 'end' ? tx + 8 : anchor === 'start' ? tx - 8 : tx, y: y - 14, 'text-anchor': anchor }, `threshold ${fmt(t)}`));
    }
    const mark = svg('g', {}, svg('rect', { x: x(lo), y: y - 4, width: Math.max(1, x(hi) - x(lo)), height: 8, rx: 4, fill: 'var(--tone)', opacity: 0.35 }),
      svg('circle', { cx: x(e), cy: y, r: 5, fill: 'var(--tone)' }));
    g.append(tip(mark, [claim.id, ['estimate', `${fmt(e)} ${claim.unit || ''}`], ['95 %', known(claim.ci_low) ? `${fmt(lo)} to ${fmt(hi)}` : 'none'], ['threshold', fmt(t)], ['n', claim.n ?? '\u2013']]));
    return y + 14;
  });
}

function claimCard(c) {
  const tone = TONE[c.verdict] || 'none';
  const lean = c.leaning && c.verdict === 'PRELIMINARY' ? el('em', {}, `leans ${c.leaning}`) : null;
  const detail = (c.detail || []).length ? el('table', {}, el('tbody', {}, c.detail.map(d => el('tr', {}, el('td', { class: 'text wrap' }, String(d.name)),
    el('td', {}, fmt(d.value)), el('td', {}, known(d.ci_low) ? `${fmt(d.ci_low)} to ${fmt(d.ci_high)}` : '\u2013'))))) : null;
  return el('article', { class: 'claim', style: `--tone: var(--${tone})` },
    el('div', { class: 'verdict' }, verdictIcon(c.verdict), c.verdict, lean, el('span', { class: 'id' }, c.id)),
    el('p', {}, c.statement || ''),
    known(c.estimate) ? intervalPlot(c) : el('p', { class: 'empty' }, 'No estimate.'),
    known(c.estimate) ? el('p', { class: 'number' }, el('b', {}, fmt(c.estimate)), known(c.ci_low) ? ` (${fmt(c.ci_low)} to ${fmt(c.ci_high)})` : '', `, n\u2009=\u2009${c.n ?? '\u2013'}`, el('small', {}, c.unit || '')) : null,
    c.meaning || detail ? el('details', {}, el('summary', {}, detail ? 'Meaning and further numbers' : 'What it means'), c.meaning || '', detail) : null);
}

function claims() {
  /* What ran stands first; the order is kept otherwise. */
  const list = D.claims.claims.slice().sort((a, b) => (a.verdict === 'NOT RUN') - (b.verdict === 'NOT RUN'));
  card('claims', 'Verdicts', 'Thresholds were fixed before the runs. The bar is the 95 % interval, the dashed line the threshold it must clear.',
    list.length ? el('div', { class: 'claims' }, list.map(claimCard)) : el('p', { class: 'empty' }, 'No claim was tested.'));
}

/* ---- P11: kept set x position mode ---- */

function runTip(r, m, extra) {
  return [runText(r), ['policy', cut(r.policy_full || r.policy, 60)], ['KL', `${fmt(m.v)} nat`], ['95 %', ciText(m)], ['dialogues', m.n], ...(unresolved(m.v) ? ['not resolved: under 10\u00d7 the noise floor'] : []), ...(extra || [])];
}

function interactionFacet(g, runs, x0, width, top, bottom, y, modes, labels) {
  const right = labels ? 172 : 14, step = (width - right - 20) / modes.length;
  const at = mode => x0 + 10 + step * (modes.indexOf(mode) + 0.5);
  const shown = [...new Set(runs.map(r => r.p))];
  const dodge = p => (shown.indexOf(p) - (shown.length - 1) / 2) * Math.min(9, step * 0.6 / Math.max(1, shown.length));
  const ends = [];
  for (const p of shown) {
    const own = modes.map(m => runs.find(r => r.p === p && r.position === m)).filter(Boolean).map(r => ({ r, m: mean(r, 'kl_mean') })).filter(o => known(o.m.v));
    if (!own.length) continue;
    const group = svg('g', { 'data-p': p }), xs = o => at(o.r.position) + dodge(p);
    group.append(svg('path', { d: linePath(own.map(o => [xs(o), y(o.m.v)])), fill: 'none', stroke: 'var(--faint)', 'stroke-width': 1.4, 'stroke-dasharray': ['', '6 3', '2 3', '9 3 2 3'][p % 4] || null }));
    for (const o of own) {
      const mark = svg('g', {});
      if (known(o.m.lo)) mark.append(svg('line', { x1: xs(o), x2: xs(o), y1: y(o.m.lo), y2: y(o.m.hi), stroke: o.r.colour, 'stroke-width': 1.6 }));
      mark.append(shape(o.r.shape, xs(o), y(o.m.v), 5, o.r.open ? { fill: 'var(--card)', stroke: o.r.colour, 'stroke-width': 1.8 } : { fill: o.r.colour, stroke: 'var(--card)', 'stroke-width': 0.8 }));
      group.append(tip(mark, runTip(o.r, o.m)));
    }
    const last = own[own.length - 1];
    ends.push({ p, x: xs(last), y: y(last.m.v), group });
    g.append(group);
  }
  if (!labels) return;
  const lx = x0 + width - right + 2, ys = spreadLabels(ends.map(e => e.y), 14, top + 6, bottom - 4);
  ends.forEach((e, i) => e.group.append(
    svg('path', { d: linePath([[e.x + 7, e.y], [lx - 4, ys[i]]]), stroke: 'var(--line)', fill: 'none' }),
    svg('text', { x: lx, y: ys[i] + 4, class: 'strong' }, cutName(policyName[e.p], 25), svg('title', {}, policies[e.p]))));
}

function interaction() {
  const runs = RUNS.filter(r => !r.baseline && known(mean(r, 'kl_mean').v));
  const modes = [...new Set(runs.map(r => r.position))].sort((a, b) => MODES.indexOf(modeKind(a)) - MODES.indexOf(modeKind(b)));
  const shown = [...new Set(runs.map(r => r.p))];
  if (!runs.length) return void card('interaction', 'Is it what is kept, or where it stands?', null, el('p', { class: 'empty' }, 'No run with a KL value.'));
  const box = plot('KL against position mode, one line per policy', (g, w) => {
    const left = 56, per = Math.max(1, Math.min(budgetKeys.length, Math.floor((w - left) / 300))), rows = Math.ceil(budgetKeys.length / per);
    const fw = (w - left) / per, h = w < 560 ? 290 : 330, values = runs.flatMap(r => { const m = mean(r, 'kl_mean'); return [m.v, m.lo, m.hi]; });
    budgetKeys.forEach((b, i) => {
      const own = runs.filter(r => r.budget_bytes === b), x0 = left + (i % per) * fw, top = Math.floor(i / per) * (h + 4) + 42, bottom = top + h - 68;
      const y = klScale(values, FLOOR, top, bottom), first = i % per === 0, labels = fw > 430 || (per === 1 && w > 460);
      axisY(g, y, x0, x0 + fw - 14, { quiet: !first, label: first ? 'KL(full \u2016 policy), nat per token, log' : null, labelX: 0, labelY: top - 26 });
      klStrip(g, y, x0, x0 + fw - 14, bottom);
      g.append(svg('text', { x: x0 + 10, y: top - 8, class: 'name' }, own.length ? `budget ${budgetText(own[0])}` : ''));
      const right = labels ? 172 : 14, step = (fw - right - 20) / modes.length;
      g.append(svg('line', { class: 'axis', x1: x0, x2: x0 + fw - 14, y1: bottom + 0.5, y2: bottom + 0.5 }));
      modes.forEach((m, k) => g.append(svg('text', { x: x0 + 10 + step * (k + 0.5), y: bottom + 18, 'text-anchor': 'middle', class: 'strong' }, m)));
      interactionFacet(g, own, x0, fw, top, bottom, y, modes, labels);
    });
    return rows * (h + 4);
  });
  card('interaction', 'Is it what is kept, or where it stands?',
    'The figure that answers the paper. One line is one kept set under every position mode. A line that falls steeply says the loss came from positions, a flat one that it came from the tokens evicted. Parallel lines mean the two do not interact.',
    policyLegend(box, shown), box,
    foot(`Means over dialogues, bars are 95 % percentile bootstrap intervals over dialogues (${fmt(D.draws)} draws). Lower is better. Same budget in bytes within a panel.`));
}

/* ---- P1: quality against memory ---- */

function hull(points) {
  const sorted = points.slice().sort((a, b) => a.x - b.x || a.k - b.k), out = [];
  let best = Infinity;
  for (const p of sorted) if (p.k < best) {
    best = p.k;
    out.push(p);
  }
  return out;
}

/* ---- P1 of a grid of methods: a panel a share of the cache, the best and the worst named ---- */

const MANY = 12; /* policies beyond which shapes no longer tell them apart */

/* Marks of one size and nearly one KL, side by side. */
function sideBySide(points, x, y) {
  const seen = new Map();
  for (const p of points.slice().sort((a, b) => a.k - b.k)) {
    const key = Math.round(x(p.x) / 7) + '|' + Math.round(y(p.k) / 6), k = seen.get(key) || 0;
    seen.set(key, k + 1);
    p.px = x(p.x) + Math.ceil(k / 2) * 6 * (k % 2 ? 1 : -1);
    p.py = y(p.k);
  }
}

function sharePanel(g, own, from, all, top, bottom, o) {
  const x0 = from + 52, width = all - 52, y = klScale(own.map(p => p.k), FLOOR, top, bottom);
  const plotW = width * 0.4, xs = own.filter(p => !p.late).map(p => p.x), least = Math.min(...xs), most = Math.max(...xs);
  const x = logarithmic(least / 1.04, most * 1.04, x0 + 12, x0 + plotW - 16);
  axisY(g, y, x0, x0 + plotW, { n: 6, label: o.first ? 'KL(full \u2016 policy), nat per token, log; each panel its own scale' : null, labelX: 0, labelY: 12 });
  g.append(svg('line', { class: 'axis', x1: x0, x2: x0 + plotW, y1: bottom + 0.5, y2: bottom + 0.5 }));
  for (const v of most > least * 1.03 ? [least, most] : [least]) g.append(svg('text', { x: x(v), y: bottom + 17, 'text-anchor': 'middle' }, fmt(v)));
  g.append(svg('text', { x: x0 + plotW / 2, y: bottom + 36, 'text-anchor': 'middle', class: 'strong' }, `${o.share} of the cache, peak MiB`));
  const held = own.filter(p => !p.late), front = hull(held);
  sideBySide(held, x, y);
  for (const p of own.filter(q => q.late)) Object.assign(p, { px: x0 + plotW - 5, py: y(p.k) });
  let d = '';
  front.forEach((p, i) => { d += (i ? `H${x(p.x).toFixed(1)}V${p.py.toFixed(1)}` : `M${x(p.x).toFixed(1)} ${p.py.toFixed(1)}`); });
  g.append(svg('path', { d: d + `H${(x0 + plotW - 12).toFixed(1)}`, fill: 'none', stroke: 'var(--ink)', 'stroke-width': 1.3 }));
  const order = held.slice().sort((a, b) => a.k - b.k), named = new Set([...order.slice(0, o.best), ...order.slice(-o.worst), ...front, ...own.filter(p => p.late).sort((a, b) => a.k - b.k).slice(0, 2)]);
  const list = [...named].sort((a, b) => b.k - a.k), ys = spreadLabels(list.map(p => p.py), 14, top, bottom);
  for (const p of own) {
    const group = svg('g', { 'data-p': p.r.p }), best = front.includes(p);
    group.append(tip(shape(p.late ? 'diamond' : 'circle', p.px, p.py, best ? 4.6 : 3.6, p.late ? { fill: 'var(--card)', stroke: p.r.colour, 'stroke-width': 1.6 } : { fill: p.r.colour, 'fill-opacity': best ? 1 : 0.45 }),
      runTip(p.r, p.m, [['peak KV', fmt(p.b.v / MIB) + ' MiB'], ['best at this memory', best ? 'yes' : 'no']])));
    const i = list.indexOf(p);
    if (i >= 0) group.append(svg('path', { d: linePath([[p.px + 5, p.py], [x0 + plotW + 12, ys[i]]]), stroke: 'var(--line)', fill: 'none' }),
      svg('text', { x: x0 + plotW + 15, y: ys[i] + 4, class: best ? 'strong' : null }, cut(p.r.policy.replace(' (full first)', ' \u25c7'), Math.floor((width - plotW - 22) / 6)), svg('title', {}, p.r.policy)));
    g.append(group);
  }
}

function paretoOfShares(points) {
  const shares = [...new Set(points.map(p => p.r.share))].sort((a, b) => parseFloat(a) - parseFloat(b));
  for (const p of points) p.late = / \(full first\)$/.test(p.r.policy);
  const box = plot('KL against peak KV memory, a panel a share of the cache', (g, w) => {
    const per = w < 760 ? 1 : shares.length, fw = w / per, h = 520;
    shares.forEach((share, i) => {
      const top = 28 + Math.floor(i / per) * (h + 24), bottom = top + h - 70;
      sharePanel(g, points.filter(p => p.r.share === share), (i % per) * fw, fw, top, bottom, { share, first: i % per === 0, best: 16, worst: 5 });
    });
    return Math.ceil(shares.length / per) * (h + 24) + 10;
  });
  const pick = chooser('show', [['', 'all']].concat([...new Set(points.map(p => p.r.p))].map(p => [String(p), policies[p]])), '', v => {
    for (const node of box.querySelectorAll('[data-p]')) node.classList.toggle('dim', v !== '' && node.dataset.p !== v);
  });
  card('pareto', 'Quality against memory', `Every preset at the same number of kept slots, ${shares.join(', ')} of the dialogue. Down and left is better; the stair is the best that any reached with that much memory or less.`,
    el('div', { class: 'controls' }, pick), box,
    foot('Named: the best and the worst of each panel. Peak KV memory is what the cache reserved at its largest, side arrays included. Diamonds see the full cache first and have its peak; they stand at the right border. Hover a mark for its interval.'));
}

function pareto() {
  const points = RUNS.map(r => ({ r, m: mean(r, 'kl_mean'), b: mean(r, 'peak_kv_bytes') })).filter(o => known(o.m.v) && known(o.b.v))
    .map(o => Object.assign(o, { x: o.b.v / MIB, k: o.m.v }));
  const shared = points.filter(o => o.r.share);
  if (new Set(shared.map(o => o.r.p)).size > MANY) return void paretoOfShares(shared);
  if (!points.length) return void card('pareto', 'Quality against memory', null, el('p', { class: 'empty' }, 'No run with both a KL and a KV size.'));
  const box = plot('KL against peak KV memory', (g, w) => {
    const left = 56, right = 18, top = 26, h = w < 560 ? 330 : 400, bottom = h - 48;
    const y = klScale(points.flatMap(p => [p.k, p.m.lo, p.m.hi]), FLOOR, top, bottom);
    const xs = points.map(p => p.x), least = Math.min(...xs), most = Math.max(...xs);
    const x = most / least > 5 ? logarithmic(least / 1.25, most * 1.18, left, w - right) : linear(Math.max(0, least - 0.15 * (most - least || least)), most + 0.12 * (most - least || most), left, w - right);
    axisY(g, y, left, w - right, { label: 'KL(full \u2016 policy), nat per token, log', labelX: 0, labelY: 12 });
    klStrip(g, y, left, w - right, bottom, true);
    axisX(g, x, bottom, { from: left, to: w - right, n: w < 560 ? 4 : 8, label: 'peak KV memory, MiB' });
    /* Runs of one budget share an x; a small fixed shift by their order keeps them apart. */
    const same = new Map();
    for (const p of points.slice().sort((a, b) => a.r.p - b.r.p)) {
      const key = Math.round(x(p.x) / 6), list = same.get(key) || [];
      list.push(p);
      same.set(key, list);
    }
    const room = Math.min(3.2, w / 260);
    for (const list of same.values()) list.forEach((p, i) => { p.px = x(p.x) + (i - (list.length - 1) / 2) * room; });
    const front = hull(points);
    let d = '';
    front.forEach((p, i) => { d += (i ? `H${p.px.toFixed(1)}V${y(p.k).toFixed(1)}` : `M${p.px.toFixed(1)} ${y(p.k).toFixed(1)}`); });
    g.append(svg('path', { d, fill: 'none', stroke: 'var(--ink)', 'stroke-width': 1.2, opacity: 0.55 }));
    const series = new Map();
    for (const p of points) series.set(p.r.p + '|' + p.r.position, (series.get(p.r.p + '|' + p.r.position) || []).concat(p));
    for (const list of series.values()) {
      const group = svg('g', { 'data-p': list[0].r.p });
      list.sort((a, b) => a.x - b.x);
      group.append(svg('path', { d: linePath(list.map(p => [p.px, y(p.k)])), fill: 'none', stroke: list[0].r.colour, 'stroke-width': 1.3, 'stroke-dasharray': list[0].r.dash, opacity: 0.55 }));
      for (const p of list) {
        const mark = svg('g', {});
        if (known(p.m.lo)) mark.append(svg('line', { x1: p.px, x2: p.px, y1: y(p.m.lo), y2: y(p.m.hi), stroke: p.r.colour, 'stroke-width': 1.2, opacity: 0.7 }));
        mark.append(shape(p.r.shape, p.px, y(p.k), 5.2, p.r.open ? { fill: 'var(--card)', stroke: p.r.colour, 'stroke-width': 1.8 } : { fill: p.r.colour, stroke: 'var(--card)', 'stroke-width': 0.9 }));
        group.append(tip(mark, runTip(p.r, p.m, [['peak KV', fmt(p.x) + ' MiB'], ['best at this memory', front.includes(p) ? 'yes' : 'no']])));
      }
      g.append(group);
    }
    return h;
  });
  card('pareto', 'Quality against memory', 'Down and left is better. The grey stair is the best that any run reached with that much memory or less.',
    policyLegend(box, [...new Set(points.map(p => p.r.p))]), box,
    foot('Bars: 95 % bootstrap intervals over dialogues. Peak KV memory is what the cache reserved at its largest, side arrays included. Runs of one budget are set apart by a few pixels. Lines join the budgets of one policy and mode.'));
}

/* ---- tables ---- */

/* columns: {name, unit, text, get(row) -> {v, lo, hi, text, node, sort}, format}. */
function table(rows, columns, start) {
  const body = el('tbody');
  let by = start ? start.column : 0, down = start ? start.down : false;
  const heads = columns.map((c, i) => el('th', { class: c.text ? 'text' : null, scope: 'col' },
    el('button', { type: 'button', title: 'Sort by ' + c.name, on: { click: () => { down = by === i ? !down : false; by = i; fill(); } } }, c.name), c.unit ? el('small', {}, c.unit) : null));
  const key = row => { const g = columns[by].get(row); return g.sort !== undefined ? g.sort : g.v; };
  function fill() {
    const order = rows.map((row, i) => [key(row), i, row]).sort((a, b) => {
      const na = a[0] === null || a[0] === undefined, nb = b[0] === null || b[0] === undefined;
      if (na || nb) return na - nb || a[1] - b[1];
      const c = a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0;
      return (down ? -c : c) || a[1] - b[1];
    });
    body.replaceChildren(...order.map(o => el('tr', {}, columns.map(c => {
      const g = c.get(o[2]);
      return el('td', { class: (c.text ? 'text ' : '') + (c.wrap ? 'wrap' : '') }, g.node || null, g.text !== undefined ? g.text : g.node ? null : (c.format || fmt)(g.v),
        known(g.lo) ? el('small', {}, `${(c.format || fmt)(g.lo)} to ${(c.format || fmt)(g.hi)}`) : null, g.flag ? el('span', { class: 'flag' }, g.flag) : null);
    }))));
    heads.forEach((h, i) => (i === by ? h.setAttribute('aria-sort', down ? 'descending' : 'ascending') : h.removeAttribute('aria-sort')));
  }
  fill();
  const box = el('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'table' }, el('table', {}, el('thead', {}, el('tr', {}, heads)), body));
  const hint = el('p', { class: 'foot', hidden: '' }, `${fmt(rows.length)} rows and ${columns.length} columns: the table scrolls.`);
  new ResizeObserver(() => requestAnimationFrame(() => { hint.hidden = box.scrollHeight <= box.clientHeight + 2 && box.scrollWidth <= box.clientWidth + 2; })).observe(box);
  return el('div', {}, box, hint);
}
const policyColumn = { name: 'policy', text: true, get: r => ({ sort: r.name, node: icon(r.shape, r.colour, r.open), text: cutName(r.name, 34) }) };
const modeColumn = { name: 'position', text: true, get: r => ({ sort: r.position, node: dashIcon(r.colour, r.dash, 18), text: r.position }) };
const budgetColumn = { name: 'budget', unit: 'tok', get: r => ({ v: r.budget_tokens || null }) };
const stat = (name, unit, column, protocol, scale = 1) => ({ name, unit, get: r => {
  const m = mean(r, column, protocol), s = x => (known(x) ? x * scale : null);
  return { v: s(m.v), lo: s(m.lo), hi: s(m.hi), flag: column === 'kl_mean' && unresolved(m.v) ? 'not resolved' : null };
} });
const turnStat = (name, unit, column, protocol, pick = 'v', scale = 1) => ({ name, unit, get: r => {
  const v = turnMean(r, column, protocol)[pick];
  return { v: known(v) ? v * scale : null };
} });

function mainTable() {
  const n = { name: 'n', get: r => ({ v: mean(r, 'kl_mean').n || mean(r, 'nll').n }) };
  const views = {
    Quality: [policyColumn, modeColumn, budgetColumn, n, stat('KL', 'nat', 'kl_mean', TF), stat('KL p99', 'nat', 'kl_p99', TF), stat('PPL ratio', 'to full', 'ppl_ratio', TF), stat('PPL', '', 'ppl', TF),
      stat('top-1', '% agree', 'top1', TF, 100), stat('health', '0\u2013100', 'health_mean', TF), stat('looped', '% of turns', 'looped_rate', FR, 100)],
    'Space and time': [policyColumn, modeColumn, budgetColumn, stat('peak KV', 'MiB', 'peak_kv_bytes', TF, 1 / MIB), stat('footprint', 'of full', 'footprint', TF), stat('evictions', 'per dialogue', 'evictions', TF),
      stat('evict', 'ms total', 'evict_ms_total', FR), stat('TTFT', 'ms median', 'ttft_ms_median', FR), stat('TPOT', 'ms median', 'tpot_ms_median', FR), stat('prefill', 'tok/s', 'prefill_tok_per_s', FR),
      stat('decode', 'tok/s', 'decode_tok_per_s', FR), stat('peak RSS', 'MiB', 'peak_rss_bytes', FR, 1 / MIB)],
  };
  const holder = el('div'), buttons = Object.keys(views).map(k => el('button', { type: 'button', on: { click: () => show(k) } }, k));
  function show(k) {
    buttons.forEach(b => b.setAttribute('aria-pressed', b.textContent === k));
    holder.replaceChildren(table(RUNS, views[k], k === 'Quality' ? { column: 4 } : { column: 0 }));
  }
  show('Quality');
  card('table', 'All runs', 'Click a column to sort. Under each mean stands its 95 % interval over dialogues.', el('div', { class: 'controls' }, buttons), holder,
    foot('Quality is teacher-forced; loops and times are free-running where that protocol ran. ' + (FLOOR > 0 ? `Noise floor: KL ${fmt(FLOOR)} nat, the full cache against itself with inputs moved by one rounding step; an effect under ten times that is marked \u201cnot resolved\u201d.` : 'The noise floor was not measured, so small KL values cannot be told from rounding.')))
    .classList.add('long');
}

/* ---- P2: along the dialogue ---- */

const C = { turn: 0, n: 1, end: 2, kl: 3, lo: 4, hi: 5, nll: 6, ref: 7, top1: 8, live: 9, health: 10, ev: 11 };

function turnPanel(g, w, lines, x, o) {
  const left = 56, right = w - 18;
  const y = o.kl ? klScale(lines.flatMap(l => l.rows.flatMap(r => [r[C.kl]])), FLOOR, o.top, o.bottom) : linear(o.lo, o.hi, o.bottom, o.top);
  for (const b of o.bands || []) g.append(svg('rect', { x: left, y: y(b[1]), width: right - left, height: y(b[0]) - y(b[1]), fill: 'var(--wash)', opacity: b[2] }));
  axisY(g, y, left, right, { n: 4, ticks: o.ticks, label: o.label, labelX: 0, labelY: o.top - 9 });
  if (o.kl) klStrip(g, y, left, right, o.bottom);
  for (const mark of o.rules || []) {
    g.append(svg('line', { x1: left, x2: right, y1: y(mark[0]), y2: y(mark[0]), stroke: 'var(--ink)', 'stroke-dasharray': mark[2], opacity: 0.6 }),
      svg('text', { x: right - 3, y: y(mark[0]) - 5, 'text-anchor': 'end' }, mark[1]));
  }
  for (const l of lines) {
    if (o.kl) g.append(svg('path', { d: bandPath(l.rows.map(r => [x(r[C.turn]), y(known(r[C.lo]) ? r[C.lo] : NaN), y(known(r[C.hi]) ? r[C.hi] : NaN)]).filter(p => known(p[1]))), fill: l.run.colour, opacity: 0.13 }));
    g.append(svg('path', { d: linePath(l.rows.map(r => (known(r[o.column]) ? [x(r[C.turn]), y(r[o.column] * (o.scale || 1))] : null))), fill: 'none', stroke: l.run.colour, 'stroke-width': 1.8, 'stroke-dasharray': l.dash }));
    const every = Math.max(1, Math.ceil(l.rows.length / Math.max(4, (right - left) / 60)));
    l.rows.forEach((r, i) => { if (i % every === Math.floor(every / 2) && known(r[o.column])) g.append(shape(l.run.shape, x(r[C.turn]), y(r[o.column] * (o.scale || 1)), 3.6, { fill: l.run.colour, stroke: 'var(--card)', 'stroke-width': 0.7 })); });
  }
}

function curves() {
  const DASHES = [null, '7 3', '2.5 2.5'];
  const rollback = RUNS.find(r => modeKind(r.position) === 'rollback' && /attention|attn|gist_recent/.test(r.policy)) || RUNS.find(r => !r.baseline) || RUNS[0];
  const other = RUNS.find(r => r !== rollback && r.policy === rollback.policy && r.budget_bytes === rollback.budget_bytes && modeKind(r.position) === 'rerotate') || RUNS.find(r => r !== rollback && !r.baseline);
  const state = { runs: [rollback.i, other ? other.i : -1, -1], dialogue: 'mean', protocol: TF };
  const has = p => D.curves.some(c => c.protocol === p);
  if (!has(TF)) state.protocol = FR;
  if (!D.curves.length) return void card('turns', 'Along the dialogue', null, el('p', { class: 'empty' }, 'No turns were recorded.'));
  const find = i => D.curves.find(c => c.run === i && c.protocol === state.protocol && String(c.dialogue ?? 'mean') === state.dialogue);
  const box = plot('KL, live memory, health and evictions per turn', (g, w) => {
    const lines = state.runs.map((i, k) => ({ c: i >= 0 ? find(i) : null, run: RUNS[i], dash: DASHES[k] })).filter(l => l.c).map(l => Object.assign(l, { rows: l.c.rows }));
    if (!lines.length) {
      g.append(svg('text', { x: w / 2, y: 40, 'text-anchor': 'middle' }, 'No such turns: choose another run, dialogue or protocol.'));
      return 70;
    }
    const turns = lines.flatMap(l => l.rows.map(r => r[C.turn])), left = 56;
    const x = linear(Math.min(...turns), Math.max(...turns), left + 6, w - 26);
    let top = 26;
    const anyKl = lines.some(l => l.rows.some(r => known(r[C.kl])));
    if (anyKl) {
      turnPanel(g, w, lines, x, { kl: true, column: C.kl, top, bottom: top + 150, label: 'KL, nat per token, log' });
      top += 150 + 38;
    }
    const live = lines.flatMap(l => l.rows.map(r => r[C.live])).filter(known), trigger = M.trigger && known(M.trigger.bytes) && M.trigger.bytes > 0 ? M.trigger.bytes / MIB : null;
    const most = Math.max(...live, 1) / MIB, rules = [];
    if (trigger !== null && trigger < most * 3) rules.push([trigger, `trigger ${fmt(trigger)} MiB`, '5 3']);
    for (const b of new Set(lines.filter(l => !l.run.baseline).map(l => l.run.budget_bytes / MIB)))
      if (known(b) && b < most * 3 && (trigger === null || Math.abs(b - trigger) > 0.08 * most)) rules.push([b, `budget ${fmt(b)} MiB`, '1.5 2.5']);
    turnPanel(g, w, lines, x, { column: C.live, scale: 1 / MIB, lo: 0, hi: Math.max(most, ...rules.map(r => r[0])) * 1.14, top, bottom: top + 104, label: 'live KV memory, MiB', rules });
    top += 104 + 38;
    turnPanel(g, w, lines, x, { column: C.health, lo: 0, hi: 100, ticks: [0, 60, 80, 90, 100], top, bottom: top + 118, label: 'health, 0 to 100', bands: [[80, 100, 0.6], [90, 100, 1]] });
    top += 118 + 30;
    g.append(svg('text', { x: 0, y: top - 4, class: 'strong' }, 'evictions per turn (taller: more)'));
    const peak = Math.max(1, ...lines.flatMap(l => l.rows.map(r => r[C.ev] || 0)));
    for (const l of lines) {
      g.append(svg('line', { class: 'grid', x1: left, x2: w - 18, y1: top + 20.5, y2: top + 20.5 }), shape(l.run.shape, left - 12, top + 14, 4, { fill: l.run.colour }));
      for (const r of l.rows) if (r[C.ev] > 0) g.append(svg('rect', { x: x(r[C.turn]) - 1.5, y: top + 20 - Math.max(3, 16 * r[C.ev] / peak), width: 3, height: Math.max(3, 16 * r[C.ev] / peak), fill: l.run.colour }));
      top += 24;
    }
    axisX(g, x, top + 2, { from: left, to: w - 18, ticks: x.ticks(w < 560 ? 5 : 12).filter(Number.isInteger), label: 'turn, from 0' });
    const steps = lines[0].rows, cursor = svg('line', { y1: 20, y2: top, stroke: 'var(--ink)', opacity: 0 });
    g.append(cursor);
    for (const r of steps) {
      const half = (w - 80) / Math.max(1, steps.length) / 2, hit = svg('rect', { x: x(r[C.turn]) - half, y: 20, width: 2 * half, height: top - 20, fill: 'transparent' });
      const said = [`turn ${r[C.turn]}`, ['ends at token', fmt(r[C.end])]];
      for (const l of lines) {
        const q = l.rows.find(s => s[C.turn] === r[C.turn]);
        if (q) said.push(runText(l.run), ['KL', `${fmt(q[C.kl])}` + (known(q[C.lo]) ? ` (${fmt(q[C.lo])} to ${fmt(q[C.hi])})` : '')], ['live, health, evictions', `${fmt(q[C.live] / MIB)} MiB, ${fmt(q[C.health])}, ${fmt(q[C.ev])}`], ['n', q[C.n]]);
      }
      tip(hit, said);
      const on = () => { cursor.setAttribute('x1', x(r[C.turn])); cursor.setAttribute('x2', x(r[C.turn])); cursor.setAttribute('opacity', 0.35); };
      for (const type of ['mouseenter', 'focus']) hit.addEventListener(type, on);
      for (const type of ['mouseleave', 'blur']) hit.addEventListener(type, () => cursor.setAttribute('opacity', 0));
      g.append(hit);
    }
    return top + 42;
  });
  const legend = el('ul', { class: 'legend' });
  const redraw = () => {
    legend.replaceChildren(...state.runs.map((i, k) => (i < 0 ? null : el('li', {}, dashIcon(RUNS[i].colour, DASHES[k]), icon(RUNS[i].shape, RUNS[i].colour, RUNS[i].open), runText(RUNS[i])))).filter(Boolean));
    box.redraw();
  };
  const dialogues = [...new Set(D.curves.map(c => c.dialogue))].filter(d => d !== null).sort((a, b) => a - b);
  const controls = el('div', { class: 'controls' },
    [0, 1, 2].map(k => chooser(['run', 'and', 'and'][k], (k ? [['-1', 'none']] : []).concat(runOptions()), String(state.runs[k]), v => { state.runs[k] = +v; redraw(); })),
    chooser('dialogue', [['mean', `mean of ${M.dialogues.length}`], ...dialogues.map(d => [String(d), cut(M.dialogues[d].id, 40)])], 'mean', v => { state.dialogue = v; redraw(); }),
    has(TF) && has(FR) ? chooser('protocol', [['0', 'teacher-forced'], ['1', 'free-running']], String(state.protocol), v => { state.protocol = +v; redraw(); }) : null);
  card('turns', 'Along the dialogue', 'Up to three runs, turn by turn. Colour is the position mode, dash the order of choice.', controls, legend, box,
    foot(`Shaded: 95 % bootstrap over dialogues for the mean curve. Health bands at 90, 80 and 60.` + (dialogues.length < M.dialogues.length ? ` Single curves are embedded for the first ${dialogues.length} of ${M.dialogues.length} dialogues; turns.jsonl has all.` : '')));
  redraw();
}
