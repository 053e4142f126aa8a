// The page: which view is shown, and that it is drawn again when something changed.

import { reasonOf } from "./api.js";
import { deployForm } from "./deploy.js";
import { h, patchChildren, slot } from "./dom.js";
import { askForKeys } from "./keys.js";
import { errorsList, logList } from "./lists.js";
import { modelView, wanted as wantedOfModel } from "./model.js";
import { modelsView, wanted as wantedOfModels } from "./models.js";
import { here } from "./places.js";
import { onChange, refresh, state, want } from "./state.js";
import { drawTop } from "./top.js";

const content = document.getElementById("content");
let isAsking = false;

function trouble() {
  if (!state.error) return null;
  if (state.error.needsKey) {
    return h("div", { class: "card blank", "data-key": "key" }, h("h1", {}, "This server asks for a key"),
      h("p", {}, state.error.message), h("p", {}, h("button", { type: "button", class: "primary", onclick: askForKeys }, "Enter the key")));
  }
  const told = state.error.status ? reasonOf(state.error) : "It may be stopping or starting again, or the connection is lost. This page keeps trying.";
  return h("div", { class: state.now ? "note bad" : "card blank", role: "alert", "data-key": "trouble" },
    h(state.now ? "strong" : "h1", {}, state.error.status ? "The server refuses " : "The server does not answer "), h(state.now ? "span" : "p", {}, told), " ",
    h("button", { type: "button", class: "small", onclick: refresh }, "Try again"));
}

function view() {
  const place = here();
  if (place.view === "model") return modelView(redraw);
  if (place.view === "errors") return [h("h1", {}, "Errors"), errorsList(state.now.errors || [], "No request was answered with an error lately.")];
  if (place.view === "log") return [h("h1", {}, "Log"), h("p", { class: "note" }, "Warnings and errors of the server itself; what a model logs is on its own page."), logList(state.now.log || [], "The server has warned of nothing.")];
  if (place.view === "deploy") return [h("h1", {}, "Deploy"), slot("deploy", () => deployForm({}))];
  return modelsView(redraw);
}

function wanted() {
  const place = here();
  if (place.view === "model") return wantedOfModel(place);
  if (place.view === "models") return wantedOfModels();
  return { limit: 0, errors: place.view === "errors", log: place.view === "log" };
}

function draw() {
  drawTop();
  const problem = trouble();
  const isBlocked = state.error && state.error.needsKey;
  const rest = isBlocked ? [] : state.now ? view() : problem ? [] : [h("div", { class: "card blank" }, h("p", {}, "Loading …"))];
  patchChildren(content, [problem, ...[].concat(rest)].filter(Boolean));
  content.setAttribute("aria-busy", String(!state.now && !state.error));
  if (isBlocked && !isAsking) {
    isAsking = true; // once; then there is the button
    askForKeys();
  }
  if (!isBlocked) isAsking = false;
}

let isDrawing = false;

/** Draws at the next frame; `asks` when the query changed, too. */
function redraw(asks) {
  if (asks) want(wanted());
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    draw();
  });
}

window.addEventListener("hashchange", () => {
  content.focus({ preventScroll: true });
  window.scrollTo(0, 0);
  redraw(true);
});
onChange(() => redraw(false));
redraw(true);
