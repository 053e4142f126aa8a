// The bar above every view: which port this is, whether it answers, the key.

import { h, patchChildren } from "./dom.js";
import { askForKeys, hasKey } from "./keys.js";
import { base, here } from "./places.js";
import { state } from "./state.js";

function mark() {
  return h("img", { src: "console/icon.svg", alt: "", width: 28, height: 28 });
}

function ports() {
  if (state.both || !state.now) return null;
  const other = state.scope === "inference" ? "management" : "inference";
  const url = base(other);
  const names = { inference: "Try", management: "Manage" };
  const titles = { inference: "Inference API", management: "Management API" };
  const item = (scope) => (scope === state.scope
    ? h("a", { href: "#/", "aria-current": "true", title: titles[scope] }, names[scope])
    : url ? h("a", { href: url + location.hash, title: titles[scope] }, names[scope]) : null);
  return h("nav", { class: "ports", "aria-label": "Ports" }, item("inference"), item("management"));
}

function pages() {
  const { view } = here();
  const item = (name, href, text) => h("a", { href, "aria-current": view === name ? "page" : null }, text);
  const all = [item(view === "model" ? "model" : "models", "#/", "Models")];
  if (state.scope === "management") all.push(item("deploy", "#/deploy", "Deploy"), item("errors", "#/errors", "Errors"), item("log", "#/log", "Log"));
  all.push(h("a", { href: "docs" }, "API"));
  return h("nav", { class: "pages", "aria-label": "Pages" }, all);
}

function health() {
  if (state.error) return h("span", { class: "health bad" }, state.error.needsKey ? "Key needed" : "No answer");
  if (!state.now) return h("span", { class: "health" }, "Connecting");
  return state.now.server.ready ? h("span", { class: "health good" }, "Live") : h("span", { class: "health warn" }, "Not ready");
}

export function drawTop() {
  const isAsked = hasKey() || (state.now && state.now.server.asks_key) || (state.error && state.error.needsKey);
  const lock = !isAsked ? null : h("button", { type: "button", class: "quiet small", title: "The key that calls need", onclick: askForKeys }, hasKey() ? "Key set" : "Key");
  patchChildren(document.getElementById("top"), [h("div", { class: "bar" },
    h("a", { class: "brand", href: "#/", "aria-label": "pyserve" }, mark(), h("span", {}, "pyserve"), state.now ? h("small", {}, state.now.server.version) : null),
    pages(), h("span", { class: "gap" }), health(), lock, ports())]);
}
