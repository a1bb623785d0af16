/* The report's two figures with statistics of their own: recall of planted facts beside the full cache's, and health
 * against KL. Counts, shares and correlations come from the data block. */
'use strict';

/* ---- runs as rows: a policy's name, one row per position mode ---- */

const ROW = 17, GROUP_GAP = 9, MODE_W = 74;

/* narrow: the name stands above its rows, else to their left. */
function groupRows(runs, narrow) {
  const groups = [];
  for (const r of runs) {
    const key = r.p + '|' + (r.baseline ? '' : r.budget_bytes);
    let group = groups.find(o => o.key === key);
    if (!group) groups.push(group = { key, r, rows: [] });
    group.rows.push({ r });
  }
  let y = 0;
  for (const group of groups) {
    group.y = y;
    y += narrow ? 18 : 0;
    for (const row of group.rows) {
      row.y = y + ROW / 2;
      y += ROW;
    }
    group.end = y;
    y += GROUP_GAP;
  }
  const height = y - GROUP_GAP;
  return { groups, rows: groups.flatMap(o => o.rows), height, spans: narrow ? groups.map(o => [o.y + 18, o.end]) : [[0, height]] };
}

/* An upright line beside the rows, from `above` the first of them; it leaves out the names that stand between. */
function upright(g, layout, top, x, above, attrs) {
  layout.spans.forEach(([a, b], i) => g.append(svg('line', Object.assign({ x1: x, x2: x, y1: top + a - (i ? 0 : above), y2: top + b }, attrs))));
}

const halo = attrs => Object.assign({ stroke: 'var(--card)', 'stroke-width': 4, 'paint-order': 'stroke', 'stroke-linejoin': 'round' }, attrs);

function drawRowNames(g, layout, o) {
  for (const group of layout.groups) {
    const name = runText(Object.assign({}, group.r, { position: '' })).replace(/, (,|$)/, '$1'), head = name.split(/[ ,]/)[0], tail = name.slice(head.length).replace(/^[ ,]+/, '');
    const y = o.top + group.y + (o.narrow ? 13 : ROW / 2 + 4), two = !o.narrow && tail && group.rows.length > 1;
    g.append(shape(group.r.shape, 7, y - 4, 4.4, group.r.open ? { fill: 'none', stroke: 'var(--soft)', 'stroke-width': 1.5 } : { fill: 'var(--soft)' }),
      svg('text', halo({ x: 18, y, class: 'strong' }), two ? cut(head, 27) : cutName(name, o.narrow ? Math.floor((o.right - 18) / 6.6) : 27), svg('title', {}, policies[group.r.p])));
    if (two) g.append(svg('text', { x: 18, y: y + ROW }, cut(tail, 28)));
    if (o.rules !== false && group !== layout.groups[0]) g.append(svg('line', { class: 'grid', x1: 0, x2: o.right, y1: Math.round(o.top + group.y - GROUP_GAP / 2) + 0.5, y2: Math.round(o.top + group.y - GROUP_GAP / 2) + 0.5 }));
    for (const row of group.rows) g.append(svg('text', { x: o.modeX, y: o.top + row.y + 4 }, row.r.position));
  }
}

/* Interval and mark of one run, on a horizontal scale. */
function rowMark(r, x, y, v, lo, hi) {
  const mark = svg('g', {});
  if (known(lo) && known(hi)) mark.append(svg('line', { x1: x(lo), x2: Math.max(x(hi), x(lo) + 1), y1: y, y2: y, stroke: r.colour, 'stroke-width': 2, 'stroke-dasharray': r.dash, opacity: 0.75 }));
  mark.append(shape(r.shape, x(v), y, 4.6, r.open ? { fill: 'var(--card)', stroke: r.colour, 'stroke-width': 1.8 } : { fill: r.colour, stroke: 'var(--card)', 'stroke-width': 0.9 }));
  return mark;
}

/* ---- P6: recall of planted facts ---- */

const outOf = (right, n) => (n ? `${fmt(right)} of ${fmt(n)}` : '\u2013');
const lagText = v => (v >= 1024 ? v / 1024 + 'k' : String(v));
const lagRange = c => (c[1] === 0 ? '<\u2009' + lagText(c[2]) : c[2] === null ? '\u2265\u2009' + lagText(c[1]) : lagText(c[1]) + '\u2013' + lagText(c[2]));

function recallTip(r, R) {
  const s = R.runs[r.i];
  return [runText(r), ['right', outOf(s.right, s.answered) + (s.answered ? ` (${percent(s.rate[0])})` : '')], ['95 %', known(s.rate[1]) ? `${percent(s.rate[1])} to ${percent(s.rate[2])}` : 'none'],
    ...(s.paired ? [['full cache, same questions', outOf(s.full_right, s.paired)], ['lost against it, won', `${s.lost}, ${s.won}`]] : []), ['the fact\u2019s tokens still held', percent(s.survival)],
    ...(s.answered < s.asked ? [['without a result', s.asked - s.answered], s.failure || ''] : [])];
}

function recallDots(g, layout, R, o) {
  const x = linear(0, 1, o.left, o.right), bottom = o.top + layout.height + 4, full = R.full === null ? null : R.runs[R.full];
  g.append(svg('text', { x: o.left, y: o.top - 48, class: 'strong' }, 'questions answered right'));
  for (const v of [0, 0.25, 0.5, 0.75, 1]) upright(g, layout, o.top, Math.round(x(v)) + 0.5, 0, { class: 'grid' });
  const rule = (v, text, y, attrs) => {
    const end = v > 0.55;
    upright(g, layout, o.top, x(v), o.top - y - 4 + layout.spans[0][0], Object.assign({ stroke: 'var(--ink)' }, attrs));
    g.append(svg('text', halo({ x: x(v) + (end ? 3 : -3), y, 'text-anchor': end ? 'end' : 'start' }), text));
  };
  if (full && full.answered) rule(full.rate[0], `full cache (A_full) ${percent(full.rate[0])}`, o.top - 32, { 'stroke-width': 1.6 });
  const short = o.right - o.left < 240;
  rule(R.chance, short ? 'chance' : `chance ${percent(R.chance)}`, o.top - 18, { 'stroke-dasharray': '1.5 2.5' });
  rule(R.guard, short ? 'guard' : `guard ${percent(R.guard)}`, o.top - 18, { stroke: 'var(--maybe)', 'stroke-width': 1.4, 'stroke-dasharray': '6 3' });
  const c1 = o.right + 46, c2 = o.right + 92;
  g.append(svg('text', { x: c1, y: o.top - 18, 'text-anchor': 'end' }, 'right'), svg('text', { x: c2, y: o.top - 18, 'text-anchor': 'end' }, 'held'));
  for (const { r, y } of layout.rows) {
    const s = R.runs[r.i];
    if (s.answered) g.append(tip(rowMark(r, x, o.top + y, s.rate[0], s.rate[1], s.rate[2]), recallTip(r, R)));
    g.append(svg('text', { x: c1, y: o.top + y + 4, 'text-anchor': 'end', class: 'strong' }, s.answered ? `${s.right}/${s.answered}` : 'none'),
      svg('text', { x: c2, y: o.top + y + 4, 'text-anchor': 'end' }, percent(s.survival).replace('\u202f', '')));
  }
  axisX(g, x, bottom, { from: o.left, to: o.right, ticks: [0, 0.25, 0.5, 0.75, 1], format: v => 100 * v + '\u202f%' });
}

/* Both the whole and the column: one lucky question in a column is no competence. */
function inGuard(R, c) {
  const full = R.full === null ? null : R.runs[R.full];
  return Boolean(full && full.answered && full.rate[0] >= R.guard && c[3] > 0 && c[4] / c[3] >= R.guard);
}

/* Cells: right / asked by place and lag; coloured by the difference to the full cache where that passes its guard. */
function recallGrid(g, layout, R, o) {
  const cw = (o.right - o.left) / R.columns.length, n = R.columns.length, mid = i => o.left + (i + 0.5) * cw;
  g.append(svg('defs', {}, svg('pattern', { id: 'aside', width: 6, height: 6, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(45)' }, svg('rect', { width: 6, height: 6, fill: 'var(--wash)' }), svg('rect', { width: 1.2, height: 6, fill: 'var(--line)' }))));
  g.append(svg('text', { x: o.left, y: o.top - 48, class: 'strong' }, 'by where the fact was told, and tokens since'));
  for (let a = 0, b; a < n; a = b) {
    for (b = a + 1; b < n && R.columns[b][0] === R.columns[a][0];) b++;
    g.append(svg('line', { class: 'axis', x1: o.left + a * cw + 3, x2: o.left + b * cw - 3, y1: o.top - 28.5, y2: o.top - 28.5 }), svg('text', { x: o.left + (a + b) / 2 * cw, y: o.top - 33, 'text-anchor': 'middle' }, R.columns[a][0]));
  }
  R.columns.forEach((c, i) => g.append(svg('text', { x: mid(i), y: o.top - 16, 'text-anchor': 'middle', style: cw < 48 ? 'font-size: 8.5px' : null }, lagRange(c))));
  for (const { r, y } of layout.rows) {
    R.runs[r.i].cells.forEach(([answered, right, survival], i) => {
      const c = R.columns[i], judged = inGuard(R, c) && answered > 0, d = judged && r.i !== R.full ? right / answered - c[4] / c[3] : 0;
      const cell = svg('g', {}), tone = d < 0 ? 'var(--near)' : 'var(--far)', fill = !judged ? 'url(#aside)' : d === 0 ? 'var(--wash)' : `color-mix(in srgb, ${tone} ${Math.round(14 + 46 * Math.min(1, Math.abs(d)))}%, var(--card))`;
      cell.append(svg('rect', { x: o.left + i * cw + 1, y: o.top + y - ROW / 2 + 1, width: cw - 2, height: ROW - 2, rx: 2, fill }));
      if (d !== 0) cell.append(shape(d < 0 ? 'down' : 'up', o.left + i * cw + 8, o.top + y, 3.2, { fill: tone }));
      cell.append(svg('text', { x: mid(i) + (d !== 0 ? 5 : 0), y: o.top + y + 4, 'text-anchor': 'middle', class: judged ? 'strong' : null }, answered ? `${right}/${answered}` : '\u2013'));
      g.append(tip(cell, [runText(r), ['told', c[0]], ['tokens since', c[2] === null ? `${fmt(c[1])} or more` : `${fmt(c[1])} to ${fmt(c[2] - 1)}`], ['right', outOf(right, answered)], ['full cache', outOf(c[4], c[3])],
        ['the fact\u2019s tokens still held', percent(survival)], ...(judged ? [] : [`not compared: A_full is under ${percent(R.guard)}`])]));
    });
  }
}

function recallGuard(R, full) {
  const text = !full || !full.answered ? 'No full cache answered these questions, so there is nothing to hold a policy against.'
    : full.rate[0] < R.guard ? `The full cache, with every token in sight, answers ${outOf(full.right, full.answered)} (${percent(full.rate[0])}); guessing gives ${percent(R.chance)}. Under ${percent(R.guard)} a miss says that this model cannot do the task, not that a policy lost the fact. The numbers are shown, and rank no policy.`
      : null;
  return text ? el('p', { class: 'guard' }, verdictIcon('INCONCLUSIVE'), el('span', {}, el('b', {}, 'These numbers are no verdict. '), text))
    : el('p', { class: 'guard' }, verdictIcon('PASS'), el('span', {}, el('b', {}, 'The guard holds. '), `The full cache answers ${outOf(full.right, full.answered)} (${percent(full.rate[0])}), at least ${percent(R.guard)}: a miss can be the policy\u2019s.`));
}

/* What an answer could reach, and what it used: means over the questions. Folders from before there were such numbers
 * have none. */
function diagnostics(R, list) {
  const all = r => R.runs[r.i].diagnostics || {}, full = R.full === null ? {} : R.runs[R.full].diagnostics || {};
  const rows = list.filter(r => known(all(r).drift));
  if (!rows.length) return null;
  const s = (name, unit, key, scale) => ({ name, unit, get: r => ({ v: known(all(r)[key]) ? all(r)[key] * (scale || 1) : null }) });
  return el('div', {}, el('h3', {}, 'Reach and use of the fact'),
    table(rows, [policyColumn, modeColumn, budgetColumn, s('erased', '% of the fact, in no head', 'erased', 100), s('consensus', 'of heads', 'head_consensus'), s('utilisation', '% of the answer\u2019s attention', 'utilisation', 100),
      s('drift', '1 \u2212 cos to full', 'drift'), s('key channels', '% carry 90 %', 'key_channels_90', 100)], { column: 6 }),
    foot(`Means over questions, read while the answer\u2019s beginning runs (docs/metrics.md, Diagnostics). Utilisation: attention that goes to the told value\u2019s tokens, over layers, heads and rows; the full cache gives ${known(full.utilisation) ? fmt(100 * full.utilisation) + ' %' : 'no number'}. Drift: how far the hidden state at the answer stands from the full cache\u2019s, mean over layers. A fact that is held and not used is no loss of the cache. Key channels: the share that carries nine tenths of the queries\u2019 score.`));
}

function recall() {
  const R = D.recall;
  if (!R) return; /* a run without planted facts */
  const list = RUNS.filter(r => R.runs[r.i]), full = R.full === null ? null : R.runs[R.full], marks = shape => svg('svg', { width: 14, height: 12, 'aria-hidden': 'true' }, shape);
  const box = plot('Recall of planted facts, per policy and position mode', (g, w) => {
    const narrow = w < 800, layout = groupRows(list, narrow), top = 62, modeX = narrow ? 18 : 204, left = modeX + MODE_W;
    const gridW = narrow ? w - left : Math.min(96 * R.columns.length, 0.42 * w - 40), dotsRight = (narrow ? w : w - gridW - 34) - 96;
    drawRowNames(g, layout, { top, narrow, modeX, right: w });
    recallDots(g, layout, R, { top, left, right: dotsRight });
    if (!narrow) {
      recallGrid(g, layout, R, { top, left: w - gridW, right: w });
      return top + layout.height + 26;
    }
    const second = top + layout.height + 34 + 68;
    drawRowNames(g, layout, { top: second, narrow, modeX, right: w });
    recallGrid(g, layout, R, { top: second, left, right: w });
    return second + layout.height + 6;
  });
  const judged = R.columns.some(c => inGuard(R, c)), aside = R.columns.some(c => !inGuard(R, c)), missing = list.filter(r => R.runs[r.i].answered < R.runs[r.i].asked);
  const legend = el('ul', { class: 'legend' }, MODES.filter(m => list.some(r => modeKind(r.position) === m)).map(m => el('li', {}, dashIcon(modeColour(m), DASH[m]), m)),
    judged ? [el('li', {}, marks(shape('down', 7, 6, 4, { fill: 'var(--near)' })), 'fewer than the full cache'), el('li', {}, marks(shape('up', 7, 6, 4, { fill: 'var(--far)' })), 'more')] : null,
    aside ? el('li', {}, marks(svg('path', { d: 'M0 6 6 0M2 12 14 0M8 12 14 6', stroke: 'var(--faint)', 'stroke-width': 1.4 })), !full || !full.answered ? 'not compared: no A_full' : `not compared: A_full${judged ? ' of the column' : ''} under ${percent(R.guard)}`) : null);
  const each = R.n_dialogues > 1 ? `95 % percentile bootstrap over ${R.n_dialogues} dialogues (${fmt(D.draws)} draws)` : 'Wilson\u2019s 95 % interval, which takes the questions of the one dialogue as independent';
  card('recall', 'Recall of planted facts', `${count(R.n_questions, 'question')} in ${count(R.n_dialogues, 'dialogue')}, asked after the conversation has passed the trigger. The right value and values told of other things are scored as the answer; a hit is the right one ranked first.`,
    recallGuard(R, full), legend, box,
    foot(`Bars: ${each}. Solid line: the full cache on the same questions; dotted: chance, one over the number of values; dashed: what A_full must reach. Held: share of the told value\u2019s tokens that are still in the cache, over layers and heads; a miss with everything held is not a missing token. ` +
      (missing.length ? `${count(missing.reduce((n, r) => n + R.runs[r.i].asked - R.runs[r.i].answered, 0), 'answer')} of ${count(missing.length, 'run')} have no result (${cut(R.runs[missing[0].i].failure || 'no reason', 90)}) and count neither as hit nor as miss. ` : '') + 'recall.jsonl has every question.'),
    diagnostics(R, list))
    .classList.add('long');
}

/* ---- P8: does health follow the loss? ---- */

const TRACK_ALL = -0.7, TRACK_ALL_END = -0.5, TRACK_WITHIN = -0.4; /* evaluation.md 3.13, fixed before any run */

function trackingWord(t) {
  const across = known(t.all[0]) && t.all[0] <= TRACK_ALL && known(t.all[2]) && t.all[2] < TRACK_ALL_END, within = known(t.median) && t.median <= TRACK_WITHIN;
  if (!known(t.all[0])) return 'too few turns, or no spread';
  return across && within ? 'orders the runs and follows their turns' : across ? 'tells runs apart, does not follow their turns' : within ? 'follows turns, does not order the runs' : 'does neither';
}

function trackingScatter(g, w, points, wanted) {
  const modes = MODES.filter(m => points.some(p => modeKind(p.r.position) === m)), left = 54;
  let per = Math.max(1, Math.min(modes.length, Math.floor((w - left) / 150)));
  while (modes.length % per) per--; /* no hole in the last row */
  const fw = (w - left) / per, h = per === modes.length && w > 400 ? wanted : 310;
  modes.forEach((m, k) => {
    const x0 = left + (k % per) * fw, x1 = x0 + fw - (k % per === per - 1 ? 2 : 20), top = 42 + Math.floor(k / per) * (h + 6), bottom = top + h - 90, first = k % per === 0;
    const own = points.filter(p => modeKind(p.r.position) === m), x = linear(0, 100, x0 + 6, x1 - 6), y = klScale(points.map(p => p.kl), FLOOR, top, bottom);
    axisY(g, y, x0, x1, { quiet: !first, label: k === 0 ? 'KL(full \u2016 policy), nat per token, log' : null, labelX: 0, labelY: 12 });
    if (y.strip) g.append(svg('rect', { x: x0, y: bottom - y.strip, width: x1 - x0, height: y.strip, fill: 'var(--wash)' }), first ? svg('text', { x: x0 + 5, y: bottom - y.strip / 2 + 4 }, 'not resolved') : '');
    g.append(svg('text', { x: x0 + 2, y: top - 8, class: 'name' }, m));
    const curve = Array.from({ length: 200 }, (_, i) => (i + 0.5) / 2).map(v => { const kl = -Math.log(v / 100); return kl >= y.lo && kl <= y.hi ? [x(v), y(kl)] : null; });
    g.append(svg('path', { d: linePath(curve), fill: 'none', stroke: 'var(--ink)', 'stroke-width': 1.3, 'stroke-dasharray': '4 3', opacity: 0.65 }));
    for (const p of own) {
      const mark = svg('g', { 'data-p': p.r.p }, shape(p.r.shape, x(p.h), y(p.kl), 3.4, p.r.open ? { fill: 'none', stroke: p.r.colour, 'stroke-width': 1.3 } : { fill: p.r.colour, 'fill-opacity': 0.72, stroke: 'var(--card)', 'stroke-width': 0.6 }));
      g.append(tip(mark, [runText(p.r), ['dialogue, turn', `${p.d}, ${p.t}`], ['health at its end', fmt(p.h)], ['KL', `${fmt(p.kl)} nat`], ...(unresolved(p.kl) ? ['not resolved: under 10\u00d7 the noise floor'] : [])]));
    }
    axisX(g, x, bottom, { from: x0, to: x1, ticks: fw < 260 ? [0, 50, 100] : [0, 20, 40, 60, 80, 100], label: k % per === Math.floor((per - 1) / 2) ? 'health at the turn\u2019s end, uncalibrated' : null });
  });
  return Math.ceil(modes.length / per) * (h + 6) + 4;
}

const trackingRows = t => groupRows(RUNS.filter(r => t.runs[r.i]), true);

function trackingRuns(g, w, t) {
  const layout = trackingRows(t), top = 40, left = 18 + MODE_W, right = w - 88, bottom = top + layout.height + 4, x = linear(-1, 1, left, right);
  for (const [a, b] of layout.spans) g.append(svg('rect', { x: left, y: top + a, width: x(TRACK_WITHIN) - left, height: b - a, fill: 'var(--wash)' }));
  for (const v of [-1, -0.5, 0, 0.5, 1]) upright(g, layout, top, Math.round(x(v)) + 0.5, 0, { class: v ? 'grid' : 'axis' });
  if (known(t.median)) {
    const y = top - 28, end = t.median > 0.2;
    upright(g, layout, top, x(t.median), layout.spans[0][0] + 24, { stroke: 'var(--ink)', 'stroke-width': 1.4, 'stroke-dasharray': '5 3' });
    g.append(svg('text', halo({ x: x(t.median) + (end ? 4 : -4), y, 'text-anchor': end ? 'end' : 'start', class: 'strong' }), `median ${fmt(t.median)}`));
  }
  g.append(svg('text', halo({ x: left, y: top - 12 }), 'shaded: follows'), svg('text', { x: w - 44, y: top - 12, 'text-anchor': 'end' }, 'rho'), svg('text', { x: w, y: top - 12, 'text-anchor': 'end' }, 'turns'));
  drawRowNames(g, layout, { top, narrow: true, modeX: 18, right: w, rules: false });
  for (const { r, y } of layout.rows) {
    const [rho, lo, hi, n, n_dialogues] = t.runs[r.i];
    if (known(rho)) g.append(tip(rowMark(r, x, top + y, rho, lo, hi), [runText(r), ['rho', fmt(rho)], ['95 %', known(lo) ? `${fmt(lo)} to ${fmt(hi)}` : 'none'], ['turns', n], ['dialogues', n_dialogues]]));
    g.append(svg('text', { x: w - 44, y: top + y + 4, 'text-anchor': 'end', class: 'strong' }, known(rho) ? rho.toFixed(2).replace('-', MINUS) : '\u2013'), svg('text', { x: w, y: top + y + 4, 'text-anchor': 'end' }, n));
  }
  axisX(g, x, bottom, { from: left, to: right, ticks: [-1, -0.5, 0, 0.5, 1] });
  return bottom + 26;
}

function tracking() {
  const T = D.tracking;
  if (!T) return; /* no teacher-forced turn of a run that evicted */
  const PAIRS = [['same', 'the same turn'], ['next', 'the turn after']];
  let pair = 'same';
  const points = () => D.points.map(p => ({ r: RUNS[p[0]], d: M.dialogues[p[1]].id, t: p[2], h: p[3], kl: pair === 'same' ? p[4] : p[5] })).filter(p => known(p.kl));
  const box = plot('Health against KL, one mark per turn', (g, w) => trackingScatter(g, w, points(), Math.max(300, Math.min(720, trackingRows(T.same).height - 150))));
  const rhos = plot('Rank correlation of health and KL within each run', (g, w) => trackingRuns(g, w, T[pair]));
  const cell = (v, lo, hi) => el('td', {}, fmt(v), known(lo) ? el('small', {}, `${fmt(lo)} to ${fmt(hi)}`) : null);
  const numbers = el('table', {}, el('thead', {}, el('tr', {}, el('th', { class: 'text' }, 'KL of'), el('th', {}, 'rho', el('small', {}, 'all turns, 95 %')), el('th', {}, 'rho', el('small', {}, 'median within a run')), el('th', {}, 'turns'), el('th', {}, 'dialogues'), el('th', { class: 'text' }, 'reading'))),
    el('tbody', {}, PAIRS.map(([key, name]) => el('tr', {}, el('td', { class: 'text' }, name), cell(T[key].all[0], T[key].all[1], T[key].all[2]), el('td', {}, fmt(T[key].median), el('small', {}, `of ${count(T[key].n_runs, 'run')}`)), el('td', {}, fmt(T[key].all[3])), el('td', {}, fmt(T[key].all[4])), el('td', { class: 'text wrap', style: 'min-width: 19ch' }, trackingWord(T[key]))))));
  const shown = [...new Set(D.points.map(p => RUNS[p[0]].p))].sort((a, b) => a - b);
  const legend = policyLegend(box, shown);
  legend.append(el('li', {}, dashIcon('var(--ink)', '4 3'), 'where a calibrated health would stand'));
  card('tracking', 'Does health follow the loss?', 'Health is uncalibrated: its weights are priors set before any measurement, so only its order can be read. Spearman\u2019s rho is \u22121 where health falls whenever KL rises, 0 where the two have nothing to do with each other.',
    el('div', { class: 'controls' }, chooser('health at a turn\u2019s end against the KL of', PAIRS, pair, v => { pair = v; box.redraw(); rhos.redraw(); })), legend,
    el('div', { class: 'two' }, el('div', {}, el('h3', {}, 'One mark per turn'), box, el('div', { class: 'scroll' }, numbers),
      foot(`Teacher-forced turns from a run\u2019s first eviction on; before it the cache is the full one. ${D.points.length < T.n ? `${fmt(D.points.length)} of ${fmt(T.n)} turns are drawn, evenly thinned; every rho is from all. ` : ''}Intervals: 95 % percentile bootstrap over dialogues; a run with fewer than ${T.turns_min} turns has no rho. ` +
        `The words in the table use bars fixed before any run: rho over all at most ${fmt(TRACK_ALL)} with its interval under ${fmt(TRACK_ALL_END)}, and a median within runs of at most ${fmt(TRACK_WITHIN)} (shaded). They were fixed for a calibrated health on dialogues it was not fitted to, so here they are a reading, no verdict.`)),
      el('div', {}, el('h3', {}, 'Within each run'), rhos)))
    .classList.add('long');
}
