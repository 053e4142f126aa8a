// Line charts as SVG: a few series over the last minutes, their values beside the title, those under the pointer on hover.

import { h, svg } from "./dom.js";
import { clock, duration } from "./format.js";

const WIDTH = 300;
const HEIGHT = 100;
const SPAN_MIN_MS = 60 * 1000;
const SPAN_MAX_MS = 5 * 60 * 1000;
const hovered = new Map(); // chart -> time under the pointer

/** A round number at or above `value`. */
function ceiling(value) {
  if (!(value > 0)) return 1;
  const step = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].find((each) => each * step >= value) * step;
}

function path(points, name, x, y) {
  let text = "";
  let isDown = false;
  for (const point of points) {
    const value = point[name];
    if (value === null || value === undefined) {
      isDown = false;
      continue;
    }
    text += `${isDown ? "L" : "M"}${x(point.at).toFixed(1)} ${y(value).toFixed(1)}`;
    if (!isDown) text += "h0.01"; // a point alone shows as a dot
    isDown = true;
  }
  return text;
}

function nearest(points, at) {
  return points.reduce((best, each) => (!best || Math.abs(each.at - at) < Math.abs(best.at - at) ? each : best), null);
}

/**
 * One chart.
 * series: [{name, label, form}], `name` a member of the points, `form` makes text of a value.
 * most: the top of the scale, if it is known.
 */
export function chart({ id, title, points, series, most, redraw, empty = "Nothing yet" }) {
  const last = points.length ? points[points.length - 1].at : 0;
  const span = points.length ? Math.min(SPAN_MAX_MS, Math.max(SPAN_MIN_MS, last - points[0].at)) : SPAN_MIN_MS;
  const first = last - span;
  const values = points.flatMap((point) => series.map((each) => point[each.name])).filter((each) => typeof each === "number");
  const top = most || ceiling(Math.max(0, ...values));
  const x = (at) => ((at - first) / span) * WIDTH;
  const y = (value) => HEIGHT - 2 - (Math.min(value, top) / top) * (HEIGHT - 6);
  const shown = hovered.has(id) ? nearest(points, first + hovered.get(id) * span) : points[points.length - 1];
  const legend = series.map((each, index) => h("span", { class: `key s${index}` },
    h("i", {}), each.label ? `${each.label} ` : "", h("b", {}, each.form(shown ? shown[each.name] : null))));
  const told = series.map((each) => `${each.label} ${each.form(shown ? shown[each.name] : null)}`).join(", ");
  const lines = series.map((each, index) => svg("path", { class: `line s${index}`, d: path(points, each.name, x, y) }));
  const cursor = hovered.has(id) && shown ? svg("line", { class: "cursor", x1: x(shown.at), x2: x(shown.at), y1: 0, y2: HEIGHT }) : null;
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: ${told}` },
    [0.25, 0.5, 0.75].map((each) => svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT * each, y2: HEIGHT * each })),
    svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 }), lines, cursor);
  const when = hovered.has(id) && shown ? clock(shown.at / 1000) : `${duration(Math.round(span / 1000) * 1000)} ago`;
  const plot = h("div", { class: "plot" }, drawing, h("span", { class: "top" }, series[0].form(top)),
    values.length ? null : h("span", { class: "empty" }, empty));
  plot.onpointermove = (event) => {
    const box = plot.getBoundingClientRect();
    hovered.set(id, (event.clientX - box.left) / box.width);
    redraw();
  };
  plot.onpointerleave = () => {
    hovered.delete(id);
    redraw();
  };
  return h("figure", { class: "chart", "data-key": id },
    h("figcaption", {}, h("span", { class: "name" }, title), h("span", { class: "legend" }, legend)),
    plot, h("div", { class: "times", "aria-hidden": "true" }, h("span", {}, when), h("span", {}, "now")));
}

const STAGES = ["admission", "preprocess", "queue", "staging", "inference", "postprocess", "delivery"];

/** Where time goes: one bar of stages, [{name, ms}] in their order, and a legend with numbers. */
export function stageBar(stages, form) {
  const sum = stages.reduce((total, each) => total + each.ms, 0);
  if (!sum) return h("p", { class: "empty" }, "Nothing yet");
  const kind = (name) => `g${Math.max(0, STAGES.indexOf(name))}`;
  let at = 0;
  const parts = stages.map((each) => {
    const width = (each.ms / sum) * WIDTH;
    const part = svg("rect", { class: kind(each.name), x: at, y: 0, width, height: 12 });
    at += width;
    return part;
  });
  return h("div", { class: "stages" },
    svg("svg", { viewBox: `0 0 ${WIDTH} 12`, preserveAspectRatio: "none", role: "img", "aria-label": stages.map((each) => `${each.name} ${form(each.ms)}`).join(", ") }, parts),
    h("div", { class: "legend" }, stages.map((each) => h("span", { class: `key ${kind(each.name)}` }, h("i", {}), `${each.name} `, h("b", {}, form(each.ms))))));
}

/** Bars of [{label, value, text, share}], the share of the widest from 0 to 1. */
export function bars(rows) {
  return h("ol", { class: "bars" }, rows.map((row) => {
    const width = (Math.max(0, Math.min(1, row.share)) * WIDTH).toFixed(1);
    return h("li", {}, h("span", { class: "label" }, row.label), h("span", { class: "value" }, row.text),
      svg("svg", { viewBox: `0 0 ${WIDTH} 6`, preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("rect", { class: "track", x: 0, y: 0, width: WIDTH, height: 6 }), svg("rect", { class: "bar", x: 0, y: 0, width, height: 6 })));
  }));
}
