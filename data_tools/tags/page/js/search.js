// Search in names of tags, texts of samples and ids of instances; a hit is gone to.
const SHOWN_HITS = { tags: 50, texts: 20, ids: 20 };
let active = -1;
const texts = data.samples.map((s) => `${s.text}\n${s.id}\n${s.source}`.toLowerCase());
const ids = points.ids.map((id) => id.toLowerCase());

function around(text, at, length) {
  const start = Math.max(0, at - 30);
  return (start ? "… " : "") + text.slice(start, at + length + 60).replace(/\s+/g, " ");
}
function heading(text, list) { make("li", text, list, "heading"); }
function hit(text, note, list, action) {
  const item = make("li", undefined, list);
  make("span", text, item); make("span", note, item);
  item.onmousedown = (event) => { event.preventDefault(); list.hidden = true; action(); };
}
function search() {
  const text = element("search").value.trim().toLowerCase(), list = element("found");
  list.replaceChildren(); active = -1;
  if (!text) { matches = null; list.hidden = true; draw(); return; }
  const tags = [];
  for (let v = 0; v < total; v++) if (nodes.name[v].toLowerCase().includes(text)) tags.push(v);
  // A text that only samples or ids have dims no tag.
  matches = tags.length ? new Set() : null;
  for (const v of tags) for (let up = v; up >= 0 && !matches.has(up); up = nodes.parent[up]) matches.add(up);
  // The name itself first, then names that start with it, then the most frequent.
  const rank = (v) => { const name = nodes.name[v].toLowerCase(); return name === text ? 0 : name.startsWith(text) ? 1 : 2; };
  tags.sort((a, b) => rank(a) - rank(b) || nodes.pool[b] - nodes.pool[a]);
  if (tags.length) heading(`${number.format(tags.length)} branches and tags` + (tags.length > SHOWN_HITS.tags ? `, the first ${SHOWN_HITS.tags} shown` : ""), list);
  for (const v of tags.slice(0, SHOWN_HITS.tags)) {
    hit(nodes.name[v], `${children[v].length ? "branch" : "tag"}, ${number.format(nodes.selected[v])} of ${number.format(nodes.pool[v])}`, list, () => { zoom(v); element("tree").scrollIntoView({ block: "start" }); });
  }
  const inTexts = [];
  texts.forEach((each, i) => { const at = each.indexOf(text); if (at >= 0) inTexts.push([i, at]); });
  if (inTexts.length) heading(`${number.format(inTexts.length)} of ${number.format(texts.length)} samples` + (inTexts.length > SHOWN_HITS.texts ? `, the first ${SHOWN_HITS.texts} shown` : ""), list);
  for (const [i, at] of inTexts.slice(0, SHOWN_HITS.texts)) {
    const sample = data.samples[i];
    hit(around(`${sample.text}\n${sample.id}\n${sample.source}`, at, text.length), sample.selected ? "selected" : "", list, () => { goToSample(sample); });
  }
  const inIds = [];
  for (let i = 0; i < ids.length && inIds.length <= SHOWN_HITS.ids; i++) if (ids[i].includes(text)) inIds.push(i);
  if (inIds.length) heading("ids", list);
  for (const i of inIds.slice(0, SHOWN_HITS.ids)) hit(points.ids[i], points.state[i] & CHOSEN ? "selected" : "", list, () => { goToPoint(i); element("branch").scrollIntoView({ block: "nearest" }); });
  if (!tags.length && !inTexts.length && !inIds.length) make("li", "no tag, sample or id has this", list, "heading");
  list.hidden = false;
  draw();
}
element("search").oninput = search;
element("search").onfocus = () => { if (element("search").value) element("found").hidden = false; };
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
