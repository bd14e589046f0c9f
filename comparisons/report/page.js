// Draws every entry of `charts` into the element of its name. Colours are those of the legend, everywhere.
const bars = ({ series }) => ({
  traces: series.map(({ name, values, low, high }) => ({
    type: "bar", name, x: [name], y: values, marker: { color: colours[name] }, width: 0.62,
    error_y: {
      type: "data", symmetric: false, visible: values[0] !== null && low[0] !== high[0], color: "#1b2026", thickness: 1, width: 4,
      array: [high[0] - values[0]], arrayminus: [values[0] - low[0]],
    },
    hovertemplate: `${name}: %{y:,.4~g}<extra></extra>`,
  })),
  axes: {
    xaxis: { showticklabels: false, fixedrange: true, categoryarray: series.map((line) => line.name), categoryorder: "array" },
    yaxis: { rangemode: "tozero", fixedrange: true, gridcolor: "#e8ebef", nticks: 5,
      tickformat: Math.max(...series.map((line) => line.high[0])) < 1000 ? "~g" : "~s", zerolinecolor: "#b9c0c8" },
  },
});
const lines = ({ series, labels }) => ({
  traces: series.map(({ name, values }) => ({
    type: "scatter", mode: "lines+markers", name, x: labels, y: values,
    line: { color: colours[name], width: 2 }, marker: { color: colours[name], size: 9 },
    hovertemplate: `${name}, %{x}: %{y:,.4~g} µs<extra></extra>`,
  })),
  axes: {
    xaxis: { fixedrange: true, range: [-0.3, 2.3] },
    yaxis: { type: "log", fixedrange: true, gridcolor: "#e8ebef", dtick: "D2", tickformat: "~s" },
  },
});
for (const [name, chart] of Object.entries(charts)) {
  const { traces, axes } = chart.kind === "bars" ? bars(chart) : lines(chart);
  const layout = {
    ...axes, showlegend: false, margin: { l: 44, r: 8, t: 12, b: 26 }, hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "#5b6570" },
  };
  Plotly.newPlot(name, traces, layout, { displayModeBar: false, responsive: true });
}
