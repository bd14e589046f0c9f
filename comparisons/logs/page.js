// The charts of `triptych logs page`.
const time = (us) => us < 1e3 ? `${us} µs` : us < 1e6 ? `${(us / 1e3).toPrecision(3)} ms` : `${(us / 1e6).toPrecision(3)} s`;
const nines = [Math.log10(2), 1, 2, 3, 4, 5];
const percents = ["p50", "p90", "p99", "p99.9", "p99.99", "p99.999"];
const percent = (x) => (100 * (1 - 10 ** -x)).toFixed(Math.max(0, Math.ceil(x) - 1));
const decades = Array.from({ length: 12 }, (_, power) => 10 ** power);

for (const [timer, curves] of Object.entries(charts.curves)) {
  draw(timer, () => ({
    traces: Object.entries(curves).map(([engine, { x, y, sessions }]) => ({
      // 0 has no place on a logarithmic axis
      type: "scatter", mode: "lines", name: engine, x, y: y.map((us) => Math.max(us, 1)), line: { color: colour(engine), width: 2, shape: "hv" },
      hovertext: y.map((us, at) => `${engine}: ${percent(x[at])} % of ${sessions.toLocaleString("en")} took at most ${time(us)}`), hoverinfo: "text",
    })),
    layout: {
      xaxis: axis({ tickvals: nines, ticktext: percents, tickangle: 0, tickfont: { size: 11 } }),
      yaxis: axis({ type: "log", tickvals: decades, ticktext: decades.map(time) }),
    },
  }));
}

const { start_ms, step_ms, series } = charts.time;
const over = ["open", "opened", "bad"];
for (const what of over) {
  draw(what, () => ({
    traces: charts.engines.map((engine) => ({
      type: "scatter", mode: "lines", name: engine, x: series[engine][what].map((_, step) => start_ms + step * step_ms), y: series[engine][what],
      line: { color: colour(engine), width: 1.5, shape: "hv" }, hovertemplate: `${engine}: %{y:,.4~g}<br>%{x|%H:%M:%S.%L}<extra></extra>`,
    })),
    layout: { xaxis: axis({ type: "date", fixedrange: false }), yaxis: axis({ rangemode: "tozero", tickformat: "~s", nticks: 5 }) },
  }));
}
// what is seen of one is seen of all
for (const what of over) {
  document.getElementById(what).on("plotly_relayout", (change) => {
    const range = change["xaxis.range[0]"] ? { "xaxis.range": [change["xaxis.range[0]"], change["xaxis.range[1]"]] } : { "xaxis.autorange": true };
    if (!("xaxis.range[0]" in change || "xaxis.autorange" in change)) return;
    for (const other of over) {
      const its = document.getElementById(other);
      const same = "xaxis.range" in range ? its.layout.xaxis.range.every((end, at) => end === range["xaxis.range"][at]) : its.layout.xaxis.autorange;
      if (!same) Plotly.relayout(its, range);
    }
  });
}

// A lane is free again a little after the session in it was closed, so that two of them do not look like one.
const all = Object.values(charts.sessions).flat();
const gap = (Math.max(...all.map(([start, took]) => start + took)) - Math.min(...all.map(([start]) => start))) / 500;
const lanes = (sessions) => {
  const ends = [];
  return sessions.map(([start, took]) => {
    let lane = ends.findIndex((end) => end + gap <= start);
    if (lane < 0) lane = ends.length;
    ends[lane] = start + took;
    return lane;
  });
};
const place = charts.engines.map((engine) => lanes(charts.sessions[engine]));
const named = (session) => Object.fromEntries(charts.details.map((name, at) => [name, session[at + 2]]));
const inOrder = (session) => [null, "--"].includes(named(session).termination);
const moment = (ms) => new Date(ms).toISOString().replace("T", " ").slice(0, 23);

const timeline = draw("timeline", () => {
  const layout = { barmode: "overlay", bargap: 0.15, dragmode: "zoom", margin: { l: 8, r: 8, t: 8, b: 30 }, annotations: [] };
  layout.xaxis = axis({ type: "date", fixedrange: false, anchor: `y${charts.engines.length}`.replace(/y1$/, "y"), side: "bottom" });
  const traces = charts.engines.map((engine, number) => {
    const sessions = charts.sessions[engine];
    const suffix = number ? number + 1 : "";
    const height = 1 / charts.engines.length;
    layout[`yaxis${suffix}`] = axis({
      domain: [1 - (number + 1) * height + 0.01, 1 - number * height - 0.045], autorange: "reversed", showticklabels: false, showgrid: false, zeroline: false,
    });
    layout.annotations.push({
      text: engine, xref: "paper", yref: "paper", x: 0, y: 1 - number * height, xanchor: "left", yanchor: "top", yshift: 4, showarrow: false,
      font: { color: colour(engine), size: 13, weight: 700 },
    });
    const paint = sessions.map((session) => (inOrder(session) ? colour(engine) : style("--ink")));
    return {
      type: "bar", orientation: "h", name: engine, base: sessions.map(([start]) => start), x: sessions.map(([, took]) => took), y: place[number],
      yaxis: `y${suffix}`, xaxis: "x", marker: { color: paint, line: { color: paint, width: 1 } },
      hovertext: sessions.map((session) => {
        const { termination, history, upstream } = named(session);
        return [`${engine}, ${time(Math.round(session[1] * 1000))}`, [termination, history, upstream].filter(Boolean).join(" "), moment(session[0])].join("<br>").replace(/<(?!br>)/g, "&lt;");
      }),
      hoverinfo: "text",
    };
  });
  return { traces, layout, config: { scrollZoom: true } };
});
timeline.then((graph) => graph.on("plotly_click", ({ points: [point] }) => {
  const engine = charts.engines[point.curveNumber];
  const [start, took] = charts.sessions[engine][point.pointNumber];
  const told = { engine, opened: moment(start), duration: time(Math.round(took * 1000)), ...named(charts.sessions[engine][point.pointNumber]) };
  const list = document.getElementById("session");
  list.replaceChildren(...Object.entries(told).filter(([, value]) => value !== null).flatMap(([name, value]) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
  list.hidden = false;
}));
