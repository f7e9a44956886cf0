const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const CONFIG = {displaylogo: false, showSendToCloud: false, responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};

function paint(name) {
  Plotly.relayout(name, colours(FIGURES[name].layout));
}
for (const [name, figure] of Object.entries(FIGURES)) {
  Plotly.newPlot(name, figure.data, figure.layout, CONFIG).then(() => paint(name));
}
DARK.addEventListener("change", () => Object.keys(FIGURES).forEach(paint));
