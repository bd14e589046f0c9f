// Draws every entry of `charts` into the element of its name.
const bars = ({ series }) => ({
  traces: series.map(({ name, values, low, high }) => ({
    type: "bar", name, x: [name], y: values, marker: { color: colour(name) }, width: 0.62,
    error_y: {
      type: "data", symmetric: false, visible: values[0] !== null && low[0] !== high[0], color: style("--ink"), thickness: 1, width: 4,
      array: [high[0] - values[0]], arrayminus: [values[0] - low[0]],
    },
    hovertemplate: `${name}: %{y:,.4~g}<extra></extra>`,
  })),
  layout: {
    xaxis: axis({ showgrid: false, showticklabels: false, categoryarray: series.map((line) => line.name), categoryorder: "array" }),
    yaxis: axis({ rangemode: "tozero", nticks: 5, tickformat: Math.max(...series.map((line) => line.high[0])) < 1000 ? "~g" : "~s" }),
  },
});
const lines = ({ series, labels }) => ({
  traces: series.map(({ name, values }) => ({
    type: "scatter", mode: "lines+markers", name, x: labels, y: values,
    line: { color: colour(name), width: 2 }, marker: { color: colour(name), size: 9 },
    hovertemplate: `${name}, %{x}: %{y:,.4~g} µs<extra></extra>`,
  })),
  layout: {
    xaxis: axis({ range: [-0.3, 2.3] }),
    yaxis: axis({ type: "log", dtick: "D2", tickformat: "~s" }),
  },
});
for (const [name, chart] of Object.entries(charts)) {
  draw(name, () => (chart.kind === "bars" ? bars(chart) : lines(chart)));
}
