// The last errors and the last lines of the log.

import { copyButton, h } from "./dom.js";
import { clock } from "./format.js";
import { modelPlace } from "./places.js";
import { state } from "./state.js";

function errorRow(error) {
  const { text, exception, where, fix, reason } = error.detail;
  const cause = [exception && text ? `${exception}: ${text}` : text || reason, where].filter(Boolean).join(", ");
  return h("li", { class: "card error", "data-key": error.key },
    h("div", { class: "line" }, h("span", { class: `badge ${error.status >= 500 ? "bad" : "warn"}` }, error.status), h("time", {}, clock(error.at)),
      error.model ? h("a", { href: modelPlace(error.model, error.version, "errors") }, `${error.model} ${error.version}`) : h("span", {}, `${error.method} ${error.path}`), error.ids.length > 1 ? h("b", {}, `${error.ids.length} times`) : null),
    h("p", { class: "message" }, error.message), cause && cause !== error.message ? h("p", { class: "cause" }, cause) : null, fix ? h("p", { class: "fix" }, fix) : null,
    error.log ? h("details", {}, h("summary", {}, "What was logged"), h("pre", { tabindex: "0" }, error.log)) : null,
    h("div", { class: "id" }, error.ids.length > 1 ? "latest requests " : "request ", h("code", {}, error.ids.slice(0, 3).join(", "))));
}

/** Errors that say the same of the same model as one, with how many there were and the latest of their ids. */
function grouped(errors) {
  const groups = new Map();
  for (const error of errors) {
    const { text, exception, where, reason } = error.detail;
    const key = JSON.stringify([error.status, error.model, error.version, error.model ? "" : error.path, error.message, text, exception, where, reason]);
    const group = groups.get(key);
    if (group) group.ids.push(error.request_id);
    else groups.set(key, { ...error, ids: [error.request_id], key });
  }
  return [...groups.values()];
}

export function errorsList(errors, empty) {
  if (!errors.length) return h("div", { class: "card blank" }, h("h2", {}, "No errors"), h("p", {}, empty));
  return h("ul", { class: "errors" }, grouped(errors).map(errorRow));
}

function logRow(line) {
  const kind = { ERROR: "bad", CRITICAL: "bad", WARNING: "warn", WARN: "warn" }[line.level] || "";
  return h("li", { class: kind, "data-key": `${line.at} ${line.source} ${line.text.slice(0, 40)}` }, h("time", {}, clock(line.at)), h("span", { class: "level" }, line.level === "WARNING" ? "WARN" : line.level),
    h("span", { class: "source" }, line.source), h("span", { class: "text" }, line.text));
}

export function logList(lines, empty) {
  if (!state.now.server.tells_errors) {
    return h("div", { class: "card blank" }, h("h2", {}, "Not shown"), h("p", {}, "Others can reach this port without a key, and a log may quote files and requests. Ask for a key, or listen on loopback."));
  }
  if (!lines.length) return h("div", { class: "card blank" }, h("h2", {}, "Nothing logged"), h("p", {}, empty));
  const all = () => lines.map((line) => `${new Date(line.at * 1000).toISOString()} ${line.level} ${line.source} ${line.text}`).join("\n");
  return h("section", { class: "card log", tabindex: "0", role: "region", "aria-label": "Log" },
    h("div", { class: "line" }, h("span", { class: "note" }, "The newest lines are at the top."), copyButton(all, "Copy all")), h("ol", {}, [...lines].reverse().map(logRow)));
}
