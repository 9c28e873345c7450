"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const chunks = data.texts.length;
const layers = data.layers.map((layer) => {
  if (layer.data === null) return { ...layer, values: null };
  const values = Uint8Array.from(atob(layer.data), (character) => character.charCodeAt(0));
  return { ...layer, values };
});
const seeing = layers.filter((layer) => layer.values !== null);
const pairs = (chunks * (chunks - 1)) / 2;
const state = { layer: seeing.length ? seeing[0].layer : 1, head: -1, chunk: chunks - 1 };

// Attention of a chunk's text to the summaries of an older chunk, in one head.
const one = (layer, head, chunk, older) => (layer.values[head * pairs + (chunk * (chunk - 1)) / 2 + older] / 255) ** 2;
function weight(layer, head, chunk, older) {
  if (head >= 0) return one(layer, head, chunk, older);
  let sum = 0;
  for (let h = 0; h < layer.heads; h++) sum += one(layer, h, chunk, older);
  return sum / layer.heads;
}
function share(layer, head, chunk) {
  let sum = 0;
  for (let older = 0; older < chunk; older++) sum += weight(layer, head, chunk, older);
  return sum;
}
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 2 : 1)} %`;
const current = () => layers.find((layer) => layer.layer === state.layer);

function add(parent, tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  parent.append(made);
  return made;
}

function bar(parent, parts) {
  const line = add(parent, "div", undefined, "share");
  for (const [name, value, label] of parts) {
    if (value <= 0) continue;
    const part = add(line, "span", value > 0.12 ? label : "", name);
    part.style.width = `${100 * value}%`;
    part.title = label;
  }
}

function drawGrid() {
  element("grid").replaceChildren();
  for (const layer of layers) {
    const row = add(element("grid"), "div", undefined, "row");
    add(row, "span", `${layer.layer} ${layer.kind}`, "name");
    if (layer.values === null) {
      add(row, "span", "text only", "none");
      continue;
    }
    for (let head = 0; head < layer.heads; head++) {
      const value = share(layer, head, state.chunk);
      const cell = add(row, "button");
      cell.style.background = `rgba(194, 65, 12, ${Math.min(1, Math.sqrt(value))})`;
      cell.title = `layer ${layer.layer}, head ${head + 1}: ${percent(value)} on summaries`;
      cell.setAttribute("aria-label", cell.title);
      if (layer.layer === state.layer && head === state.head) cell.className = "on";
      cell.addEventListener("click", () => choose({ layer: layer.layer, head }));
    }
  }
}

function drawShares(layer) {
  element("shares").replaceChildren();
  if (layer && layer.values !== null) {
    const summaries = share(layer, state.head, state.chunk);
    bar(element("shares"), [
      ["window", 1 - summaries, `window ${percent(1 - summaries)}`],
      ["summaries", summaries, `summaries ${percent(summaries)}`],
    ]);
  } else {
    bar(element("shares"), [["full", 1, "text, no summaries: 100 %"]]);
  }
  let all = 0;
  for (const each of seeing) all += share(each, -1, state.chunk);
  const total = layers.length || 1;
  const blind = (total - seeing.length) / total;
  add(element("shares"), "div", "all layers and heads", "note");
  bar(element("shares"), [
    ["window", 1 - blind - all / total, `window ${percent(1 - blind - all / total)}`],
    ["summaries", all / total, `summaries ${percent(all / total)}`],
    ["full", blind, `layers without summaries ${percent(blind)}`],
  ]);
}

const spans = data.texts.map((text, chunk) => {
  const span = add(element("text"), "span", text);
  span.dataset.chunk = chunk;
  span.tabIndex = 0;
  span.addEventListener("click", () => choose({ chunk }));
  span.addEventListener("keydown", (event) => { if (event.key === "Enter") choose({ chunk }); });
  span.addEventListener("mousemove", (event) => {
    const layer = current();
    let told = `chunk ${chunk + 1}`;
    if (chunk > state.chunk) told += ": later than the chosen one";
    else if (layer && layer.values !== null && state.chunk - chunk > layer.window)
      told += `: ${percent(weight(layer, state.head, state.chunk, chunk))} of the attention goes to its summaries`;
    else told += ": seen as text";
    element("tip").textContent = told;
    element("tip").hidden = false;
    element("tip").style.left = `${Math.min(event.clientX + 12, window.innerWidth - 330)}px`;
    element("tip").style.top = `${event.clientY + 14}px`;
  });
  span.addEventListener("mouseleave", () => { element("tip").hidden = true; });
  return span;
});

function drawText(layer) {
  let peak = 0;
  const weights = spans.map((span, chunk) => {
    const sees = layer && layer.values !== null && chunk < state.chunk && state.chunk - chunk > layer.window;
    const value = sees ? weight(layer, state.head, state.chunk, chunk) : 0;
    peak = Math.max(peak, value);
    return value;
  });
  spans.forEach((span, chunk) => {
    const near = chunk < state.chunk && (!layer || layer.values === null || state.chunk - chunk <= layer.window);
    span.className = chunk === state.chunk ? "chosen" : chunk > state.chunk ? "later" : near ? "near" : "";
    span.style.background = weights[chunk] > 0 ? `rgba(194, 65, 12, ${0.9 * weights[chunk] / peak})` : "";
    span.dataset.weight = weights[chunk].toFixed(5);
  });
}

function choose(change) {
  Object.assign(state, change);
  const layer = current();
  if (layer && layer.values !== null && state.head >= layer.heads) state.head = -1;
  element("layer").value = String(state.layer);
  element("head").value = String(state.head);
  const head = state.head < 0 ? "mean of the heads" : `head ${state.head + 1}`;
  element("chosen").textContent =
    `Chunk ${state.chunk + 1} of ${chunks} reads, layer ${state.layer}, ${head}. Orange: attention on a chunk's summaries, relative to the most; blue: seen as text.`;
  drawText(layer);
  drawShares(layer);
  drawGrid();
}

document.querySelector("h1").textContent = data.title;
document.title = data.title;
for (const [name, value] of data.facts) {
  const fact = add(element("facts"), "div");
  add(fact, "dt", name);
  add(fact, "dd", value);
}
for (const layer of layers) add(element("layer"), "option", `${layer.layer} (${layer.kind})`).value = String(layer.layer);
add(element("head"), "option", "mean").value = "-1";
const most = Math.max(0, ...seeing.map((layer) => layer.heads));
for (let head = 0; head < most; head++) add(element("head"), "option", `${head + 1} of ${most}`).value = String(head);
element("layer").addEventListener("change", (event) => choose({ layer: Number(event.target.value) }));
element("head").addEventListener("change", (event) => choose({ head: Number(event.target.value) }));
choose({});
document.documentElement.dataset.ready = "1";
