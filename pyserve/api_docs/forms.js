// What the reader fills in: parameters, and a body of one of the kinds that an operation takes.

import { make, pretty, resolved } from "./dom.js";

// Of an array that the document describes, so many items at most.
const ITEMS_MAX = 4096;

export function fieldsFor(parameters) {
  const inputs = [];
  const element = make("div", { class: "fields" }, []);
  for (const each of parameters) {
    const input = choice(each.schema || {}) || make("input", { type: "text", autocomplete: "off" }, []);
    const id = `f${Math.random().toString(36).slice(2)}`;
    input.id = id;
    if (each.in === "path" && each.example !== undefined) input.value = each.example;
    element.append(make("label", { for: id }, [`${each.name}${each.required ? " *" : ""} (${each.in})`]), input);
    if (each.description) element.append(make("p", {}, [each.description]));
    inputs.push({ ...each, input });
  }
  return { element, values: () => inputs.map(({ name, in: place, input }) => ({ name, place, value: input.value })) };
}

function choice(schema) {
  const values = schema.enum || (schema.type === "boolean" ? [true, false] : null);
  if (!values) return null;
  return make("select", {}, ["", ...values].map((value) => make("option", { value: String(value) }, [String(value)])));
}

export function bodyForm(body, document) {
  const kinds = Object.keys(body.content);
  const select = make("select", { "aria-label": "Content type" }, kinds.map((kind) => make("option", { value: kind }, [kind])));
  const place = make("div", {}, []);
  let current;
  const show = () => {
    current = editor(select.value, body.content[select.value], document);
    place.replaceChildren(...current.parts);
  };
  select.addEventListener("change", show);
  show();
  return { element: make("div", {}, [make("div", { class: "row" }, [select]), place]), value: () => current.value() };
}

// What stands for one content type: text where it is text, files and fields for the others.
function editor(kind, media, document) {
  const schema = resolved(media.schema, document);
  const about = schema.description ? [make("p", {}, [schema.description])] : [];
  if (kind === "multipart/form-data") return formEditor(schema, about);
  if (kind === "application/json" || kind.startsWith("text/") || kind.endsWith("urlencoded")) {
    const area = make("textarea", { "aria-label": "Body", spellcheck: "false" }, []);
    const example = media.example !== undefined ? media.example : exampleOf(schema, document);
    area.value = typeof example === "string" && kind !== "application/json" ? example : compact(example);
    return { parts: [...about, area], value: () => ({ type: kind, body: area.value, curl: ["-H", `Content-Type: ${kind}`, "-d", area.value] }) };
  }
  const file = make("input", { type: "file", "aria-label": "File" }, []);
  const value = () => {
    const chosen = file.files[0];
    const type = kind.includes("*") ? (chosen && chosen.type) || "application/octet-stream" : kind;
    const name = chosen ? chosen.name : "FILE";
    return { type, body: chosen || "", curl: ["-H", `Content-Type: ${type}`, "--data-binary", `@${name}`] };
  };
  return { parts: [...about, file], value };
}

function formEditor(schema, about) {
  const rows = Object.keys(schema.properties || { data: {} }).map((name) => ({
    name, text: make("input", { type: "text", "aria-label": name }, []), file: make("input", { type: "file", "aria-label": `${name}, a file` }, []),
  }));
  const value = () => {
    const form = new FormData();
    const curl = [];
    for (const { name, text, file } of rows) {
      if (file.files[0]) form.append(name, file.files[0]);
      else if (text.value) form.append(name, text.value);
      else continue;
      curl.push("-F", file.files[0] ? `${name}=@${file.files[0].name}` : `${name}=${text.value}`);
    }
    return { type: "", body: form, curl };
  };
  const parts = rows.map(({ name, text, file }) => make("div", { class: "row" }, [make("label", {}, [name, text]), file]));
  return { parts: [...about, ...parts], value };
}

// A value that the schema allows.
export function exampleOf(schema, document, budget = { left: ITEMS_MAX }) {
  const plain = resolved(schema, document);
  if (plain.example !== undefined) return plain.example;
  if (plain.enum) return plain.enum[0];
  if (plain.type === "object") {
    const made = {};
    for (const name of plain.required || Object.keys(plain.properties || {})) made[name] = exampleOf((plain.properties || {})[name], document, budget);
    return made;
  }
  if (plain.type === "array") {
    const items = [];
    const count = plain.minItems === undefined ? 1 : plain.minItems;
    for (let at = 0; at < count && budget.left-- > 0; at++) items.push(exampleOf(plain.items, document, budget));
    return items;
  }
  if (plain.type === "number" || plain.type === "integer") return Math.min(Math.max(plain.minimum ?? 0, 0), plain.maximum ?? 0) || plain.minimum || 0;
  if (plain.type === "boolean") return false;
  return plain.type === "string" ? "" : {};
}

function compact(value) {
  const flat = JSON.stringify(value);
  return flat.length > 200 && !Array.isArray(value) ? pretty(value) : flat;
}
