// What every page draws with. Colours come from the style sheet, so that a chart is right in the light and in
// the dark, also when that changes while the page is open.
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (name) => style(`--${name}`) || style("--other");
const axis = (more = {}) => ({
  fixedrange: true, gridcolor: style("--grid"), zerolinecolor: style("--line"), linecolor: style("--line"), automargin: true, ...more,
});
const drawings = [];
// `make` tells { traces, layout, config } of a chart, each time that it is drawn
const draw = (id, make) => {
  drawings.push([id, make]);
  const { traces, layout, config } = make();
  return Plotly.react(id, traces, {
    showlegend: false, margin: { l: 44, r: 8, t: 12, b: 26 }, hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: style("--soft") },
    hoverlabel: { bgcolor: style("--paper"), bordercolor: style("--line"), font: { color: style("--ink") } },
    ...layout,
  }, { displayModeBar: false, responsive: true, ...config });
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [id, make] of drawings.splice(0)) draw(id, make);
});
