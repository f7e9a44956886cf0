"use strict";
const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const CONFIG = {displaylogo: false, showSendToCloud: false, responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
const DARK = matchMedia("(prefers-color-scheme: dark)");

// A figure knows no colours of the page; they follow the reader's scheme, also while it is open.
function colours(layout) {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const look = {"font.color": css("--ink"), "hoverlabel.bgcolor": css("--tint"), "hoverlabel.font.color": css("--ink"),
    "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": css("--soft"), "modebar.activecolor": css("--accent")};
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    Object.assign(look, {[axis + ".gridcolor"]: css("--grid"), [axis + ".linecolor"]: css("--line")});
  }
  if (layout.coloraxis) look["coloraxis.colorscale"] = layout.meta.scales[DARK.matches ? "dark" : "light"];
  return look;
}
function paint(name) {
  Plotly.relayout(name, colours(FIGURES[name].layout));
}
for (const [name, figure] of Object.entries(FIGURES)) {
  Plotly.newPlot(name, figure.data, figure.layout, CONFIG).then(() => paint(name));
}
DARK.addEventListener("change", () => Object.keys(FIGURES).forEach(paint));
