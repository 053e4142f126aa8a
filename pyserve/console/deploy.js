// A new version without downtime: load and warm it, make it the default, remove the old one. Or a model's first version.

import { ApiError, ask, quoted, reasonOf } from "./api.js";
import { confirm } from "./dialog.js";
import { h } from "./dom.js";
import { duration } from "./format.js";
import { askForKeys } from "./keys.js";
import { modelPlace } from "./places.js";
import { refresh, state } from "./state.js";

const REGISTERED = /^Model "(.*)" Version: (.*) registered with /;

class Steps {
  constructor(texts) {
    this.rows = texts.map((text) => h("li", { class: "wait" }, h("span", {}, text), h("span", { class: "note" })));
    this.element = h("ol", { class: "steps", "aria-live": "polite" }, this.rows);
  }

  /** Runs `work` as step `index`, and counts its seconds meanwhile. */
  async run(index, work) {
    const row = this.rows[index];
    const note = row.lastChild;
    const began = performance.now();
    row.className = "busy";
    const timer = setInterval(() => { note.textContent = duration(Math.round((performance.now() - began) / 1000) * 1000); }, 1000);
    try {
      const result = await work();
      row.className = "good";
      note.textContent = duration(performance.now() - began);
      return result;
    } catch (error) {
      row.className = "bad";
      note.textContent = "";
      throw error;
    } finally {
      clearInterval(timer);
    }
  }

  skip(index, text) {
    this.rows[index].className = "skipped";
    this.rows[index].lastChild.textContent = text;
  }
}

async function defaultVersion(name) {
  try {
    const [described] = await ask("management", "GET", `models/${quoted(name)}`);
    return described.modelVersion;
  } catch (error) {
    if (error.status === 404) return "";
    throw error;
  }
}

/** Runs all steps; returns where the new version is. What the ones before a failure did is undone. */
async function deploy({ url, name, workers, keepsOld }, steps) {
  const parameters = new URLSearchParams({ url, initial_workers: workers, synchronous: "true" });
  if (name) parameters.set("model_name", name);
  const before = name ? await defaultVersion(name) : "";
  const told = await steps.run(0, () => ask("management", "POST", `models?${parameters}`));
  const [, served, version] = REGISTERED.exec(told.status) || [null, name, ""];
  const now = await defaultVersion(served);
  const old = before || (now !== version ? now : "");
  if (!old) {
    steps.skip(1, "it is the first version");
    steps.skip(2, "there is none");
    return { name: served, version };
  }
  try {
    await steps.run(1, () => ask("management", "PUT", `models/${quoted(served)}/${quoted(version)}/set-default`));
  } catch (error) {
    await ask("management", "DELETE", `models/${quoted(served)}/${quoted(version)}`);
    throw error;
  }
  if (keepsOld) steps.skip(2, "kept");
  else await steps.run(2, () => ask("management", "DELETE", `models/${quoted(served)}/${quoted(old)}`));
  return { name: served, version };
}

/** Archives in the model store that are not loaded, to choose from. */
async function offer(list) {
  try {
    const { store } = await ask("management", "GET", "console/state?limit=0&store=true");
    list.replaceChildren(...store.map((each) => h("option", { value: each })));
  } catch {
    // then the name is typed
  }
}

/** The form; with `model` for another version of it. */
export function deployForm({ model }) {
  if (!state.now.server.allows_model_api) {
    return h("section", { class: "card" }, h("h2", {}, "Deploy"), h("p", { class: "note" }, "Registering and unregistering are off on this server; start it with --enable-model-api."));
  }
  const list = h("datalist", { id: "store" });
  offer(list);
  const url = h("input", { id: "deploy-url", required: true, list: "store", placeholder: "model.mar", autocomplete: "off", spellcheck: "false" });
  const name = h("input", { id: "deploy-name", placeholder: "of the archive", autocomplete: "off", spellcheck: "false" });
  const workers = h("input", { type: "number", id: "deploy-workers", min: 1, value: model ? Math.max(1, model.workers.min, model.wanted_workers) : 1, required: true });
  const keeps = h("input", { type: "checkbox", id: "deploy-keep" });
  const button = h("button", { type: "submit", class: "primary" }, "Deploy");
  const progress = h("div", { class: "progress" });
  const said = h("p", { class: "outcome", role: "status", "aria-live": "polite" });
  const field = (label, input, note) => h("label", { class: "field", for: input.id }, label, input, note ? h("span", { class: "note" }, note) : null);
  const form = h("form", { class: "card" }, h("h2", {}, model ? `Deploy another version of ${model.name}` : "Deploy a model"),
    h("p", { class: "note" }, "It is loaded and warmed up beside what is served, and takes its place when it can answer. If it fails, nothing changes."),
    h("div", { class: "fields" }, field("Archive", url, "in the model store, or an allowed URL"), model ? null : field("Name", name), field("Workers", workers)), list,
    h("label", { class: "check", for: "deploy-keep" }, keeps, "Keep the old version"),
    h("div", { class: "buttons" }, button), progress, said);
  form.onsubmit = async (event) => {
    event.preventDefault();
    const wanted = { url: url.value.trim(), name: model ? model.name : name.value.trim(), workers: workers.value, keepsOld: keeps.checked };
    const text = `${wanted.url} will be loaded with ${wanted.workers} worker(s)${wanted.name ? ` as ${wanted.name}` : ""}, made the default version${wanted.keepsOld ? "" : ", and the version before it removed"}.`;
    if (!(await confirm({ title: "Deploy", text, yes: "Deploy" }))) return;
    const steps = new Steps(["Load and warm up", "Make it the default version", "Drain and remove the old version"]);
    progress.replaceChildren(steps.element);
    button.disabled = true;
    said.className = "outcome";
    said.textContent = "";
    try {
      const made = await deploy(wanted, steps);
      said.className = "outcome good";
      said.replaceChildren(`${made.name} ${made.version} is served. `, h("a", { href: modelPlace(made.name, made.version) }, "Look at it"));
    } catch (error) {
      said.className = "outcome bad";
      said.textContent = reasonOf(error);
      if (error instanceof ApiError && error.needsKey) askForKeys();
    } finally {
      button.disabled = false;
      refresh();
    }
  };
  return form;
}
