// The page as it opens.
for (const [name, value] of data.facts) {
  const fact = make("div", undefined, element("facts"));
  make("dt", name, fact); make("dd", value, fact);
}
for (const table of data.tables) fillTable(make("table", undefined, element("tables")), table.columns, table.rows);
fillTable(element("settings-table"), data.settings.columns, data.settings.rows);
element("note").textContent = data.note;
for (const button of document.querySelectorAll("[data-part]")) button.onclick = () => element(button.dataset.part).scrollIntoView({ block: "start" });
function redraw() { draw(); showLegend(); drawMap(); }
window.addEventListener("resize", redraw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
canvas.style.height = Math.min(Math.max(levels * 44, 200), 460) + "px";
makeRamp(); showPath(); showBranches(); showBranch(); showComparison(); showSources(); showAudit();
for (const [name, each] of Object.entries(data.distributions)) histogram(name, each);
redraw();
document.documentElement.dataset.ready = "true";
