const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const CONFIG = {displaylogo: false, showSendToCloud: false, responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};

function paint(name) {
  Plotly.relayout(name, colours(FIGURES[name].layout));
}
const DRAWN = Promise.all(Object.entries(FIGURES).map(([name, figure]) =>
  Plotly.newPlot(name, figure.data, painted(figure).layout, CONFIG)));
DARK.addEventListener("change", () => Object.keys(FIGURES).forEach(paint));
