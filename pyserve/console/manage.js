// Changes to a model that is served. Nothing is changed without a question, and what the server says is shown.

import { ApiError, ask, quoted, reasonOf } from "./api.js";
import { confirm } from "./dialog.js";
import { h } from "./dom.js";
import { askForKeys } from "./keys.js";
import { refresh, state } from "./state.js";

function numberField(id, label, value, least, note = "") {
  const input = h("input", { type: "number", id, min: least, step: 1, value, required: true, inputmode: "numeric" });
  return { input, element: h("label", { class: "field", for: id }, label, input, note ? h("span", { class: "note" }, note) : null) };
}

/** Says in `place` how a change goes; `work` returns the text of its success. */
export async function report(place, button, work) {
  button.disabled = true;
  place.className = "outcome busy";
  place.textContent = "Working …";
  try {
    place.textContent = await work();
    place.className = "outcome good";
  } catch (error) {
    place.textContent = reasonOf(error);
    place.className = "outcome bad";
    if (error instanceof ApiError && error.needsKey) askForKeys();
  } finally {
    button.disabled = false;
    refresh();
  }
}

const outcome = () => h("p", { class: "outcome", role: "status", "aria-live": "polite" });
const pathOf = (model) => `models/${quoted(model.name)}/${quoted(model.version)}`;
const called = (model) => `${model.name} ${model.version}`;

function changeForm({ title, note, fields, yes, question, query, model }) {
  const button = h("button", { type: "submit", class: "primary" }, yes);
  const said = outcome();
  const form = h("form", { class: "card" }, h("h2", {}, title), h("p", { class: "note" }, note),
    h("div", { class: "fields" }, fields.map((each) => each.element)), h("div", { class: "buttons" }, button), said);
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (!(await confirm({ title, text: question(), yes }))) return;
    await report(said, button, async () => (await ask("management", "PUT", `${pathOf(model)}?${new URLSearchParams(query())}`)).status);
  };
  return form;
}

function workersForm(model) {
  const least = numberField("workers-min", "At least", model.workers.min, 0);
  const most = numberField("workers-max", "At most", model.workers.max, 0);
  least.input.oninput = () => {
    if (Number(most.input.value) < Number(least.input.value)) most.input.value = least.input.value;
  };
  return changeForm({
    title: "Workers", note: "Requests that are running are finished first.", fields: [least, most], yes: "Scale", model,
    question: () => `${called(model)} will have at least ${least.input.value} and at most ${most.input.value} workers.`,
    query: () => ({ min_worker: least.input.value, max_worker: most.input.value, synchronous: "true" }),
  });
}

function batchForm(model) {
  const batch = numberField("batch-size", "Batch size", model.batch_size, 1, "requests, at most");
  const delay = numberField("batch-delay", "Delay", model.max_batch_delay, 0, "ms, at most");
  return changeForm({
    title: "Batching", note: "Holds from the next batch on, until the model is registered again.", fields: [batch, delay], yes: "Apply", model,
    question: () => `${called(model)} will run up to ${batch.input.value} requests together, and wait up to ${delay.input.value} ms for them.`,
    query: () => ({ batch_size: batch.input.value, max_batch_delay: delay.input.value }),
  });
}

function defaultForm(model) {
  const button = h("button", { type: "button" }, "Make default");
  const said = outcome();
  button.onclick = async () => {
    const isSure = await confirm({ title: "Default version", text: `Requests for ${model.name} without a version will go to ${model.version}.`, yes: "Make default" });
    if (isSure) await report(said, button, async () => (await ask("management", "PUT", `${pathOf(model)}/set-default`)).status);
  };
  return h("section", { class: "card" }, h("h2", {}, "Default version"),
    model.default ? h("p", {}, `Requests for ${model.name} without a version go to this one.`) : [h("p", {}, "Requests without a version go to another one."), h("div", { class: "buttons" }, button)], said);
}

function removal(model) {
  const button = h("button", { type: "button", class: "danger" }, "Unregister");
  const said = outcome();
  button.onclick = async () => {
    const isSure = await confirm({
      title: `Unregister ${called(model)}?`, isDanger: true, yes: "Unregister",
      text: ["Requests that it has are answered; new ones are refused. Its archive stays in the model store.",
        model.default && model.versions.length > 1 ? "It is the default version: the server refuses as long as there are others." : ""].filter(Boolean),
    });
    if (!isSure) return;
    await report(said, button, async () => {
      const told = await ask("management", "DELETE", pathOf(model));
      document.getElementById("news").textContent = told.status;
      location.hash = "#/";
      return told.status;
    });
  };
  return h("section", { class: "card" }, h("h2", {}, "Unregister"), h("p", {}, "Takes this version out of service."), h("div", { class: "buttons" }, button), said);
}

/** How `model` works: its workers and batches. */
export function changeForms(model) {
  return [workersForm(model), batchForm(model)];
}

/** Whether `model` is the default version, and is served at all. */
export function serviceForms(model) {
  const allows = state.now.server.allows_model_api;
  return [defaultForm(model), allows ? removal(model)
    : h("section", { class: "card" }, h("h2", {}, "Unregister"), h("p", { class: "note" }, "Registering and unregistering are off on this server; start it with --enable-model-api."))];
}
