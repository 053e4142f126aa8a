// Sends one request and shows what came back, with the same call for a terminal.

import { make, pretty } from "./dom.js";

const SHOWN_MAX = 200000;

export async function send({ path, verb, values, body, key }, result) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const query = new URLSearchParams();
  let target = path;
  for (const { name, place, value } of values) {
    if (place === "path") {
      if (!value) throw new Error(`Fill in ${name}.`);
      target = target.replace(`{${name}}`, encodeURIComponent(value));
    } else if (value && place === "query") query.append(name, value);
    else if (value) headers[name] = value;
  }
  // Relative, as the page itself: it may stand behind a proxy, below a path of its own.
  const url = new URL(target.slice(1) + (query.size ? `?${query}` : ""), document.baseURI);
  const sent = body ? body.value() : null;
  const has = sent && !(typeof sent.body === "string" && sent.body === "");
  if (has && sent.type) headers["Content-Type"] = sent.type;
  const options = { method: verb.toUpperCase(), headers, ...(has ? { body: sent.body } : {}) };
  const began = performance.now();
  const answer = await fetch(url, options);
  const blob = await answer.blob();
  const took = (performance.now() - began).toFixed(1);
  const status = make("p", { class: answer.ok ? "good" : "bad" }, [[answer.status, answer.statusText, `${blob.size} bytes, ${took} ms`].filter(Boolean).join(" ")]);
  const told = [...answer.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
  result.replaceChildren(status, await shown(blob, answer.headers.get("content-type") || ""), make("pre", {}, [told]),
    make("h3", {}, ["The same in a terminal"]), make("pre", {}, [curl(url, options.method, headers, has ? sent.curl : [])]));
}

async function shown(blob, type) {
  if (/^image\/(png|jpeg|webp|gif)/.test(type)) {
    const picture = make("img", { alt: "the answer" }, []);
    picture.src = URL.createObjectURL(blob);
    picture.addEventListener("load", () => URL.revokeObjectURL(picture.src));
    return picture;
  }
  const head = new Uint8Array(await blob.slice(0, SHOWN_MAX).arrayBuffer());
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: blob.size <= SHOWN_MAX }).decode(head);
  } catch {
    return make("pre", {}, [[...head.slice(0, 256)].map((each) => each.toString(16).padStart(2, "0")).join(" ")]);
  }
  try {
    text = pretty(JSON.parse(text));
  } catch {
    // it is shown as it came
  }
  return make("pre", {}, [text.length > SHOWN_MAX ? `${text.slice(0, SHOWN_MAX)} ...` : text]);
}

function curl(url, method, headers, body) {
  const words = ["curl", "-X", method, url.href];
  for (const [name, value] of Object.entries(headers)) {
    if (name === "Content-Type") continue;
    words.push("-H", name === "Authorization" ? "Authorization: Bearer KEY" : `${name}: ${value}`);
  }
  return [...words, ...body].map(quoted).join(" ");
}

function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
