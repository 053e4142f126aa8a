// What a model does and how it is set up: charts, workers, settings, and what was found out before it was believed.

import { bars, chart, stageBar } from "./charts.js";
import { h, slot } from "./dom.js";
import { count, duration, percent, plural, size } from "./format.js";
import { state } from "./state.js";
import { tree } from "./tree.js";

const STAGES = ["preprocess", "queue", "staging", "inference", "postprocess"];
const ms = (value) => duration(value);

/** Means of the stages over the points that are drawn. */
function stageMeans(points) {
  const found = [];
  for (const name of STAGES) {
    const values = points.map((point) => point.stages[name]).filter((each) => each !== undefined);
    if (values.length) found.push({ name, ms: values.reduce((a, b) => a + b, 0) / values.length });
  }
  return found;
}

/** How many batches of each size there were over those points. */
function batchSizes(points) {
  const sums = new Map();
  for (const point of points) {
    if (!point.batch_counts) continue;
    point.batch_counts.counts.forEach((number, index) => {
      if (!number) return;
      const bound = point.batch_counts.bounds[index];
      sums.set(bound ?? Infinity, (sums.get(bound ?? Infinity) || 0) + number);
    });
  }
  const most = Math.max(1, ...sums.values());
  return [...sums].sort((a, b) => a[0] - b[0]).map(([bound, number]) => (
    { label: Number.isFinite(bound) ? `up to ${bound}` : "more", text: plural(number, "batch").replace("batchs", "batches"), share: number / most }));
}

function charts(redraw) {
  const points = state.points;
  const common = { points, redraw: () => redraw(false), empty: "No requests yet" };
  const isFull = state.scope === "management";
  const all = [chart({ ...common, id: "rate", title: "Requests a second", series: [{ name: "rate", label: "all", form: count }, { name: "failures", label: "failed", form: count }] })];
  if (isFull) {
    all.push(
      chart({ ...common, id: "latency", title: "Time of a request", series: [{ name: "p50", label: "p50", form: ms }, { name: "p99", label: "p99", form: ms }] }),
      chart({ ...common, id: "queue", title: "Queue", empty: "", series: [{ name: "queue", label: "waiting", form: count }, { name: "in_flight", label: "in flight", form: count }] }),
      chart({ ...common, id: "busy", title: "Utilization of the workers", empty: "", most: 1, series: [{ name: "utilization", label: "", form: percent }] }),
    );
  } else all.push(chart({ ...common, id: "latency", title: "Mean time of a request", series: [{ name: "mean", label: "", form: ms }] }));
  all.push(chart({ ...common, id: "batch", title: "Mean batch size", series: [{ name: "batch", label: "", form: count }] }));
  all.push(h("figure", { class: "chart", "data-key": "stages" }, h("figcaption", {}, h("span", { class: "name" }, "Where the time goes")), stageBar(stageMeans(points), ms)));
  if (isFull) {
    const sizes = batchSizes(points);
    if (sizes.length > 1) all.push(h("figure", { class: "chart", "data-key": "sizes" }, h("figcaption", {}, h("span", { class: "name" }, "Batches by size")), bars(sizes)));
  }
  return h("section", { class: "charts", "aria-label": "Charts" }, all);
}

function workers(rows) {
  if (!rows.length) return h("p", { class: "empty" }, "None. Give it some under Manage.");
  return h("table", {}, h("thead", {}, h("tr", {}, ["Id", "State", "Since", "Memory", "Process"].map((each) => h("th", { scope: "col" }, each)))),
    h("tbody", {}, rows.map((row) => h("tr", { "data-key": row.id }, h("th", { scope: "row" }, row.id),
      h("td", {}, h("span", { class: `badge ${row.status === "READY" ? "good" : "busy"}` }, row.status)),
      h("td", {}, String(row.startTime).replace("T", " ").slice(0, 19)),
      h("td", { class: "number" }, size(row.memoryUsage)), h("td", { class: "number" }, row.pid > 0 ? row.pid : "–")))));
}

function facts(rows) {
  return h("dl", {}, rows.filter(([, value]) => value !== undefined && value !== "").map(([name, value]) => h("div", { "data-key": name }, h("dt", {}, name), h("dd", {}, String(value)))));
}

function shapeText(input) {
  return `${input.datatype} [${input.shape.map((each) => (each < 0 ? "any" : each)).join(", ")}]`;
}

export function overview(model, redraw) {
  const about = model.description;
  const rows = [["Kind of input", { picture: "a picture", text: "text", tensor: "numbers", own: "what its own handler takes" }[model.kind]]];
  for (const input of model.inputs) rows.push([input.name, shapeText(input)]);
  rows.push(["Runs in", model.lane === "native" ? "threads of the server" : "worker processes"], ["Batch size, at most", model.batch_size]);
  if (about) {
    rows.push(["Longest wait for a batch", `${about.maxBatchDelay} ms`], ["Device", model.device], ["Backend", model.backend], ["Precision", model.precision],
      ["Weights", size(model.weights_size)], ["Time limit of a request", `${about.responseTimeout} s`], ["Archive", about.modelUrl],
      ["Waiting requests, at most", about.jobQueueStatus.remainingCapacity + about.jobQueueStatus.pendingRequests]);
  } else rows.push(["Workers", model.wanted_workers], ["Device", model.device_kind]);
  return [charts(redraw), h("div", { class: "halves" },
    h("section", { class: "card" }, h("h2", {}, "Settings"), facts(rows)),
    about ? h("section", { class: "card table workers", tabindex: "0", role: "region", "aria-label": "Workers" }, h("h2", {}, "Workers"), workers(about.workers)) : null,
    about && Object.keys(about.checks).length ? h("section", { class: "card" }, h("h2", {}, "What was checked"), slot(`checks ${JSON.stringify(about.checks)}`, () => tree(about.checks))) : null)];
}
