// The table: sorted by a click on a head; what is secondary is hidden on narrow pages until asked for.
const table = document.getElementById("results");
const units = {k: 1e3, M: 1e6, G: 1e9, T: 1e12};
function value(cell) {
  const found = cell.textContent.replaceAll(",", "").match(/^([+-]?[\d.]+)(?: ([kMGT])\b)?/);
  return found ? Number(found[1]) * (units[found[2]] ?? 1) : NaN;
}
function order(a, b, sign) {
  const x = value(a), y = value(b);
  if (isNaN(x) && isNaN(y)) return sign * a.textContent.localeCompare(b.textContent);
  return isNaN(x) - isNaN(y) || sign * (x - y);
}
table.tHead.addEventListener("click", (event) => {
  const head = event.target.closest("th");
  if (!head) return;
  const down = head.ariaSort === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => order(a.cells[head.cellIndex], b.cells[head.cellIndex], down ? -1 : 1));
  table.tBodies[0].append(...rows);
});
document.getElementById("more").addEventListener("click", (event) => {
  const brief = table.classList.toggle("brief");
  event.target.textContent = brief ? "all columns" : "fewer columns";
});

// Which entries the curves and the balance show, what of them, and against what.
const buttons = [...document.querySelectorAll("button.entry")];
const axis = document.getElementById("axis"), kinds = document.getElementById("kinds");
function show() {
  const pressed = buttons.map((button) => button.getAttribute("aria-pressed") === "true");
  for (const name of ["curves", "balance"]) {
    const traces = FIGURES[name].data;
    const wanted = traces.map((trace) => pressed[trace.meta.entry] &&
      (name !== "curves" || kinds.value === "both" || kinds.value === trace.meta.kind));
    Plotly.restyle(name, {visible: wanted});
  }
}
for (const button of buttons) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
    show();
  });
}
document.getElementById("everyone").addEventListener("click", () => {
  const all = buttons.every((button) => button.getAttribute("aria-pressed") === "true");
  for (const button of buttons) button.setAttribute("aria-pressed", all ? button.dataset.first : "true");
  show();
});
kinds.addEventListener("change", show);
axis.addEventListener("change", () => {
  Plotly.restyle("curves", {x: FIGURES.curves.data.map((trace) => trace.meta.x[axis.value])});
  Plotly.relayout("curves", {"xaxis.title.text": axis.selectedOptions[0].textContent, "xaxis.autorange": true});
});
show();

// The loads of all seeds of one entry and routed site.
if (FIGURES.loads) {
  const entry = document.getElementById("router"), site = document.getElementById("site");
  const {loads} = FIGURES.loads.layout.meta;
  const draw = () => {
    const seeds = loads[entry.value][site.value];
    Plotly.restyle("loads", {x: seeds.map((drawn) => drawn.steps), z: seeds.map((drawn) => drawn.share)});
  };
  for (const picker of [entry, site]) picker.addEventListener("change", draw);
}
