// The branches of the one in view, and its samples, tags and instances.
const COLUMNS = [
  ["branch", (v) => nodes.name[v], (v) => nodes.name[v]],
  ["with a tag: pool", (v) => nodes.pool[v], (v) => number.format(nodes.pool[v])],
  ["with a tag: selected", (v) => nodes.selected[v], (v) => number.format(nodes.selected[v])],
  ["tags covered", (v) => nodes.coverage[v], (v) => percent(nodes.coverage[v])],
  ["quality: pool", (v) => nodes.pool_quality[v], (v) => score(nodes.pool_quality[v])],
  ["quality: selected", (v) => nodes.selected_quality[v], (v) => score(nodes.selected_quality[v])],
];
const OWN = [
  ["own: pool", (v) => own.has(v) ? own.get(v).pool : null, (v) => own.has(v) ? number.format(own.get(v).pool) : "–"],
  ["own: selected", (v) => own.has(v) ? own.get(v).selected : null, (v) => own.has(v) ? number.format(own.get(v).selected) : "–"],
];
let sorted = { column: 1, falling: true };
const SHOWN_BRANCHES = 300, SHOWN_SAMPLES = 40, SHOWN_INSTANCES = 500, SHOWN_TAGS = 100;
const shareGroups = Object.keys(GROUPS).filter((name) => nodes[name + "_share"]);

function showBranches() {
  const list = children[focus].length ? [...children[focus]] : [focus];
  const hasOwn = list.some((v) => own.has(v)), columns = hasOwn ? [COLUMNS[0], ...OWN, ...COLUMNS.slice(1)] : COLUMNS;
  const column = columns[Math.min(sorted.column, columns.length - 1)], value = column[1];
  list.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (sorted.falling ? -1 : 1);
  });
  element("branches-title").textContent = `Branches of ${nodes.name[focus]} (${number.format(list.length)})`;
  element("branches-note").textContent = hasOwn
    ? data.own.note + " With a tag: an instance counts in every branch that holds a tag of it."
    : "An instance counts in every branch that holds a tag of it.";
  const head = make("tr"), body = make("tbody");
  columns.forEach(([title], i) => {
    const cell = make("th", title + (columns[i] === column ? (sorted.falling ? " ▾" : " ▴") : ""), head);
    cell.onclick = () => { sorted = { column: i, falling: i === sorted.column ? !sorted.falling : i > 0 }; showBranches(); };
  });
  const title = make("th", "share of tags: ", head, "shares");
  shareGroups.forEach((name, i) => { make("span", (i ? ", " : "") + GROUPS[name], title).style.color = `var(--${name})`; });
  const widest = list.reduce((most, v) => shareGroups.reduce((m, name) => Math.max(m, nodes[name + "_share"][v]), most), 1e-12);
  for (const v of list.slice(0, SHOWN_BRANCHES)) {
    const row = make("tr", undefined, body);
    for (const [, , text] of columns) make("td", text(v), row);
    row.firstChild.title = nodes.name[v];
    const bars = make("td", undefined, row, "shares");
    for (const name of shareGroups) {
      const bar = make("i", undefined, bars);
      bar.style.width = 100 * nodes[name + "_share"][v] / widest + "%";
      bar.style.background = `var(--${name})`;
      bar.title = `${GROUPS[name]} ${percent(nodes[name + "_share"][v])}`;
    }
    row.onclick = () => zoom(v);
  }
  const header = make("thead");
  header.append(head);
  element("branches").replaceChildren(header, body);
  if (list.length > SHOWN_BRANCHES) {
    const cell = make("td", `and ${number.format(list.length - SHOWN_BRANCHES)} more: use the search box`, make("tr", undefined, body));
    cell.colSpan = columns.length + 1;
  }
}

let found = null;  // A sample that the search or the map went to.
function sampleArticle(sample, parent) {
  const article = make("article", undefined, parent), header = make("header", undefined, article);
  if (sample === found) article.className = "found";
  make("b", sample.selected ? "selected" : "not selected", header, sample.selected ? "chosen" : "");
  if (nodes.other_share) header.append(sample.other ? " · in the other run" : " · not in the other run");
  if (sample.typical) header.append(" · typical of its branch");
  header.append(` · ${sample.id} · ${sample.source} · quality ${score(sample.quality)}, difficulty ${score(sample.difficulty)}`);
  const tags = make("div", undefined, article, "chips");
  for (const leaf of sample.leaves) make("button", nodes.name[leaf], tags).onclick = () => zoom(leaf);
  make("p", sample.text, article);
  return article;
}

function showSamples() {
  const inside = data.samples.filter((s) => s === found || s.leaves.some(within));
  // Those found first, then the typical ones of this branch itself, then others.
  const rank = (s) => (s === found ? 0 : s.typical && (within(s.branch) || focus > s.branch) ? 1 : 2);
  inside.sort((a, b) => rank(a) - rank(b));
  const chosen = inside.filter((s) => s.selected), others = inside.filter((s) => !s.selected), half = SHOWN_SAMPLES / 2;
  const shown = [...(found ? [found] : []), ...chosen.filter((s) => s !== found).slice(0, Math.max(half, SHOWN_SAMPLES - others.length)),
    ...others.filter((s) => s !== found).slice(0, Math.max(half, SHOWN_SAMPLES - chosen.length))];
  const list = element("samples");
  list.replaceChildren();
  const articles = shown.map((sample) => sampleArticle(sample, list));
  list.scrollTop = 0;
  if (found) articles[0].scrollIntoView({ block: "nearest" });
  if (!inside.length) make("div", "No sample of this branch is in the report.", list, "empty");
  else if (inside.length > shown.length) make("div", `${number.format(inside.length)} samples of this branch are in the report; the search finds all.`, list, "empty");
}

function showTags() {
  const leaves = [];
  for (let v = focus; v < end[focus]; v++) if (!children[v].length) leaves.push(v);
  leaves.sort((a, b) => nodes.pool[b] - nodes.pool[a]);
  const table = make("table"), head = make("tr", undefined, make("thead", undefined, table)), body = make("tbody", undefined, table);
  for (const title of ["tag", "pool", "selected", "selected of pool"]) make("th", title, head);
  for (const v of leaves.slice(0, SHOWN_TAGS)) {
    const row = make("tr", undefined, body);
    make("td", nodes.name[v], row).title = nodes.name[v];
    make("td", number.format(nodes.pool[v]), row); make("td", number.format(nodes.selected[v]), row);
    make("td", nodes.pool[v] ? percent(nodes.selected[v] / nodes.pool[v]) : "–", row);
    row.onclick = () => zoom(v);
  }
  element("tags").replaceChildren(table);
  if (leaves.length > SHOWN_TAGS) make("div", `the ${SHOWN_TAGS} most frequent of ${number.format(leaves.length)} tags`, element("tags"), "empty");
}

function rowsInFocus() {
  const rows = [];
  for (let i = 0; i < points.count; i++) if (inFocus(i)) rows.push(i);
  return rows;
}
const listNote = () => points.count < data.points.total ? ` of the ${number.format(points.count)} that this page holds of ${number.format(data.points.total)}` : "";

function showInstances() {
  const rows = rowsInFocus();
  rows.sort((a, b) => (points.state[b] & CHOSEN) - (points.state[a] & CHOSEN) || a - b);
  const table = make("table"), head = make("tr", undefined, make("thead", undefined, table)), body = make("tbody", undefined, table);
  for (const title of ["id", "source", "", "quality"]) make("th", title, head);
  for (const i of rows.slice(0, SHOWN_INSTANCES)) {
    const row = make("tr", undefined, body);
    make("td", points.ids[i], row).title = points.ids[i];
    make("td", points.source(i), row);
    make("td", points.state[i] & CHOSEN ? "selected" : "", row, "chosen");
    make("td", points.quality[i] ? score(points.quality[i] / 25) : "–", row);
    row.onclick = () => goToPoint(i);
  }
  element("instances").replaceChildren(make("div", `${number.format(rows.length)} instances with a tag here${listNote()}` +
    (rows.length > SHOWN_INSTANCES ? `, the first ${SHOWN_INSTANCES} shown` : ""), undefined, "empty"), table);
}

// The instances of the branch in view as JSON lines, with what this page knows of them.
function branchLines() {
  return rowsInFocus().map((i) => JSON.stringify({
    id: points.ids[i], source: points.source(i), selected: Boolean(points.state[i] & CHOSEN),
    quality: points.quality[i] ? points.quality[i] / 25 : null, branch: points.branch[i] < 0 ? null : nodes.name[points.branch[i]],
    tags: Array.from(points.leaves.subarray(points.bounds[i], points.bounds[i + 1]), (v) => nodes.name[v]),
  }) + "\n");
}
element("download").onclick = () => {
  const link = document.createElement("a"), file = nodes.name[focus].normalize("NFKD").replace(/[^a-zA-Z0-9]+/g, "-").slice(0, 40) || "branch";
  link.href = URL.createObjectURL(new Blob(branchLines(), { type: "application/jsonl" }));
  link.download = `${file}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

const TABS = { samples: showSamples, tags: showTags, instances: showInstances };
let tab = "samples";
function showBranch() {
  element("branch-title").textContent = nodes.name[focus];
  for (const name of Object.keys(TABS)) element(name).hidden = name !== tab;
  for (const button of document.querySelectorAll("[data-tab]")) button.setAttribute("aria-selected", button.dataset.tab === tab);
  TABS[tab]();
}
for (const button of document.querySelectorAll("[data-tab]")) button.onclick = () => { tab = button.dataset.tab; showBranch(); };
function goToSample(sample) {
  found = sample; tab = "samples";
  const at = points.ids.indexOf(sample.id);
  mark = at < 0 ? null : at;
  const leaf = sample.leaves.find(within);
  zoom(leaf === undefined ? (sample.branch >= 0 ? sample.branch : 0) : focus);
  element("branch").scrollIntoView({ block: "nearest" });
}
function goToPoint(i) {
  const sample = data.samples.find((s) => s.id === points.ids[i] && s.source === points.source(i));
  mark = i;
  if (sample) return goToSample(sample);
  found = null;
  zoom(points.branch[i] >= 0 ? points.branch[i] : 0);
}
afterZoom.push(showBranches, showBranch, () => { found = null; });
