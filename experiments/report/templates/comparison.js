// All that a reader chooses is in the page's address, after the #: a link shows the same again.
const state = new URLSearchParams(location.hash.slice(1));
const byId = (id) => document.getElementById(id);
function keep(name, value, plain = "") {
  if (value === plain) state.delete(name); else state.set(name, value);
  history.replaceState(null, "", "#" + state);
}

// Tables: sorted by a click on a head, numbers before what has none; rows without a reader's words are hidden.
const sheets = [...document.querySelectorAll("table.sheet")];
const key = (cell) => "key" in cell.dataset ? Number(cell.dataset.key) : NaN;
function order(a, b, sign) {
  const x = key(a), y = key(b);
  if (isNaN(x) && isNaN(y)) return sign * a.textContent.localeCompare(b.textContent);
  return isNaN(x) - isNaN(y) || sign * (x - y);
}
function sort(by) {
  for (const table of sheets) {
    const heads = [...table.tHead.rows[0].cells];
    const plain = heads.some((head) => head.textContent === by), down = !plain && by.startsWith("-");
    const head = heads.find((head) => head.textContent === (down ? by.slice(1) : by));
    if (!head) continue;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => order(a.cells[head.cellIndex], b.cells[head.cellIndex], down ? -1 : 1));
    table.tBodies[0].append(...rows);
  }
}
for (const table of sheets) {
  table.tHead.addEventListener("click", (event) => {
    const title = event.target.closest("th")?.textContent;
    if (title === undefined) return;
    keep("sort", state.get("sort") === title ? "-" + title : title);
    sort(state.get("sort"));
  });
}
const words = byId("filter");
function filter() {
  const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const table of sheets.filter((table) => !table.closest("details"))) {  // a run is shown whole
    for (const row of table.tBodies[0].rows) {
      row.classList.toggle("unfit", !wanted.every((word) => row.textContent.toLowerCase().includes(word)));
    }
  }
}
words.addEventListener("input", () => { keep("filter", words.value); filter(); });
byId("more")?.addEventListener("click", (event) => {
  const brief = byId("view-results").parentNode.querySelector("table.sheet").classList.toggle("brief");
  event.target.textContent = brief ? "all columns" : "fewer columns";
});
function reveal(run) {
  const details = byId("run-" + run);
  if (details) { details.open = true; details.scrollIntoView(); }
}
for (const cell of document.querySelectorAll("[data-run]")) {
  cell.addEventListener("click", () => { keep("run", cell.dataset.run); reveal(cell.dataset.run); });
}

// Which entries are shown, what of their losses, and against what.
const buttons = [...document.querySelectorAll("button.entry")];
const axis = byId("axis"), kinds = byId("kinds");
const pressed = (button) => button.getAttribute("aria-pressed") === "true";
function show() {
  const chosen = new Set(buttons.filter(pressed).map((button) => button.dataset.hash));
  for (const name of ["curves", "balance", "health", "regret"].filter((name) => FIGURES[name])) {
    const wanted = FIGURES[name].data.map(({meta}) => (!meta.entry || chosen.has(meta.entry)) &&
      (name !== "curves" || kinds.value === "both" || kinds.value === meta.kind));
    Plotly.restyle(name, {visible: wanted});
  }
  for (const part of document.querySelectorAll("table.sheet [data-entry]")) {
    part.classList.toggle("unchosen", !chosen.has(part.dataset.entry));
  }
}
function choose() {
  const first = buttons.every((button) => pressed(button) === (button.dataset.first === "true"));
  keep("entries", first ? "" : buttons.filter(pressed).map((button) => button.dataset.hash).join(","));
  show();
}
for (const button of buttons) {
  button.addEventListener("click", () => { button.setAttribute("aria-pressed", !pressed(button)); choose(); });
}
byId("everyone")?.addEventListener("click", () => {
  const all = buttons.every(pressed);
  for (const button of buttons) button.setAttribute("aria-pressed", all ? button.dataset.first : "true");
  choose();
});
function turn() {
  for (const name of ["curves", "health"].filter((name) => FIGURES[name])) {
    const {data, layout} = FIGURES[name], named = {};
    for (const part of Object.keys(layout).filter((part) => byId(name)._fullLayout[part] && part.startsWith("xaxis"))) {
      named[part + ".autorange"] = true;
      if (layout[part].title?.text) named[part + ".title.text"] = axis.selectedOptions[0].textContent;
    }
    Plotly.update(name, {x: data.map((trace) => trace.meta.x[axis.value])}, named);
  }
}
kinds?.addEventListener("change", () => { keep("kinds", kinds.value, "both"); show(); });
axis?.addEventListener("change", () => { keep("axis", axis.value, "tokens"); turn(); });

// The loads of all seeds of one entry and routed site.
const entry = byId("entry"), site = byId("site");
function draw() {
  const seeds = FIGURES.loads.layout.meta.loads[entry.selectedIndex][site.selectedIndex];
  Plotly.restyle("loads", {x: seeds.map((drawn) => drawn.steps), z: seeds.map((drawn) => drawn.share)});
}
if (FIGURES.loads) {
  for (const picker of [entry, site]) {
    picker.addEventListener("change", () => { keep(picker.id, picker.value, picker.options[0].value); draw(); });
  }
}

// What the address says.
const listed = state.get("entries")?.split(",");
for (const button of listed ? buttons : []) button.setAttribute("aria-pressed", listed.includes(button.dataset.hash));
for (const picker of [axis, kinds, entry, site].filter(Boolean)) {
  const said = [...picker.options].some((option) => option.value === state.get(picker.id));
  if (said) picker.value = state.get(picker.id);
}
words.value = state.get("filter") ?? "";
filter();
if (state.has("sort")) sort(state.get("sort"));
DRAWN.then(() => {
  show();
  if (axis && state.has("axis")) turn();
  if (FIGURES.loads && (state.has("entry") || state.has("site"))) draw();
  if (state.has("run")) reveal(state.get("run"));
});
