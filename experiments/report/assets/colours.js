"use strict";
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
// The same figure with the page's colours in it.
function painted(figure) {
  const layout = structuredClone(figure.layout);
  for (const [path, value] of Object.entries(colours(layout))) {
    const names = path.split("."), last = names.pop();
    names.reduce((part, name) => part[name] ??= {}, layout)[last] = value;
  }
  return {...figure, layout};
}
