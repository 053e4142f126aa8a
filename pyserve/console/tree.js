// Any JSON as a tree that opens and closes, a bounded part of it at a time.

import { h } from "./dom.js";

const SHOWN_MAX = 100;
const TEXT_MAX = 5000;
const DEPTH_OPEN = 2;

function leaf(value) {
  const kind = value === null ? "null" : typeof value;
  const text = typeof value === "string" ? JSON.stringify(value.length > TEXT_MAX ? `${value.slice(0, TEXT_MAX)}…` : value) : String(value);
  return h("span", { class: `json ${kind}` }, text);
}

const isRow = (value) => Array.isArray(value) && value.length <= 24 && value.every((each) => typeof each !== "object" || each === null);

/** An element for `value`. */
export function tree(value, name = "", depth = 0) {
  const label = name === "" ? null : h("span", { class: "json name" }, `${name}: `);
  if (value === null || typeof value !== "object") return h("div", { class: "leaf" }, label, leaf(value));
  if (isRow(value)) {
    return h("div", { class: "leaf" }, label, "[", value.map((each, index) => [index ? ", " : "", leaf(each)]), "]");
  }
  const entries = Array.isArray(value) ? value.map((each, index) => [index, each]) : Object.entries(value);
  const size = Array.isArray(value) ? `[${entries.length}]` : `{${entries.length}}`;
  const element = h("details", { open: depth < DEPTH_OPEN && entries.length <= SHOWN_MAX }, h("summary", {}, label, h("span", { class: "json size" }, size)));
  let shown = 0;
  const more = h("button", { type: "button", class: "quiet small" });
  const grow = () => {
    const next = entries.slice(shown, shown + SHOWN_MAX);
    shown += next.length;
    more.remove();
    element.append(...next.map(([key, each]) => tree(each, String(key), depth + 1)));
    more.textContent = `${entries.length - shown} more`;
    if (shown < entries.length) element.append(more);
  };
  more.onclick = grow;
  if (element.open) grow();
  else element.addEventListener("toggle", () => { if (!shown) grow(); });
  return element;
}
