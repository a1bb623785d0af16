/* Small SVG plotting: scales, axes, marks with tooltips and keyboard steps. Knows nothing of the report.
 * Text from files only ever becomes a text node. */
'use strict';

const SVG_NS = 'http://www.w3.org/2000/svg';

function el(name, attrs, ...children) {
  const node = document.createElement(name);
  for (const key in attrs || {}) {
    if (key === 'on') for (const type in attrs.on) node.addEventListener(type, attrs.on[type]);
    else if (attrs[key] !== null && attrs[key] !== undefined) node.setAttribute(key, attrs[key]);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

function svg(name, attrs, ...children) {
  const node = document.createElementNS(SVG_NS, name);
  for (const key in attrs || {}) if (attrs[key] !== null && attrs[key] !== undefined) node.setAttribute(key, attrs[key]);
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

/* ---- numbers ---- */

const known = x => typeof x === 'number' && isFinite(x);
const MIB = 1048576;
const MINUS = '\u2212';

/* Three significant digits, as a reader writes them. */
function fmt(x, digits = 3) {
  if (!known(x)) return '\u2013';
  const a = Math.abs(x);
  let s;
  if (a === 0) s = '0';
  else if (a < 1e-3 || a >= 1e7) {
    const [m, e] = a.toExponential(Math.max(0, digits - 2)).split('e');
    s = m + 'e' + (e[0] === '-' ? MINUS + e.slice(1) : e.slice(1));
  } else if (a >= 1000) s = Math.round(a).toString().replace(/\B(?=(\d{3})+$)/g, '\u202f');
  else s = a.toPrecision(digits).replace(/(\.\d*?)0+$/, '$1').replace(/\.$/, '');
  return (x < 0 ? MINUS : '') + s;
}
const percent = x => (known(x) ? fmt(100 * x) + '\u202f%' : '\u2013'); /* a space that does not break the line */

/* ---- scales ---- */

function linear(lo, hi, a, b) {
  if (!(hi > lo)) hi = lo + 1;
  const scale = x => a + (x - lo) / (hi - lo) * (b - a);
  scale.lo = lo;
  scale.hi = hi;
  scale.ticks = n => {
    const rough = (hi - lo) / Math.max(1, n), power = Math.pow(10, Math.floor(Math.log10(rough)));
    const step = [1, 2, 5, 10].map(k => k * power).find(s => s >= rough * 0.999);
    const out = [];
    for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) out.push(i * step);
    return out;
  };
  return scale;
}

function logarithmic(lo, hi, a, b) {
  if (!(lo > 0)) lo = 1e-6;
  if (!(hi > lo)) hi = lo * 10;
  const la = Math.log10(lo), lb = Math.log10(hi);
  const scale = x => a + (Math.log10(Math.max(x, lo)) - la) / (lb - la) * (b - a);
  scale.lo = lo;
  scale.hi = hi;
  scale.ticks = () => {
    const span = lb - la, steps = span < 1.3 ? [1, 2, 3, 5, 7] : span < 3.5 ? [1, 2, 5] : [1];
    const every = span > 8 ? 2 : 1, out = [];
    for (let e = Math.floor(la); e <= Math.ceil(lb); e++)
      if (e % every === 0 || every === 1)
        for (const s of steps) {
          const v = s * Math.pow(10, e);
          if (v >= lo * 0.999 && v <= hi * 1.001) out.push(v);
        }
    return out;
  };
  return scale;
}

/* A log scale for KL: values under ten times the noise floor stand in a strip of their own at the bottom instead of
 * stretching the axis over empty decades. */
function klScale(values, floor, top, bottom) {
  const limit = known(floor) ? 10 * floor : 0;
  const good = values.filter(v => known(v) && v > Math.max(limit, 0));
  const strip = values.some(v => known(v) && v <= limit) || !good.length ? 22 : 0;
  let lo = good.length ? Math.min(...good) : 1e-3, hi = good.length ? Math.max(...good) : 1;
  lo = Math.max(lo / 1.35, limit);
  hi *= 1.35;
  if (hi / lo < 8) {
    const mid = Math.sqrt(lo * hi);
    lo = mid / 2.9;
    hi = mid * 2.9;
  }
  const main = logarithmic(lo, hi, bottom - strip - (strip ? 6 : 0), top);
  const scale = v => (v <= limit || v <= 0 ? bottom - strip / 2 : main(v));
  Object.assign(scale, { ticks: main.ticks, lo, hi, strip, limit, unresolved: v => known(v) && v <= limit });
  return scale;
}

/* ---- axes ---- */

function axisY(g, scale, x0, x1, o) {
  const ticks = o.ticks || scale.ticks(o.n || 5);
  let last = 1e9;
  for (const v of ticks) {
    const y = Math.round(scale(v)) + 0.5;
    g.append(svg('line', { class: 'grid', x1: x0, x2: x1, y1: y, y2: y }));
    if (o.quiet || Math.abs(last - y) < 11) continue;
    last = y;
    g.append(svg('text', { x: x0 - 7, y: y + 4, 'text-anchor': 'end' }, (o.format || fmt)(v)));
  }
  if (o.label) g.append(svg('text', { x: o.labelX === undefined ? x0 - 44 : o.labelX, y: o.labelY, class: 'strong' }, o.label));
}

function axisX(g, scale, y, o) {
  const ticks = o.ticks || scale.ticks(o.n || 6);
  g.append(svg('line', { class: 'axis', x1: o.from, x2: o.to, y1: y + 0.5, y2: y + 0.5 }));
  let last = -1e9;
  for (const v of ticks) {
    const x = scale(v), text = (o.format || fmt)(v);
    g.append(svg('line', { class: 'axis', x1: Math.round(x) + 0.5, x2: Math.round(x) + 0.5, y1: y, y2: y + 4 }));
    if (x - last < text.length * 6 + 10) continue;
    last = x;
    g.append(svg('text', { x, y: y + 17, 'text-anchor': 'middle' }, text));
  }
  if (o.label) g.append(svg('text', { x: (o.from + o.to) / 2, y: y + 34, 'text-anchor': 'middle', class: 'strong' }, o.label));
}

function klStrip(g, scale, x0, x1, bottom, atLeft) {
  if (!scale.strip) return;
  g.append(svg('rect', { x: x0, y: bottom - scale.strip, width: x1 - x0, height: scale.strip, fill: 'var(--wash)' }));
  g.append(svg('text', { x: atLeft ? x0 + 6 : x1 - 5, y: bottom - scale.strip / 2 + 4, 'text-anchor': atLeft ? 'start' : 'end' }, 'not resolved: under 10\u00d7 noise floor'));
}

/* ---- marks ---- */

const SHAPES = ['circle', 'square', 'up', 'diamond', 'down', 'plus', 'star', 'cross', 'pentagon', 'bar', 'right', 'left'];

function shapePath(kind, r) {
  const polygon = (n, turn, radius) => Array.from({ length: n }, (_, i) => {
    const a = turn + 2 * Math.PI * i / n, q = typeof radius === 'function' ? radius(i) : radius;
    return (i ? 'L' : 'M') + (q * Math.cos(a)).toFixed(2) + ' ' + (q * Math.sin(a)).toFixed(2);
  }).join('') + 'Z';
  const up = -Math.PI / 2;
  switch (kind) {
  case 'circle': return `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
  case 'square': return polygon(4, Math.PI / 4, r * 1.25);
  case 'diamond': return polygon(4, 0, r * 1.3);
  case 'up': return polygon(3, up, r * 1.35);
  case 'down': return polygon(3, -up, r * 1.35);
  case 'right': return polygon(3, 0, r * 1.35);
  case 'left': return polygon(3, Math.PI, r * 1.35);
  case 'star': return polygon(10, up, i => (i % 2 ? r * 0.6 : r * 1.45));
  case 'pentagon': return polygon(5, up, r * 1.2);
  case 'bar': return `M${-r * 1.3} ${-r * 0.55}h${r * 2.6}v${r * 1.1}h${-r * 2.6}Z`;
  default: {
    const t = r * 0.42, q = r * 1.25; /* plus; cross is the same, turned */
    const d = `M${-t} ${-q}H${t}V${-t}H${q}V${t}H${t}V${q}H${-t}V${t}H${-q}V${-t}H${-t}Z`;
    return d;
  }
  }
}

function shape(kind, x, y, r, attrs) {
  const turn = kind === 'cross' ? ' rotate(45)' : '';
  return svg('path', Object.assign({ d: shapePath(kind, r), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})${turn}` }, attrs));
}

function icon(kind, colour, open) {
  return svg('svg', { width: 14, height: 14, viewBox: '-8 -8 16 16', 'aria-hidden': 'true' },
    shape(kind, 0, 0, 5, open ? { fill: 'none', stroke: colour, 'stroke-width': 1.6 } : { fill: colour }));
}

function dashIcon(colour, dash, width = 26) {
  return svg('svg', { width, height: 12, 'aria-hidden': 'true' },
    svg('line', { x1: 0, x2: width, y1: 6, y2: 6, stroke: colour, 'stroke-width': 2, 'stroke-dasharray': dash }));
}

/* Points [x, y]; a null breaks the line. */
function linePath(points) {
  let d = '', pen = false;
  for (const p of points) {
    if (!p || !known(p[0]) || !known(p[1])) {
      pen = false;
      continue;
    }
    d += (pen ? 'L' : 'M') + p[0].toFixed(1) + ' ' + p[1].toFixed(1);
    pen = true;
  }
  return d;
}

function bandPath(points) {
  const good = points.filter(p => p && known(p[1]) && known(p[2]));
  if (good.length < 2) return '';
  return linePath(good.map(p => [p[0], p[1]])) + linePath(good.slice().reverse().map(p => [p[0], p[2]])).replace('M', 'L') + 'Z';
}

/* Moves labels apart so that none overlap: wanted ys in, placed ys out, in the same order. */
function spreadLabels(ys, gap, lo, hi) {
  const order = ys.map((y, i) => [y, i]).sort((a, b) => a[0] - b[0]);
  let last = lo - gap;
  for (const p of order) last = p[0] = Math.max(p[0], last + gap);
  let next = hi + gap;
  for (const p of order.reverse()) next = p[0] = Math.min(p[0], next - gap);
  const out = [];
  for (const p of order) out[p[1]] = p[0];
  return out;
}

/* ---- tooltips ---- */

const tipBox = document.getElementById('tip');

/* lines: a title, then [name, value] pairs or texts. */
function showTip(lines, x, y) {
  tipBox.replaceChildren(el('b', {}, String(lines[0])), ...lines.slice(1).map(l =>
    Array.isArray(l) ? el('span', {}, el('i', {}, l[0]), String(l[1])) : el('div', {}, l)));
  tipBox.hidden = false;
  const w = tipBox.offsetWidth, h = tipBox.offsetHeight;
  tipBox.style.left = Math.max(4, Math.min(innerWidth - w - 4, x + 14)) + 'px';
  tipBox.style.top = (y + h + 18 > innerHeight ? Math.max(4, y - h - 12) : y + 14) + 'px';
}
const hideTip = () => { tipBox.hidden = true; };

/* A mark says its lines on hover and when the keyboard stands on it. */
function tip(node, lines) {
  node.classList.add('mark');
  node.setAttribute('tabindex', '-1');
  node.setAttribute('aria-label', lines.map(l => (Array.isArray(l) ? l.join(' ') : l)).join(', '));
  node.addEventListener('mousemove', e => showTip(lines, e.clientX, e.clientY));
  node.addEventListener('mouseleave', hideTip);
  node.addEventListener('focus', () => {
    const r = node.getBoundingClientRect();
    showTip(lines, r.right, r.bottom);
  });
  node.addEventListener('blur', hideTip);
  return node;
}

/* ---- a plot that follows its box ---- */

/* draw(root, width) returns the height it used. Left and right arrows step through the marks. */
function plot(label, draw) {
  const box = el('div', { class: 'plot', tabindex: '0', role: 'group', 'aria-label': label + '. Arrow keys step through the values.' });
  let width = 0;
  const redraw = () => {
    width = box.clientWidth;
    if (width < 40) return;
    const root = svg('svg', { width });
    const height = draw(root, width);
    root.setAttribute('height', height);
    root.setAttribute('viewBox', `0 0 ${width} ${height}`);
    box.replaceChildren(root);
  };
  box.addEventListener('keydown', e => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (e.key === 'Escape') {
      box.focus();
      hideTip();
    }
    if (!step) return;
    const marks = [...box.querySelectorAll('.mark')];
    if (!marks.length) return;
    e.preventDefault();
    const at = marks.indexOf(document.activeElement);
    marks[at < 0 ? 0 : (at + step + marks.length) % marks.length].focus();
  });
  /* in the next frame: a height that changes within the notification would be reported as a loop */
  new ResizeObserver(() => requestAnimationFrame(() => { if (box.clientWidth !== width) redraw(); })).observe(box);
  box.redraw = redraw;
  return box;
}
