// The map: every instance a dot, written into one image, so that 200,000 of them move with the pointer. Left-out ones are grey by
// their number on a pixel, on a logarithmic scale; then the target, the other run and the selection on top.
const mapCanvas = element("points"), GRID = 65535;
const LAYERS = [
  { name: "pool", title: "left out", on: true, has: (i) => !points.state[i] },
  { name: "target", title: "target", on: true },
  { name: "other", title: "other run", on: true, has: (i) => points.state[i] & OTHER && !(points.state[i] & CHOSEN) },
  { name: "selected", title: "selected", on: true, has: (i) => points.state[i] & CHOSEN },
];
for (const layer of LAYERS) {
  const members = [];
  for (let i = 0; i < (layer.has ? points.count : points.target.length / 2); i++) if (!layer.has || layer.has(i)) members.push(i);
  layer.members = Uint32Array.from(members);
}
let mark = null, transform = d3.zoomIdentity, index = null;

// Colours of the style as numbers. Reading a pixel back is slow, so each is read once for a colour scheme.
const known = new Map();
function rgb(name) {
  const text = style(name);
  if (!known.has(text)) known.set(text, read(text));
  return known.get(text);
}
function read(text) {
  const paint = new OffscreenCanvas(1, 1).getContext("2d");
  paint.fillStyle = text; paint.fillRect(0, 0, 1, 1);
  return paint.getImageData(0, 0, 1, 1).data;
}
const whole = (part) => (255 << 24) | (part[2] << 16) | (part[1] << 8) | part[0];
const mix = (a, b, t) => [0, 1, 2].map((c) => Math.round(a[c] + (b[c] - a[c]) * t));
let dimmed = null;  // For each instance whether it is outside the branch in view.

function drawMap() {
  const context = fit(mapCanvas), width = mapCanvas.width, height = mapCanvas.height, ratio = window.devicePixelRatio || 1;
  if (!width || !height) return;
  const image = context.createImageData(width, height), pixel = new Uint32Array(image.data.buffer), back = rgb("--back");
  pixel.fill(whole(back));
  const sx = transform.k * width / GRID, sy = transform.k * height / GRID, ox = transform.x * ratio, oy = transform.y * ratio;
  // Dots of few instances are larger.
  const least = Math.min(Math.max(1.5, 150 / Math.sqrt(points.count)), 4);
  const size = Math.max(1, Math.round(ratio * Math.min(least * Math.sqrt(transform.k), 5)));
  let shown = 0;
  // Calls put(pixel, instance) for the corner of each dot in sight; stamp() fills a dot from its corner.
  function dots(at, members, wide, put) {
    const right = width - wide, bottom = height - wide;
    for (let j = 0; j < members.length; j++) {
      const i = members[j], x = (at[2 * i] * sx + ox) | 0, y = ((GRID - at[2 * i + 1]) * sy + oy) | 0;
      if (x < 0 || y < 0 || x > right || y > bottom) continue;
      shown++;
      put(y * width + x, i);
    }
  }
  function stamp(p, paint, wide) {
    for (let row = p, last = p + wide * width; row < last; row += width) for (let q = row; q < row + wide; q++) pixel[q] = paint;
  }
  for (const layer of LAYERS) {
    if (!layer.on) continue;
    const colour = rgb("--" + layer.name), paint = whole(colour), faint = whole(mix(back, colour, 0.25));
    if (layer.name === "pool") {
      const counts = new Uint16Array(width * height), pale = whole(mix(back, colour, 0.15));
      let most = 1;
      dots(points.at, layer.members, size, (p, i) => {
        if (dimmed && dimmed[i]) return stamp(p, pale, size);
        if (counts[p] < 65535) counts[p]++;
        if (counts[p] > most) most = counts[p];
      });
      const shades = Array.from({ length: 65 }, (_, i) => whole(mix(back, colour, 0.3 + 0.7 * i / 64)));
      for (let p = 0; p < counts.length; p++) if (counts[p]) stamp(p, shades[Math.round(64 * Math.log1p(counts[p] - 1) / Math.log1p(most))], size);
    } else if (layer.name === "target") {
      dots(points.target, layer.members, size + 1, (p) => stamp(p, paint, size + 1));
    } else {
      dots(points.at, layer.members, size + 1, (p, i) => stamp(p, dimmed && dimmed[i] ? faint : paint, size + 1));
    }
  }
  context.putImageData(image, 0, 0);
  if (mark !== null) {
    const [x, y] = onScreen(mark);
    context.strokeStyle = style("--text"); context.lineWidth = 2;
    context.beginPath(); context.arc(x, y, 8, 0, 2 * Math.PI); context.stroke();
  }
  mapCanvas.dataset.drawn = shown;
}
function onScreen(i) {
  return [transform.x + transform.k * points.at[2 * i] / GRID * mapCanvas.clientWidth,
    transform.y + transform.k * (GRID - points.at[2 * i + 1]) / GRID * mapCanvas.clientHeight];
}
function pointAt(event) {
  const box = mapCanvas.getBoundingClientRect(), width = mapCanvas.clientWidth, height = mapCanvas.clientHeight;
  const x = (event.clientX - box.left - transform.x) / transform.k / width * GRID, y = GRID - (event.clientY - box.top - transform.y) / transform.k / height * GRID;
  // Built when the pointer first comes: a page that nobody points at opens sooner.
  index ??= d3.quadtree().x((i) => points.at[2 * i]).y((i) => points.at[2 * i + 1]).addAll(Array.from({ length: points.count }, (_, i) => i));
  const i = index.find(x, y, 8 / transform.k / Math.min(width, height) * GRID);
  return i === undefined ? null : i;
}
let waiting = false;
function drawMapSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawMap(); });
}
const mapZoom = d3.zoom().scaleExtent([1, 60]).on("zoom", (event) => { transform = event.transform; hideTip(); drawMapSoon(); })
  // The page scrolls where the wheel does not zoom further out.
  .filter((event) => !event.button && (event.type !== "wheel" || event.ctrlKey || event.deltaY < 0 || transform.k > 1));
d3.select(mapCanvas).call(mapZoom).on("dblclick.zoom", null);
element("map-reset").onclick = () => { d3.select(mapCanvas).call(mapZoom.transform, d3.zoomIdentity); };
mapCanvas.onmousemove = (event) => {
  if (event.buttons) return hideTip();
  const i = pointAt(event);
  if (i === null) return hideTip();
  const tags = Array.from(points.leaves.subarray(points.bounds[i], points.bounds[i + 1]), (v) => nodes.name[v]);
  const sample = data.samples.find((s) => s.id === points.ids[i] && s.source === points.source(i));
  showTip(event, `${points.ids[i]}\n${points.state[i] & CHOSEN ? "selected" : "left out"} · ${points.source(i)}\n${tags.join(", ")}` +
    (points.branch[i] >= 0 ? `\nbranch ${nodes.name[points.branch[i]]}` : "") + (sample ? "\n" + sample.text.slice(0, 160) : ""));
};
mapCanvas.onmouseleave = hideTip;
mapCanvas.onclick = (event) => { const i = pointAt(event); if (i !== null) goToPoint(i); };

for (const layer of LAYERS) {
  if (layer.name === "target" && !points.target.length || layer.name === "other" && !nodes.other_share) { layer.on = false; continue; }
  const label = make("label", undefined, element("map-groups"), "layer"), box = make("input", undefined, label);
  box.type = "checkbox"; box.checked = true; box.dataset.layer = layer.name;
  make("i", undefined, label).style.background = `var(--${layer.name})`;
  label.append(layer.title);
  box.onchange = () => { layer.on = box.checked; drawMapSoon(); };
}
element("map-note").textContent = "Instances lie near others with like tags: t-SNE of the tree's branches, each instance between the three nearest. Distances between far groups mean little. " +
  (points.count < data.points.total ? `Shown: ${number.format(points.count)} of ${number.format(data.points.total)} instances, those selected and random others.` : `Shown: all ${number.format(points.count)} instances.`);
afterZoom.push(() => {
  if (focus === 0) dimmed = null;
  else { dimmed = new Uint8Array(points.count); for (let i = 0; i < points.count; i++) dimmed[i] = inFocus(i) ? 0 : 1; }
  drawMapSoon();
});
