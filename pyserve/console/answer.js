// A model's answer as people want to see it: bars for scores, a picture for a picture, else JSON or text.

import { bars, stageBar } from "./charts.js";
import { copyButton, h } from "./dom.js";
import { duration, size } from "./format.js";
import { tree } from "./tree.js";

const TOP = 5;
const TEXT_MAX = 100000;
const JSON_MAX = 4 << 20;
const PICTURES_MAX = 8;

/** [{name, ms}] of a Server-Timing header. */
export function stagesOf(header) {
  const found = [];
  for (const entry of (header || "").split(",")) {
    const [name, ...rest] = entry.trim().split(";");
    const took = rest.map((each) => /^dur=([\d.]+)$/.exec(each.trim())).find(Boolean);
    if (took) found.push({ name, ms: Number(took[1]) });
  }
  return found;
}

const isScore = (value) => typeof value === "number" && value >= 0 && value <= 1;

/** [label, score] pairs if the answer is such: an object of numbers, or one list of them that add up to one. */
function scoresOf(value) {
  const only = Array.isArray(value) && value.length === 1 && value[0] && typeof value[0] === "object" ? value[0] : value;
  if (Array.isArray(only)) {
    const isShare = only.length > 1 && only.length <= 10000 && only.every(isScore);
    return isShare && Math.abs(only.reduce((a, b) => a + b, 0) - 1) < 0.01 ? only.map((score, index) => [`class ${index}`, score]) : null;
  }
  if (!only || typeof only !== "object") return null;
  const pairs = Object.entries(only);
  return pairs.length && pairs.every(([, score]) => isScore(score)) ? pairs : null;
}

function scores(pairs) {
  const best = [...pairs].sort((a, b) => b[1] - a[1]).slice(0, TOP);
  return bars(best.map(([label, score]) => ({ label, text: `${(score * 100).toFixed(score < 0.1 ? 2 : 1)} %`, share: score })));
}

function isPicture(type, bytes) {
  const magic = [...bytes.slice(0, 4)];
  const starts = (...wanted) => wanted.every((each, index) => magic[index] === each);
  return /^image\/(png|jpeg|gif|webp|bmp)/.test(type) || starts(0x89, 0x50, 0x4e, 0x47) || starts(0xff, 0xd8, 0xff) || starts(0x47, 0x49, 0x46, 0x38);
}

function shownPicture(blob) {
  const picture = h("img", { class: "answer", alt: "The picture that the model answered" });
  picture.src = URL.createObjectURL(blob);
  picture.onload = picture.onerror = () => URL.revokeObjectURL(picture.src);
  return picture;
}

/** Pictures as base64 text, which is how JSON carries them: the value itself, or members of it. */
function picturesIn(value) {
  const members = typeof value === "string" ? [value] : value && typeof value === "object" ? Object.values(value).slice(0, PICTURES_MAX) : [];
  return members.flatMap((each) => (typeof each === "string" ? pictureOf(each) : []));
}

function pictureOf(text) {
  try {
    const bytes = Uint8Array.from(atob(text.replace(/^data:image\/[\w.+-]+;base64,/, "")), (each) => each.charCodeAt(0));
    return bytes.length > 16 && isPicture("", bytes) ? [new Blob([bytes])] : [];
  } catch {
    return [];
  }
}

async function rendered(answer, blob) {
  const type = answer.headers.get("content-type") || "";
  const bytes = new Uint8Array(await blob.slice(0, 16).arrayBuffer());
  if (isPicture(type, bytes)) return { element: shownPicture(blob), text: "" };
  if (blob.size > JSON_MAX || type.startsWith("application/octet-stream")) return { element: download(blob), text: "" };
  const text = await blob.text();
  try {
    const value = JSON.parse(text);
    const found = scoresOf(value);
    const pictures = picturesIn(value);
    const whole = h("details", {}, h("summary", {}, "The whole answer"), tree(value));
    if (pictures.length) return { element: [...pictures.map(shownPicture), whole], text };
    return { element: found ? [scores(found), whole] : tree(value), text };
  } catch {
    return { element: h("pre", { class: "answer", tabindex: "0" }, text.length > TEXT_MAX ? `${text.slice(0, TEXT_MAX)}…` : text || "(empty)"), text };
  }
}

function download(blob) {
  const link = h("a", { class: "button", download: "answer" }, `Save the answer (${size(blob.size)})`);
  link.onclick = () => {
    link.href = URL.createObjectURL(blob);
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  link.setAttribute("href", "#");
  return link;
}

/** Elements for an answer that took `ms` as seen from here. */
export async function showAnswer(answer, blob, ms) {
  const stages = stagesOf(answer.headers.get("server-timing")).filter((each) => each.name !== "total");
  const { element, text } = answer.ok ? await rendered(answer, blob) : await refusal(blob);
  const id = answer.headers.get("x-request-id");
  return [
    h("div", { class: "line" }, h("span", { class: `badge ${answer.ok ? "good" : answer.status >= 500 ? "bad" : "warn"}` }, answer.status),
      h("b", {}, duration(ms)), h("span", { class: "note" }, size(blob.size)),
      text ? copyButton(text, "Copy answer") : null),
    h("div", { class: "result" }, element),
    stages.length ? [h("h3", {}, "Where the time went"), stageBar(stages, duration)] : null,
    id ? h("p", { class: "id" }, "request ", h("code", {}, id)) : null,
  ].flat(2).filter(Boolean);
}

async function refusal(blob) {
  const text = (await blob.text()).slice(0, TEXT_MAX);
  let told = null;
  try {
    told = JSON.parse(text);
  } catch {
    return { element: h("pre", { tabindex: "0" }, text || "(empty)"), text };
  }
  const { fix, text: cause, exception, reason } = told.detail || {};
  const line = [exception, cause].filter(Boolean).join(": ") || reason;
  return { element: [h("p", { class: "message" }, told.message || text), line && line !== told.message ? h("p", { class: "cause" }, line) : null, fix ? h("p", { class: "fix" }, fix) : null,
    h("details", {}, h("summary", {}, "The whole answer"), tree(told))].filter(Boolean), text };
}
