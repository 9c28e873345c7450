// The tree as an icicle. Layout by d3-hierarchy: a node's share of the pool's tags is its width, its depth its row.
const laidOut = d3.hierarchy(0, (v) => children[v]);
laidOut.each((node) => { node.value = nodes.pool_share[node.data]; });
const levels = laidOut.height + 1;
d3.partition().size([nodes.pool_share[0] || 1, levels])(laidOut);
const left = new Float64Array(total);
laidOut.each((node) => { left[node.data] = node.x0; });

let matches = null;
const canvas = element("icicle");
let view = { x: 0, width: nodes.pool_share[0] || 1, top: 0 };

// Colours by rank: stops at quantiles of the values shown, so that no branch of the scale is one flat colour however skewed the
// values are. The legend names the values at the stops.
const STOPS = 8;
// Narrower nodes are not drawn each by itself, pixels.
const FINEST = 0.5;
const QUANTITIES = {
  coverage: {
    title: "tags covered", value: (v) => nodes.coverage[v], text: percent, none: "no tags in the pool",
    colour: d3.interpolateViridis,
  },
  rate: {
    title: "instances selected of those with a tag here", text: percent, none: "none selected",
    value: (v) => nodes.selected[v] ? nodes.selected[v] / nodes.pool[v] : null, colour: d3.interpolateViridis,
  },
  balance: {
    title: "share of the selection / share of the pool", text: (x) => x.toPrecision(2) + "×", none: "none selected",
    value: (v) => nodes.pool_share[v] > 0 && nodes.selected_share[v] > 0 ? nodes.selected_share[v] / nodes.pool_share[v] : null,
    colour: d3.interpolatePuOr, middle: 1,
  },
  quality: {
    title: "mean quality of the selection", value: (v) => nodes.selected_quality[v], text: score, none: "no score",
    colour: d3.interpolateViridis,
  },
};
let quantity = QUANTITIES.coverage, ramp;

// Values at the quantiles, and the ends of all values, each once; with a middle (a ratio of 1) it has half of the colours on each side.
function stops(values, all, middle) {
  const sorted = Float64Array.from(values).sort();
  if (!sorted.length) return [];
  const at = Array.from({ length: STOPS + 1 }, (_, i) => d3.quantileSorted(sorted, i / STOPS));
  const [least, most] = d3.extent(all);
  if (most > at[STOPS]) at.push(most);
  if (least < at[0]) at.unshift(least);
  const distinct = [...new Set(at)];
  if (middle === undefined) return distinct;
  const low = distinct.filter((x) => x < middle), high = distinct.filter((x) => x > middle);
  return [...low, middle, ...high];
}

function makeRamp() {
  const values = [], inner = [];
  for (let v = 0; v < total; v++) {
    const x = quantity.value(v);
    if (x === null || x === undefined) continue;
    values.push(x);
    if (children[v].length) inner.push(x);
  }
  // A leaf is covered or not; inner nodes have values between, if there are enough of them.
  const domain = stops(inner.length >= 3 * STOPS ? inner : values, values, quantity.middle), middle = domain.indexOf(quantity.middle);
  // The ends of the colours are kept for values beyond the quantiles' ends.
  const place = (i) => {
    if (domain.length === 1) return 0.5;
    if (middle < 0) return 0.05 + 0.9 * i / (domain.length - 1);
    return i <= middle ? 0.12 + 0.38 * (middle ? i / middle : 1) : 0.5 + 0.38 * (i - middle) / (domain.length - 1 - middle);
  };
  const scale = domain.length > 1 ? d3.scaleLinear(domain, domain.map((_, i) => place(i))) : () => 0.5;
  const colour = (x) => quantity.colour(domain.length > 1 ? Math.min(Math.max(scale(x), 0), 1) : 0.5);
  ramp = { domain, place, colour };
}

const DARK = new Map();
function isDark(colour) {
  if (!DARK.has(colour)) {
    // d3's schemes give rgb(...) or #rrggbb.
    const part = colour[0] === "#" ? [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)) : colour.match(/\d+/g).map(Number);
    DARK.set(colour, part[0] * 0.3 + part[1] * 0.59 + part[2] * 0.11 < 130);
  }
  return DARK.get(colour);
}

// Place of the first child that is too narrow to be drawn; children come by falling width.
function firstFine(list, scale) {
  let low = 0, high = list.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (nodes.pool_share[list[middle]] * scale < FINEST) high = middle; else low = middle + 1;
  }
  return low;
}

function draw() {
  const context = fit(canvas), width = canvas.clientWidth, height = canvas.clientHeight;
  context.fillStyle = style("--back"); context.fillRect(0, 0, width, height);
  const row = height / Math.max(levels - Math.floor(view.top), 1), scale = width / view.width, empty = style("--empty"), ink = style("--text");
  context.font = "12px system-ui, 'DejaVu Sans', sans-serif"; context.textBaseline = "middle";
  let drawn = 0;
  for (let v = 0; v < total;) {
    const x = (left[v] - view.x) * scale, w = nodes.pool_share[v] * scale;
    // Nothing below a node is wider than it, so what is out of sight is skipped whole.
    if (w < FINEST || x > width || x + w < 0) { v = end[v]; continue; }
    const y = (nodes.depth[v] - view.top) * row;
    if (y + row > 0) {
      const value = quantity.value(v), colour = value === null || value === undefined ? null : ramp.colour(value);
      const x0 = Math.max(x, 0), shown = Math.min(x + w, width) - x0;
      context.globalAlpha = matches && !matches.has(v) ? 0.2 : 1;
      context.fillStyle = colour || empty;
      context.fillRect(x0, y, Math.max(shown - (w > 3 ? 1 : 0), 0.5), row - 1);
      if (shown > 34) {
        context.fillStyle = !colour ? ink : isDark(colour) ? "#fff" : "#000";
        let name = nodes.name[v].slice(0, 80);
        while (name && context.measureText(name).width > shown - 10) name = name.slice(0, Math.floor(name.length * 0.85) - 1);
        if (name) context.fillText(name.length < nodes.name[v].length ? name + "…" : name, x0 + 5, y + row / 2, shown - 8);
      }
      // Children finer than half a pixel, which come last, are shown as one block in the colour of their mean.
      const fine = firstFine(children[v], scale);
      if (fine < children[v].length) {
        const from = Math.max((left[children[v][fine]] - view.x) * scale, 0), last = children[v][children[v].length - 1];
        const to = Math.min((left[last] + nodes.pool_share[last] - view.x) * scale, width);
        context.fillStyle = colour || empty;
        context.globalAlpha *= 0.55;
        if (to > from) context.fillRect(from, y + row, Math.max(to - from - (to - from > 3 ? 1 : 0), 0.5), row - 1);
      }
      drawn++;
    }
    v++;
  }
  context.globalAlpha = 1;
  canvas.dataset.drawn = drawn;
}

function showLegend() {
  const legend = element("legend"), context = fit(legend), width = legend.clientWidth;
  context.clearRect(0, 0, width, 26);
  context.font = "10px system-ui, 'DejaVu Sans', sans-serif"; context.fillStyle = style("--soft"); context.textBaseline = "top";
  const n = ramp.domain.length, step = n > 1 ? (width - 40) / (n - 1) : 0;
  for (let i = 0; i < n; i++) {
    if (i + 1 < n) for (let x = 0; x < step; x++) {
      context.fillStyle = quantity.colour(ramp.place(i) + (ramp.place(i + 1) - ramp.place(i)) * x / step);
      context.fillRect(20 + i * step + x, 0, 1.5, 11);
    }
  }
  if (n === 1) { context.fillStyle = quantity.colour(0.5); context.fillRect(20, 0, width - 40, 11); }
  context.fillStyle = style("--soft"); context.textAlign = "center";
  const every = Math.max(1, Math.ceil(n / 6));
  for (let i = 0; i < n; i++) if (i % every === 0 || i === n - 1) if (i === n - 1 || n - 1 - i >= every * 0.6) context.fillText(quantity.text(ramp.domain[i]), n > 1 ? 20 + i * step : width / 2, 14);
  element("legend-text").textContent = quantity.title + ", colours at quantiles";
  element("none-text").textContent = quantity.none;
}

function nodeAt(event) {
  const box = canvas.getBoundingClientRect(), x = view.x + (event.clientX - box.left) / box.width * view.width;
  const depth = Math.floor(view.top + (event.clientY - box.top) / box.height * Math.max(levels - Math.floor(view.top), 1));
  let v = 0;
  while (nodes.depth[v] < depth) {
    const next = children[v].find((c) => x >= left[c] && x < left[c] + nodes.pool_share[c]);
    if (next === undefined) return null;
    v = next;
  }
  return nodes.depth[v] === depth ? v : null;
}

const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const afterZoom = [];
function zoom(v) {
  hideTip();
  focus = v;
  const from = { ...view }, start = performance.now();
  const to = { x: left[v], width: nodes.pool_share[v] || 1e-9, top: Math.max(nodes.depth[v] - 1, 0) };
  function step(now) {
    const t = still ? 1 : Math.min(Math.max(now - start, 0) / 250, 1), f = t * t * (3 - 2 * t);
    for (const key of ["x", "width", "top"]) view[key] = from[key] + f * (to[key] - from[key]);
    draw();
    if (t < 1 && focus === v) requestAnimationFrame(step);
  }
  requestAnimationFrame(step);
  showPath();
  for (const action of afterZoom) action();
}

function showPath() {
  const path = [];
  for (let v = focus; v >= 0; v = nodes.parent[v]) path.unshift(v);
  element("path").replaceChildren();
  path.forEach((v, i) => {
    if (i) element("path").append("›");
    const button = make("button", nodes.name[v], element("path"));
    if (v === focus) button.setAttribute("aria-current", "true");
    button.onclick = () => zoom(v);
  });
}

canvas.onclick = (event) => {
  const v = nodeAt(event);
  if (v !== null) zoom(v === focus && nodes.parent[v] >= 0 ? nodes.parent[v] : v);
};
canvas.onkeydown = (event) => {
  if (event.key === "Escape" && nodes.parent[focus] >= 0) zoom(nodes.parent[focus]);
  if (event.key === "Enter" && children[focus].length) zoom(children[focus][0]);
  const siblings = nodes.parent[focus] >= 0 ? children[nodes.parent[focus]] : [0], at = siblings.indexOf(focus);
  if (event.key === "ArrowRight" && at + 1 < siblings.length) zoom(siblings[at + 1]);
  if (event.key === "ArrowLeft" && at > 0) zoom(siblings[at - 1]);
};
canvas.onmousemove = (event) => {
  const v = nodeAt(event);
  if (v === null) return hideTip();
  const lines = [nodes.name[v]];
  if (own.has(v)) lines.push(`${number.format(own.get(v).selected)} of ${number.format(own.get(v).pool)} instances of this branch selected`);
  lines.push(`${number.format(nodes.selected[v])} of ${number.format(nodes.pool[v])} instances with a tag here selected`);
  lines.push(`tags covered ${percent(nodes.coverage[v])}`);
  lines.push(`quality: pool ${score(nodes.pool_quality[v])}, selected ${score(nodes.selected_quality[v])}`);
  lines.push("share of tags: " + Object.keys(GROUPS).filter((name) => nodes[name + "_share"])
    .map((name) => `${GROUPS[name]} ${percent(nodes[name + "_share"][v])}`).join(", "));
  showTip(event, lines.join("\n"));
};
canvas.onmouseleave = hideTip;
for (const [name, { title }] of Object.entries(QUANTITIES)) make("option", title, element("colour")).value = name;
element("colour").onchange = () => { quantity = QUANTITIES[element("colour").value]; makeRamp(); showLegend(); draw(); };
