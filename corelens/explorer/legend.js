// The legends: what a colour or a line on the pictures and in the grid means. explorer.css holds their colours.

const swatch = (kind) => element("i", { class: "swatch is-" + kind, "aria-hidden": "true" });

function pictureLegend(hasRegion) {  // the heat's range, the outline of the evidence, the mark of what was clicked or drawn
  const range = element("span", {});
  const mark = element("span", { class: "mark", hidden: "" }, swatch("mark"), "your patch or box");
  return {
    node: element("p", { class: "key" },
      element("span", {}, swatch("heat"), range),
      hasRegion ? element("span", {}, swatch("evidence"), "the evidence") : "",
      mark),
    showRange: (peak) => { range.textContent = `0 to ${percent(peak)} of the attention on one patch`; },
    showMark: (drawn) => { mark.hidden = !drawn; },
  };
}

function gridLegend() {  // the range of the squares' colours
  const range = element("span", { class: "legend" });
  return {
    node: element("span", { class: "key" }, swatch("level"), range),
    showRange: (highest) => { range.textContent = `0 to ${highest}`; },
  };
}
