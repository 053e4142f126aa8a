// The table of models: a page of it at a time, whatever their number.

import { chart } from "./charts.js";
import { h } from "./dom.js";
import { count, duration, plural, size } from "./format.js";
import { modelPlace } from "./places.js";
import { state } from "./state.js";

const PAGE = 50;
export const filter = { search: "", state: "", offset: 0 };

export function wanted() {
  return { ...filter, limit: PAGE };
}

export function badge(model) {
  const kind = { READY: "good", LOADING: "busy", DRAINING: "busy", FAILED: "bad" }[model.state] || "";
  if (model.state === "READY" && !model.answers) return h("span", { class: "badge warn" }, "NO WORKER");
  return h("span", { class: `badge ${kind}` }, model.state);
}

function tile(label, value, note, kind = "") {
  return h("div", { class: `tile ${kind}` }, h("span", { class: "label" }, label), h("strong", {}, value), h("span", { class: "note" }, note));
}

function summary(redraw) {
  const { counts, totals } = state.now;
  const all = Object.values(counts).reduce((a, b) => a + b, 0);
  const last = state.totals[state.totals.length - 1] || {};
  const states = Object.entries(counts).filter(([, number]) => number).sort((a) => (a[0] === "READY" ? -1 : 1)).map(([name, number]) => `${number} ${name.toLowerCase()}`).join(", ");
  return h("section", { class: "summary", "aria-label": "Summary" },
    h("div", { class: "tiles" },
      tile("Models", count(all), states || "none yet", counts.FAILED ? "bad" : ""),
      tile("Answered", count(totals.succeeded), "since the start"),
      tile("Failed", count(totals.failed), `${count(last.failures ?? 0)} a second`, last.failures ? "bad" : "")),
    chart({ id: "totals-rate", title: "Requests a second", points: state.totals, redraw, series: [{ name: "rate", label: "", form: count }], empty: "No requests yet" }),
    chart({ id: "totals-mean", title: "Mean time of a request", points: state.totals, redraw, series: [{ name: "mean_ms", label: "", form: duration }], empty: "No requests yet" }));
}

function tools(redraw) {
  const search = h("input", { type: "search", id: "search", placeholder: "Search by name", "aria-label": "Search models by name", value: filter.search, autocomplete: "off", spellcheck: "false" });
  search.oninput = (event) => {
    filter.search = event.target.value.trim();
    filter.offset = 0;
    redraw(true);
  };
  const select = h("select", { "aria-label": "State" }, ["", "READY", "LOADING", "FAILED", "DRAINING"].map((each) => h("option", { value: each, selected: each === filter.state }, each || "Any state")));
  select.onchange = (event) => {
    filter.state = event.target.value;
    filter.offset = 0;
    redraw(true);
  };
  return h("div", { class: "tools" }, search, select);
}

function workersOf(row) {
  if (row.never_loaded) return "–";
  return state.scope === "management" ? `${row.ready_workers} / ${row.wanted_workers}` : String(row.wanted_workers);
}

function tableRow(row) {
  const name = row.never_loaded ? h("b", {}, row.name) : h("a", { href: modelPlace(row.name, row.version) }, row.name);
  const isFull = state.scope === "management";
  const cells = [
    h("th", { scope: "row" }, name, h("span", { class: "version" }, row.version, row.default && row.version_count > 1 ? h("i", { class: "tag" }, "default") : null)),
    h("td", {}, badge(row)),
    h("td", { class: "number" }, workersOf(row)),
    h("td", { class: "number" }, count(state.rates.get(`${row.name} ${row.version}`))),
    h("td", { class: "wide" }, isFull ? row.device : row.device_kind),
    h("td", { class: "wide" }, row.answers || row.state === "LOADING" ? isFull ? row.backend : row.lane : "–"),
  ];
  if (isFull) {
    cells.push(h("td", { class: "wide" }, row.precision), h("td", { class: "wide number" }, size(row.weights_size)),
      h("td", { class: "mid number" }, count(row.queue_size)));
  }
  cells.push(h("td", { class: "mid number" }, count(row.batch_size)));
  const key = `${row.name} ${row.version}`;
  const rows = [h("tr", { "data-key": key, class: row.reason ? "with-reason" : null }, cells)];
  if (row.reason) rows.push(h("tr", { "data-key": `why ${key}`, class: "reason" }, h("td", { colspan: cells.length }, row.reason)));
  return rows;
}

function table(rows) {
  const isFull = state.scope === "management";
  const head = [["Model"], ["State"], ["Workers", "number"], ["Req/s", "number"], ["Device", "wide"], [isFull ? "Backend" : "Lane", "wide"]];
  if (isFull) head.push(["Precision", "wide"], ["Weights", "wide number"], ["Waiting", "mid number"]);
  head.push(["Batch", "mid number"]);
  return h("div", { class: "card table", tabindex: "0", role: "region", "aria-label": "Models" }, h("table", {},
    h("thead", {}, h("tr", {}, head.map(([text, kind]) => h("th", { scope: "col", class: kind }, text)))),
    h("tbody", {}, rows.map(tableRow))));
}

function pager(models, redraw) {
  const first = models.match ? models.offset + 1 : 0;
  const last = models.offset + models.rows.length;
  const move = (by) => () => {
    filter.offset = Math.max(0, filter.offset + by);
    redraw(true);
  };
  return h("div", { class: "pager" },
    h("span", {}, models.match > PAGE ? `${first}–${last} of ${models.match.toLocaleString()}` : plural(models.match, "model")),
    models.match > PAGE ? [
      h("button", { type: "button", class: "small", disabled: !models.offset, onclick: move(-PAGE) }, "Previous"),
      h("button", { type: "button", class: "small", disabled: last >= models.match, onclick: move(PAGE) }, "Next"),
    ] : null);
}

function nothing(models) {
  if (filter.search || filter.state) return h("div", { class: "card blank" }, h("h2", {}, "No model matches"), h("p", {}, "Another name or another state may."));
  return h("div", { class: "card blank" }, h("h2", {}, "No models are served"),
    h("p", {}, state.scope === "management" ? ["Put an archive into the model store and ", h("a", { href: "#/deploy" }, "deploy it"), "."] : "Models that are registered on the management port appear here."));
}

export function modelsView(redraw) {
  const { models } = state.now;
  if (!models.rows.length && filter.offset && models.offset === filter.offset) {
    filter.offset = 0; // what was on this page is gone
    redraw(true);
  }
  return [h("h1", { class: "hidden" }, "Models"), summary(() => redraw(false)), tools(redraw),
    models.rows.length ? table(models.rows) : nothing(models), pager(models, redraw)];
}
