const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const CONFIG = {displaylogo: false, showSendToCloud: false, responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};

// Figures of what is folded up are drawn when it is opened.
const element = (name) => document.getElementById(name), names = Object.keys(FIGURES);
const drawn = (name) => element(name).classList.contains("js-plotly-plot");
const unfolded = (name) => !element(name).closest("details:not([open])");
const paint = (name) => Plotly.newPlot(name, FIGURES[name].data, painted(FIGURES[name]).layout, CONFIG);
const DRAWN = Promise.all(names.filter(unfolded).map(paint));
document.addEventListener("toggle", () => names.filter((name) => unfolded(name) && !drawn(name)).forEach(paint), true);
DARK.addEventListener("change", () =>
  names.filter(drawn).forEach((name) => Plotly.relayout(name, colours(FIGURES[name].layout))));
