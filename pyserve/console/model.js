// One version of a model: its head, and a tab for each thing that can be done with it on this port.

import { deployForm } from "./deploy.js";
import { h, slot } from "./dom.js";
import { errorsList, logList } from "./lists.js";
import { changeForms, serviceForms } from "./manage.js";
import { badge } from "./models.js";
import { overview } from "./overview.js";
import { base, here, modelPlace } from "./places.js";
import { state } from "./state.js";
import { tryForm } from "./tryit.js";

const isFull = () => state.scope === "management";
const canTry = () => state.scope === "inference" || state.both;

function tabs() {
  const all = [];
  if (canTry()) all.push(["try", "Try it"]);
  all.push(["overview", "Overview"]);
  if (isFull()) all.push(["manage", "Manage"], ["errors", "Errors"], ["log", "Log"]);
  return all;
}

function tabOf(place) {
  const known = tabs().map(([name]) => name);
  return known.includes(place.tab) ? place.tab : isFull() ? "overview" : known[0];
}

export function wanted(place) {
  const tab = tabOf(place);
  return { model: place.name, version: place.version, limit: 0, errors: tab === "errors", log: tab === "log" };
}

function head(model, tab) {
  const versions = model.versions.length > 1
    ? h("select", { "aria-label": "Version", onchange: (event) => { location.hash = modelPlace(model.name, event.target.value, tab); } },
      model.versions.map((each) => h("option", { value: each, selected: each === model.version }, each)))
    : h("span", { class: "version" }, model.version);
  return h("div", { class: "head" }, h("a", { class: "back", href: "#/" }, "Models"),
    h("div", { class: "title" }, h("h1", {}, model.name), versions, model.default && model.versions.length > 1 ? h("i", { class: "tag" }, "default") : null, badge(model)));
}

function tabBar(model, tab) {
  const link = ([name, text]) => h("a", { href: modelPlace(model.name, model.version, name), "aria-current": name === tab ? "page" : null }, text);
  const other = !canTry() && base("inference")
    ? h("a", { href: base("inference") + modelPlace(model.name, model.version, "try"), title: "On the inference port" }, "Try it ↗") : null;
  return h("nav", { class: "tabs", "aria-label": "Model" }, tabs().map(link), other);
}

function body(model, tab, redraw) {
  const key = `${model.name} ${model.version}`;
  if (tab === "try") return slot(`try ${key} ${model.kind}`, () => tryForm(model));
  if (tab === "manage") {
    return h("div", { class: "halves" }, slot(`change ${key}`, () => changeForms(model), { class: "parts" }),
      slot(`service ${key} ${model.default}`, () => serviceForms(model), { class: "parts" }), slot(`deploy ${key}`, () => deployForm({ model }), { class: "whole" }));
  }
  if (tab === "errors") return errorsList(state.now.errors || [], "No request of this model was answered with an error lately.");
  if (tab === "log") return logList(state.now.log || [], "This model has logged nothing lately.");
  return overview(model, redraw);
}

export function modelView(redraw) {
  const place = here();
  const { model } = state.now;
  const isThere = model && model.name === place.name && (!place.version || model.version === place.version);
  if (!isThere) {
    const isComing = model !== null || !("model" in state.now);
    return [h("div", { class: "card blank" }, h("h1", {}, place.name),
      isComing ? h("p", {}, "Loading …") : [h("p", {}, `There is no model of this name${place.version ? ` with version ${place.version}` : ""} any more.`), h("p", {}, h("a", { href: "#/" }, "All models"))])];
  }
  const tab = tabOf(place);
  return [head(model, tab), model.reason ? h("p", { class: "note bad" }, model.reason) : null,
    tabBar(model, tab), h("div", { class: `tab ${tab}` }, body(model, tab, redraw))].filter(Boolean);
}
