"use strict";
// Data: columns of the tree's nodes in pre-order, so that the nodes below v are v + 1 .. end[v] - 1. Names come from the pool and are
// set as text only.
const data = JSON.parse(document.getElementById("data").textContent);
const nodes = data.nodes, total = nodes.parent.length;
const element = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
const percent = (x) => x === null ? "–" : (100 * x).toFixed(x < 0.1 ? 2 : 1) + " %";
const score = (x) => x === null ? "–" : x.toFixed(2);

const end = new Int32Array(total), left = new Float64Array(total), levels = Math.max(...nodes.depth) + 1;
const children = Array.from({ length: total }, () => []);
for (let v = total - 1; v >= 0; v--) {
  end[v] = Math.max(end[v], v + 1);
  const up = nodes.parent[v];
  if (up >= 0) { end[up] = Math.max(end[up], end[v]); children[up].push(v); }
}
for (const list of children) list.reverse();
for (let v = 0; v < total; v++) {
  let x = left[v];
  for (const child of children[v]) { left[child] = x; x += nodes.pool_share[child]; }
}

let focus = 0, matches = null;
let view = { x: 0, width: nodes.pool_share[0] || 1, top: 0 };
const canvas = element("icicle"), context = canvas.getContext("2d");

// Viridis at eight points.
const RAMP = [[68, 1, 84], [70, 50, 127], [54, 92, 141], [39, 127, 142], [31, 161, 135], [74, 194, 109], [159, 218, 58], [253, 231, 37]];
function ramp(t) {
  const at = Math.min(Math.max(t, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2), f = at - i;
  return RAMP[i].map((low, c) => Math.round(low + f * (RAMP[i + 1][c] - low)));
}
const COLOURS = {
  coverage: { value: (v) => nodes.coverage[v], low: "0 %", high: "100 % of the pool's tag mass covered" },
  balance: {
    value: (v) => nodes.pool_share[v] > 0 ? Math.log2(Math.max(nodes.selected_share[v] / nodes.pool_share[v], 1e-9)) / 6 + 0.5 : null,
    low: "1/8", high: "8 times the pool's share",
  },
  quality: { value: (v) => nodes.selected_quality[v] === null ? null : (nodes.selected_quality[v] - 1) / 9, low: "1", high: "10" },
};
let colour = COLOURS.coverage;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw() {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = style("--back"); context.fillRect(0, 0, width, height);
  const row = height / Math.max(levels - Math.floor(view.top), 1), scale = width / view.width, empty = style("--empty");
  context.font = "12px system-ui, 'DejaVu Sans', sans-serif"; context.textBaseline = "middle";
  let drawn = 0;
  for (let v = 0; v < total;) {
    const x = (left[v] - view.x) * scale, w = nodes.pool_share[v] * scale;
    // Nothing below a node is wider than it, so what is out of sight is skipped whole.
    if (w < 0.5 || x > width || x + w < 0) { v = end[v]; continue; }
    const y = (nodes.depth[v] - view.top) * row;
    if (y + row > 0) {
      const t = colour.value(v), rgb = t === null ? null : ramp(t), x0 = Math.max(x, 0), shown = Math.min(x + w, width) - x0;
      context.globalAlpha = matches && !matches.has(v) ? 0.2 : 1;
      context.fillStyle = rgb ? `rgb(${rgb})` : empty;
      context.fillRect(x0, y, Math.max(shown - (w > 3 ? 1 : 0), 0.5), row - 1);
      if (shown > 34) {
        context.fillStyle = !rgb ? style("--text") : rgb[0] * 0.3 + rgb[1] * 0.6 + rgb[2] * 0.1 > 125 ? "#000" : "#fff";
        let name = nodes.name[v].slice(0, 80);
        while (name && context.measureText(name).width > shown - 10) name = name.slice(0, Math.floor(name.length * 0.85) - 1);
        if (name) context.fillText(name.length < nodes.name[v].length ? name + "…" : name, x0 + 5, y + row / 2, shown - 8);
      }
      // Children finer than a pixel are shown as one block in the colour of their mean.
      if (children[v].length && nodes.pool_share[children[v][0]] * scale < 0.7) {
        context.fillStyle = rgb ? `rgb(${rgb})` : empty;
        context.globalAlpha *= 0.55;
        context.fillRect(x0, y + row, Math.max(shown - (w > 3 ? 1 : 0), 0.5), row - 1);
      }
      drawn++;
    }
    v++;
  }
  context.globalAlpha = 1;
  canvas.dataset.drawn = drawn;
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
function zoom(v) {
  focus = v;
  const from = { ...view }, start = performance.now();
  const to = { x: left[v], width: nodes.pool_share[v] || 1e-9, top: Math.max(nodes.depth[v] - 1, 0) };
  function step(now) {
    const t = still ? 1 : Math.min((now - start) / 250, 1), f = t * t * (3 - 2 * t);
    for (const key of ["x", "width", "top"]) view[key] = from[key] + f * (to[key] - from[key]);
    draw();
    if (t < 1 && focus === v) requestAnimationFrame(step);
  }
  requestAnimationFrame(step);
  showPath(); showBranches(); showSamples();
}

function make(tag, text, parent) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
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

const COLUMNS = [
  ["branch", (v) => nodes.name[v], (v) => nodes.name[v]],
  ["pool", (v) => nodes.pool[v], (v) => number.format(nodes.pool[v])],
  ["selected", (v) => nodes.selected[v], (v) => number.format(nodes.selected[v])],
  ["tags covered", (v) => nodes.coverage[v], (v) => percent(nodes.coverage[v])],
  ["quality pool", (v) => nodes.pool_quality[v], (v) => score(nodes.pool_quality[v])],
  ["quality selected", (v) => nodes.selected_quality[v], (v) => score(nodes.selected_quality[v])],
  ["share pool", (v) => nodes.pool_share[v], (v) => percent(nodes.pool_share[v])],
  ["share selected", (v) => nodes.selected_share[v], (v) => percent(nodes.selected_share[v])],
];
if (nodes.target_share) COLUMNS.push(["share target", (v) => nodes.target_share[v], (v) => percent(nodes.target_share[v])]);
let sorted = { column: 1, falling: true };
const SHOWN_BRANCHES = 300;

function showBranches() {
  const list = children[focus].length ? [...children[focus]] : [focus], value = COLUMNS[sorted.column][1];
  list.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (sorted.falling ? -1 : 1);
  });
  element("branches-title").textContent = `Branches of ${nodes.name[focus]} (${number.format(list.length)})`;
  const head = make("tr"), body = make("tbody");
  COLUMNS.forEach(([title], i) => {
    const cell = make("th", title + (i === sorted.column ? (sorted.falling ? " ▾" : " ▴") : ""), head);
    cell.onclick = () => { sorted = { column: i, falling: i === sorted.column ? !sorted.falling : i > 0 }; showBranches(); };
  });
  const title = make("th", undefined, head);
  title.className = "shares";
  const names = ["pool", "selected", "target"].filter((name) => nodes[name + "_share"]);
  names.forEach((name, i) => { make("span", (i ? ", " : "") + name, title).style.color = `var(--${name})`; });
  const widest = list.reduce((most, v) => names.reduce((m, name) => Math.max(m, nodes[name + "_share"][v]), most), 1e-12);
  for (const v of list.slice(0, SHOWN_BRANCHES)) {
    const row = make("tr", undefined, body);
    for (const [, , text] of COLUMNS) make("td", text(v), row);
    row.firstChild.title = nodes.name[v];
    const bars = make("td", undefined, row);
    bars.className = "shares";
    for (const name of names) {
      const bar = make("i", undefined, bars);
      bar.style.width = 100 * nodes[name + "_share"][v] / widest + "%";
      bar.style.background = `var(--${name})`;
    }
    row.onclick = () => zoom(v);
  }
  const header = make("thead");
  header.append(head);
  element("branches").replaceChildren(header, body);
  if (list.length > SHOWN_BRANCHES) {
    const cell = make("td", `and ${number.format(list.length - SHOWN_BRANCHES)} more: use the search box`, make("tr", undefined, body));
    cell.colSpan = COLUMNS.length + 1;
  }
}

function showSamples() {
  const inside = data.samples.filter((s) => s.leaves.some((leaf) => leaf >= focus && leaf < end[focus]));
  const chosen = inside.filter((s) => s.selected), others = inside.filter((s) => !s.selected);
  element("samples-title").textContent = `Samples of ${nodes.name[focus]}`;
  element("samples").replaceChildren();
  for (const sample of [...chosen.slice(0, 20), ...others.slice(0, 10)]) {
    const article = make("article", undefined, element("samples")), header = make("header", undefined, article);
    make("b", sample.selected ? "selected" : "", header);
    header.append(`${sample.selected ? " · " : "not selected · "}${sample.id} · ${sample.source} · quality ${score(sample.quality)}, ` +
      `difficulty ${score(sample.difficulty)} · ${sample.leaves.map((leaf) => nodes.name[leaf]).join(", ")}`);
    make("p", sample.text, article);
  }
  if (!inside.length) make("div", "No sample of this branch is in the report.", element("samples")).className = "empty";
}

let active = -1;
function search() {
  const text = element("search").value.trim().toLowerCase(), list = element("found");
  list.replaceChildren(); active = -1;
  if (!text) { matches = null; list.hidden = true; draw(); return; }
  const hits = [];
  for (let v = 0; v < total; v++) if (nodes.name[v].toLowerCase().includes(text)) hits.push(v);
  matches = new Set();
  for (const hit of hits) for (let v = hit; v >= 0 && !matches.has(v); v = nodes.parent[v]) matches.add(v);
  hits.sort((a, b) => nodes.pool[b] - nodes.pool[a]);
  for (const v of hits.slice(0, 50)) {
    const item = make("li", undefined, list);
    make("span", nodes.name[v], item);
    make("span", `${number.format(nodes.selected[v])} of ${number.format(nodes.pool[v])}`, item);
    item.onmousedown = (event) => { event.preventDefault(); zoom(v); list.hidden = true; };
  }
  if (!hits.length) make("li", "no tag has this in its name", list);
  else if (hits.length > 50) make("li", `and ${number.format(hits.length - 50)} more`, list);
  list.hidden = false;
  draw();
}
element("search").oninput = search;
element("search").onblur = () => { element("found").hidden = true; };
element("search").onkeydown = (event) => {
  const items = [...element("found").children].filter((item) => item.onmousedown);
  if (event.key === "Escape") { element("search").value = ""; search(); }
  if (event.key === "Enter" && items.length) items[Math.max(active, 0)].onmousedown(event);
  if ((event.key === "ArrowDown" || event.key === "ArrowUp") && items.length) {
    event.preventDefault();
    active = (active + (event.key === "ArrowDown" ? 1 : -1) + items.length) % items.length;
    items.forEach((item, i) => item.classList.toggle("on", i === active));
    items[active].scrollIntoView({ block: "nearest" });
  }
};

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
  const v = nodeAt(event), tip = element("tip");
  tip.hidden = v === null;
  if (v === null) return;
  tip.textContent = `${nodes.name[v]}\n${number.format(nodes.selected[v])} of ${number.format(nodes.pool[v])} instances selected\n` +
    `tags covered ${percent(nodes.coverage[v])}\nquality: pool ${score(nodes.pool_quality[v])}, selected ${score(nodes.selected_quality[v])}\n` +
    `share: pool ${percent(nodes.pool_share[v])}, selected ${percent(nodes.selected_share[v])}` +
    (nodes.target_share ? `, target ${percent(nodes.target_share[v])}` : "");
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
};
canvas.onmouseleave = () => { element("tip").hidden = true; };

function showLegend() {
  const legend = element("legend").getContext("2d");
  for (let x = 0; x < 160; x++) { legend.fillStyle = `rgb(${ramp(x / 159)})`; legend.fillRect(x, 0, 1, 12); }
  element("low").textContent = colour.low; element("high").textContent = colour.high;
}
element("colour").onchange = () => { colour = COLOURS[element("colour").value]; showLegend(); draw(); };

for (const [name, value] of data.facts) {
  const fact = make("div", undefined, element("facts"));
  make("dt", name, fact); make("dd", value, fact);
}
for (const table of data.tables) {
  const made = make("table", undefined, element("counts")), head = make("tr", undefined, make("thead", undefined, made));
  const body = make("tbody", undefined, made);
  for (const title of table.columns) make("th", title, head);
  for (const values of table.rows) {
    const row = make("tr", undefined, body);
    for (const value of values) make("td", typeof value === "number" ? number.format(value) : value, row);
  }
}
element("note").textContent = data.note;
window.addEventListener("resize", draw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
canvas.style.height = Math.min(Math.max(levels * 44, 200), 460) + "px";
showLegend(); showPath(); showBranches(); showSamples(); draw();
document.documentElement.dataset.ready = "true";
