"use strict";
// Data: columns of the tree's nodes in pre-order, so that the nodes below v are v + 1 .. end[v] - 1, and columns of instances. Names
// and texts come from the pool and are set as text only.
const data = JSON.parse(document.getElementById("data").textContent);
const nodes = data.nodes, total = nodes.parent.length;
const element = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
const percent = (x) => x === null || x === undefined ? "–" : (100 * x).toFixed(x < 0.1 ? 2 : 1) + " %";
const score = (x) => x === null || x === undefined ? "–" : x.toFixed(2);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const GROUPS = { pool: "pool", selected: "selected", other: "other run", target: "target" };

function make(tag, text, parent, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  if (parent) parent.append(made);
  return made;
}

const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array };
function unpack(text, type) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new TYPES[type](bytes.buffer);
}
const points = {
  at: unpack(data.points.at, "u2"), state: unpack(data.points.state, "u1"), quality: unpack(data.points.quality, "u1"),
  branch: unpack(data.points.branch, "i4"), bounds: unpack(data.points.bounds, "u4"), leaves: unpack(data.points.leaves, "u4"),
  target: unpack(data.points.target, "u2"), ids: data.points.ids,
};
const CHOSEN = 1, OTHER = 2;
points.count = points.state.length;
points.source = (i) => data.points.sources[data.points.source[i]];

const end = new Int32Array(total), children = Array.from({ length: total }, () => []);
for (let v = total - 1; v >= 0; v--) {
  end[v] = Math.max(end[v], v + 1);
  const up = nodes.parent[v];
  if (up >= 0) { end[up] = Math.max(end[up], end[v]); children[up].push(v); }
}
for (const list of children) list.reverse();
// Instances whose one branch a top branch is, as the datasets have them.
const own = new Map(data.own.nodes.map((v, i) => [v, Object.fromEntries(["pool", "selected", "other"].map((name) => [name, data.own[name] && data.own[name][i]]))]));

let focus = 0;
const within = (v) => v >= focus && v < end[focus];
// Whether an instance has a tag at or below the branch in view.
function inFocus(i) {
  for (let at = points.bounds[i]; at < points.bounds[i + 1]; at++) if (within(points.leaves[at])) return true;
  return false;
}

// One tooltip; anything that moves what is below the pointer hides it.
function showTip(event, text) {
  const tip = element("tip");
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(8, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)) + "px";
}
function hideTip() { element("tip").hidden = true; }
for (const name of ["scroll", "wheel", "keydown", "blur", "pointerdown", "resize", "touchmove"]) window.addEventListener(name, hideTip, { capture: true, passive: true });
document.addEventListener("mouseleave", hideTip);
document.addEventListener("visibilitychange", hideTip);

// A canvas as large as its box in pixels of the screen; gives its context, in units of the page.
function fit(canvas) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}
