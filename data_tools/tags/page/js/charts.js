// Comparison, distributions, sources, counts, audit and settings.
const MEASURES = {
  instances: ["instances", number.format], tag_mass_covered: ["tags covered, share of the pool's", percent], distinct_tags: ["different tags", number.format],
  effective_tags: ["tags, exp(entropy)", number.format], effective_branches: ["top branches, exp(entropy)", number.format], quality: ["mean quality", score],
  difficulty: ["mean difficulty", score], characters: ["mean characters", (x) => x === null ? "–" : number.format(Math.round(x))],
};
function showComparison() {
  const groups = Object.keys(data.comparison.measures), table = element("measures");
  const head = make("tr", undefined, make("thead", undefined, table)), body = make("tbody", undefined, table);
  for (const title of ["", ...groups]) make("th", title === "random" ? "random (mean of 5)" : title, head);
  for (const [name, [title, text]] of Object.entries(MEASURES)) {
    const row = make("tr", undefined, body);
    make("td", title, row);
    for (const group of groups) make("td", text(data.comparison.measures[group][name]), row);
  }
  const overlap = data.comparison.overlap;
  element("overlap").textContent = overlap ? Object.entries(overlap).map(([name, count]) => `${name}: ${number.format(count)}`).join(" · ") : "Another run on this pool can be shown beside this one: preprocess_tags.py report --compare DIR.";
}

const HISTOGRAM = { width: 420, height: 190, left: 44, right: 16, top: 8, bottom: 34 };
const TITLES = { quality: "quality", difficulty: "difficulty", characters: "length of an instance, characters", tokens: "length of a written sequence, tokens" };
function histogram(name, { edges, counts, log }) {
  const { width, height, left, right, top, bottom } = HISTOGRAM, figure = make("figure", undefined, element("histograms"));
  make("figcaption", TITLES[name], figure);
  const svg = d3.select(figure).append("svg").attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img").attr("aria-label", TITLES[name]);
  const groups = Object.keys(GROUPS).filter((group) => counts[group] && d3.max(counts[group]) > 0);
  const sums = Object.fromEntries(groups.map((group) => [group, counts[group].reduce((a, b) => a + b, 0)]));
  const x = (log ? d3.scaleLog : d3.scaleLinear)([edges[0], edges[edges.length - 1]], [left, width - right]);
  const y = d3.scaleLinear([0, d3.max(groups, (group) => d3.max(counts[group]) / sums[group]) || 1], [height - bottom, top]).nice();
  svg.append("g").attr("transform", `translate(0,${height - bottom})`).call(log ? d3.axisBottom(x).ticks(5, "~s") : d3.axisBottom(x).ticks(10));
  svg.append("g").attr("transform", `translate(${left},0)`).call(d3.axisLeft(y).ticks(4, "~%"));
  for (const group of groups) {
    // Steps: the pool as an area, the others as lines, so that none hides another.
    const steps = counts[group].map((count, i) => `L${x(edges[i])},${y(count / sums[group])}L${x(edges[i + 1])},${y(count / sums[group])}`).join("");
    const path = `M${x(edges[0])},${y(0)}${steps}L${x(edges[edges.length - 1])},${y(0)}`;
    svg.append("path").attr("d", path).attr("fill", group === "pool" ? "var(--pool)" : "none").attr("fill-opacity", 0.35)
      .attr("stroke", `var(--${group})`).attr("stroke-width", group === "pool" ? 0.8 : 1.8);
  }
  const legend = make("div", undefined, figure, "bar");
  for (const group of groups) {
    const label = make("span", undefined, legend, "layer");
    make("i", undefined, label).style.background = `var(--${group})`;
    label.append(`${GROUPS[group]} (${number.format(sums[group])})`);
  }
}

function showSources() {
  const groups = ["pool", "selected", ...(nodes.other_share ? ["other"] : [])], table = element("source-table");
  const head = make("tr", undefined, make("thead", undefined, table)), body = make("tbody", undefined, table);
  const sums = Object.fromEntries(groups.map((group) => [group, data.sources.reduce((sum, row) => sum + row[group], 0) || 1]));
  make("th", "source", head);
  for (const group of groups) make("th", GROUPS[group], head);
  make("th", "selected of pool", head);
  make("th", "share of instances", head, "shares");
  const widest = d3.max(data.sources, (row) => d3.max(groups, (group) => row[group] / sums[group])) || 1;
  for (const source of data.sources) {
    const row = make("tr", undefined, body);
    make("td", source.name, row).title = source.name;
    for (const group of groups) make("td", number.format(source[group]), row);
    make("td", percent(source.pool ? source.selected / source.pool : null), row);
    const bars = make("td", undefined, row, "shares");
    for (const group of groups) {
      const bar = make("i", undefined, bars);
      bar.style.width = 100 * source[group] / sums[group] / widest + "%";
      bar.style.background = `var(--${group})`;
      bar.title = `${GROUPS[group]} ${percent(source[group] / sums[group])}`;
    }
  }
}

function fillTable(table, columns, rows) {
  const head = make("thead"), body = make("tbody"), titles = make("tr", undefined, head);
  // Words to the left, numbers to the right.
  columns.forEach((title, i) => { make("th", title, titles, rows.some((values) => typeof values[i] === "string") ? "words" : ""); });
  for (const values of rows) {
    const row = make("tr", undefined, body);
    for (const value of values) {
      if (typeof value === "number") make("td", number.format(value), row);
      else make("td", value, row, value.length > 40 ? "words text" : "words");
    }
  }
  table.replaceChildren(head, body);
}

const SHOWN_ROWS = 300;
let audited = 0;
function showAudit() {
  const table = data.audit[audited], filter = element("audit-filter").value.trim().toLowerCase();
  const rows = filter ? table.rows.filter((row) => row.some((value) => String(value).toLowerCase().includes(filter))) : table.rows;
  fillTable(element("audit-table"), table.columns, rows.slice(0, SHOWN_ROWS));
  element("audit-note").textContent = `${number.format(table.total)} in all` + (table.rows.length < table.total ? `, ${number.format(table.rows.length)} of them in this page` : "") +
    (filter ? `, ${number.format(rows.length)} match` : "") + (rows.length > SHOWN_ROWS ? `, the first ${SHOWN_ROWS} shown` : "");
  for (const [i, button] of [...element("audit-tabs").children].entries()) button.setAttribute("aria-selected", i === audited);
}
data.audit.forEach((table, i) => { make("button", `${table.title} (${number.format(table.total)})`, element("audit-tabs")).onclick = () => { audited = i; showAudit(); }; });
element("audit-filter").oninput = showAudit;
