// The page of /docs: lists what openapi.json describes, and sends what the reader fills in.
// All that comes from the server becomes text, never markup.

import { bodyForm, fieldsFor } from "./forms.js";
import { make, pretty } from "./dom.js";
import { send } from "./send.js";

const keyName = "pyserve key";
const SHOWN_MAX = 400;
let documentOf = null;

function key() {
  return document.getElementById("key").value.trim();
}

async function load() {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  const answer = await fetch(`openapi.json${location.search}`, { headers });
  if (answer.status === 401 || answer.status === 400) {
    say("This server asks for a key: type it above (key_file.json has it).");
    document.getElementById("key").focus();
    return;
  }
  if (!answer.ok) throw new Error(`openapi.json: ${answer.status} ${await answer.text()}`);
  documentOf = await answer.json();
  document.getElementById("about").textContent = documentOf.info.description || "";
  say("");
  list();
}

function say(text) {
  document.getElementById("news").textContent = text;
}

// Operations in groups: each model's, then those of the API.
function groups() {
  const found = new Map();
  const wanted = document.getElementById("filter").value.trim().toLowerCase();
  for (const [path, item] of Object.entries(documentOf.paths)) {
    for (const [verb, operation] of Object.entries(item)) {
      const text = `${verb} ${path} ${operation.description || ""} ${operation.operationId}`.toLowerCase();
      if (wanted && !text.includes(wanted)) continue;
      const group = (operation.tags || ["The whole API"])[0];
      if (!found.has(group)) found.set(group, []);
      found.get(group).push({ path, verb, operation });
    }
  }
  return found;
}

function list() {
  const main = document.getElementById("operations");
  main.replaceChildren();
  let count = 0;
  for (const [name, entries] of groups()) {
    const section = make("section", {}, [make("h2", {}, [name])]);
    for (const entry of entries) if (count++ < SHOWN_MAX) section.append(row(entry));
    if (section.children.length > 1) main.append(section);
  }
  if (count > SHOWN_MAX) main.append(make("p", {}, [`${count - SHOWN_MAX} more; filter to see them.`]));
  if (!count) main.append(make("p", {}, ["Nothing is called like that."]));
}

function row({ path, verb, operation }) {
  const title = make("summary", {}, [
    make("span", { class: `verb ${verb}` }, [verb.toUpperCase()]), make("code", {}, [path]),
    make("span", {}, [operation.description || ""]),
  ]);
  const details = make("details", {}, [title]);
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(inside(path, verb, operation));
  });
  return details;
}

function inside(path, verb, operation) {
  const parameters = operation.parameters || [];
  const fields = fieldsFor(parameters.filter((each) => each.in !== "header"));
  const headers = fieldsFor(parameters.filter((each) => each.in === "header"));
  const body = operation.requestBody ? bodyForm(operation.requestBody, documentOf) : null;
  const result = make("div", { "aria-live": "polite" }, []);
  const button = make("button", { type: "button" }, ["Send"]);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await send({ path, verb, values: [...fields.values(), ...headers.values()], body, key: key() }, result);
    } catch (error) {
      result.replaceChildren(make("p", { class: "bad" }, [String(error.message || error)]));
    } finally {
      button.disabled = false;
    }
  });
  const parts = [fields.element];
  if (headers.values().length) {
    const inner = make("div", { class: "inside" }, [headers.element]);
    parts.push(make("details", {}, [make("summary", {}, ["Headers"]), inner]));
  }
  if (body) parts.push(make("h3", {}, ["Body"]), body.element);
  parts.push(make("div", { class: "row" }, [button]), result, make("h3", {}, ["Answers"]), answers(operation));
  return make("div", { class: "inside" }, parts);
}

function answers(operation) {
  const element = make("div", {}, []);
  for (const [status, answer] of Object.entries(operation.responses)) {
    const content = Object.entries(answer.content || {});
    const text = content.map(([type, media]) => `${type}\n${pretty(media.schema)}`).join("\n\n");
    const parts = [make("summary", {}, [make("code", {}, [status]), make("span", {}, [answer.description])])];
    if (text) parts.push(make("div", { class: "inside" }, [make("pre", {}, [text])]));
    element.append(make("details", {}, parts));
  }
  return element;
}

document.getElementById("search").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("filter").addEventListener("input", () => documentOf && list());
document.getElementById("key").value = sessionStorage.getItem(keyName) || "";
document.getElementById("key").addEventListener("change", () => {
  sessionStorage.setItem(keyName, key());
  load().catch((error) => say(String(error.message || error)));
});
load().catch((error) => say(String(error.message || error)));
