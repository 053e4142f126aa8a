// The call that the form makes, as curl, Python and JavaScript to copy.

import { key } from "./api.js";
import { base } from "./places.js";

const shell = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
const python = (text) => JSON.stringify(text);

/** A text that JSON also is, as Python writes it. */
function pythonValue(json) {
  try {
    JSON.parse(json);
  } catch {
    return null;
  }
  return json.replace(/"(?:[^"\\]|\\.)*"|\btrue\b|\bfalse\b|\bnull\b/g, (word) => ({ true: "True", false: "False", null: "None" }[word] ?? word));
}

/** {curl, python, requests, javascript} of a call: {path, name, version, kind: "file"|"text"|"json", type, file, text}. */
export function snippets(call) {
  const url = new URL(call.path, base("inference")).href;
  const hasKey = Boolean(key("inference"));
  const file = call.file || "input.bin";
  const version = call.version ? `, version=${python(call.version)}` : "";
  const client = `client = pyserve.Client(${python(base("inference").replace(/\/$/, ""))}${hasKey ? ', token=os.environ["PYSERVE_TOKEN"]' : ""})`;
  const header = `-H ${shell(`Content-Type: ${call.type}`)}`;
  const body = call.kind === "file" ? `-T ${shell(file)}` : `--data-binary ${shell(call.text)}`;
  const headers = { "Content-Type": call.type };
  if (hasKey) headers.Authorization = "Bearer KEY";
  const value = call.kind === "json" ? pythonValue(call.text) ?? python(call.text) : python(call.text);
  const given = call.kind === "file" ? `Path(${python(file)})` : value;
  const data = call.kind === "file" ? `open(${python(file)}, "rb")` : `${python(call.text)}.encode()`;
  const imports = [hasKey ? "import os" : "", call.kind === "file" ? "from pathlib import Path" : ""].filter(Boolean);
  return {
    curl: `curl -X POST ${shell(url)} \\\n  ${hasKey ? '-H "Authorization: Bearer $PYSERVE_TOKEN" \\\n  ' : ""}${header} ${body}`,
    python: `${imports.length ? `${imports.join("\n")}\n\n` : ""}import pyserve\n\n${client}\nprint(client.predict(${python(call.name)}, ${given}${version}))`,
    requests: `import requests\n\nanswer = requests.post(\n    ${python(url)},\n    data=${data},\n    headers=${JSON.stringify(headers)},\n)\nanswer.raise_for_status()\nprint(answer.json())`,
    javascript: `const answer = await fetch(${JSON.stringify(url)}, {\n  method: "POST",\n  headers: ${JSON.stringify(headers)},\n  body: ${call.kind === "file" ? "file" : JSON.stringify(call.text)},${call.kind === "file" ? " // a File, of an <input type=file>" : ""}\n});\nconsole.log(await answer.json());`,
  };
}
