// Try a model: a file, a text or JSON goes to it as any client would send it, and the answer is shown.

import { call, quoted } from "./api.js";
import { showAnswer } from "./answer.js";
import { copyButton, h } from "./dom.js";
import { size } from "./format.js";
import { askForKeys } from "./keys.js";
import { fitsBytes, fitsText, numberCount, sampleBytes, sampleText } from "./sample.js";
import { snippets } from "./snippets.js";

const WAYS = { file: "File", json: "JSON", text: "Text" };
const FIRST = { picture: "file", text: "text", tensor: "json", own: "json" };
const SENTENCE = "The weather is lovely today.";
const LANGUAGES = { curl: "curl", python: "Python", requests: "requests", javascript: "JavaScript" };

class TryForm {
  constructor(model) {
    this.model = model;
    this.way = model.kind === "tensor" && !fitsText(model.inputs) ? "file" : FIRST[model.kind];
    this.file = null;
    this.language = "curl";
    this.asking = null;
    this.editor = h("textarea", { id: "try-text", rows: 10, spellcheck: "false", autocapitalize: "off", "aria-label": "Body of the request" });
    this.editor.oninput = () => this.drawSnippet();
    this.answer = h("div", { class: "answer-box", role: "status", "aria-live": "polite" }, h("p", { class: "empty" }, "The answer appears here."));
    this.input = h("div", { class: "input" });
    this.code = h("div", { class: "code" });
    this.send = h("button", { type: "button", class: "primary", id: "try-send" }, "Send");
    this.send.onclick = () => (this.asking ? this.asking.abort() : this.ask());
    this.texts = {};
    this.setText();
  }

  element() {
    const box = h("div", { class: "try halves" },
      h("section", { class: "card" }, h("h2", {}, "Request"), this.ways(), this.input, h("div", { class: "buttons" }, this.send)),
      h("section", { class: "card" }, h("h2", {}, "Answer"), this.answer),
      h("section", { class: "card whole" }, h("h2", {}, "The same from your code"), this.code));
    box.addEventListener("paste", (event) => {
      const [file] = event.clipboardData ? event.clipboardData.files : [];
      if (file) this.take(file);
    });
    this.drawInput();
    return box;
  }

  ways() {
    const choose = (name) => h("label", {}, this.radio(name), WAYS[name]);
    return h("fieldset", { class: "choice" }, h("legend", { class: "hidden" }, "What to send"), Object.keys(WAYS).map(choose));
  }

  radio(name) {
    const radio = h("input", { type: "radio", name: "way", value: name, checked: name === this.way });
    radio.onchange = () => {
      this.texts[this.way] = this.editor.value;
      this.way = name;
      if (name in this.texts) this.editor.value = this.texts[name];
      else this.setText();
      this.drawInput();
    };
    return radio;
  }

  setText(isRandom = false) {
    const { inputs, has_names: hasNames, kind } = this.model;
    const isJson = this.way === "json";
    if (kind === "text") this.editor.value = isJson ? JSON.stringify({ data: SENTENCE }) : SENTENCE;
    else if (kind === "tensor" && fitsText(inputs)) this.editor.value = sampleText(inputs, hasNames, isRandom);
    else this.editor.value = kind === "own" && isJson ? '{"data": "text"}' : "";
  }

  drawInput() {
    this.editor.rows = Math.min(18, Math.max(5, this.editor.value.split("\n").length + 1));
    this.input.replaceChildren(...(this.way === "file" ? this.fileInput() : this.textInput()).filter(Boolean));
    this.drawSnippet();
  }

  textInput() {
    const { inputs, kind } = this.model;
    const fill = (isRandom) => () => {
      this.setText(isRandom);
      this.drawSnippet();
    };
    const fillers = kind === "tensor" && this.way === "json" && fitsText(inputs)
      ? h("div", { class: "line" }, h("span", { class: "note" }, "Fill in"), h("button", { type: "button", class: "small", onclick: fill(false) }, "zeros"), h("button", { type: "button", class: "small", onclick: fill(true) }, "random numbers")) : null;
    return [fillers, this.editor];
  }

  fileInput() {
    const isPicture = this.model.kind === "picture";
    const picker = h("input", { type: "file", id: "try-file", class: "hidden", accept: isPicture ? "image/*" : null });
    picker.onchange = () => picker.files[0] && this.take(picker.files[0]);
    this.preview = h("div", { class: "preview" });
    const zone = h("label", { class: "drop", for: "try-file" }, this.preview,
      h("span", {}, h("b", {}, isPicture ? "Drop a picture" : "Drop a file"), " here, choose one, or paste it"), picker);
    for (const name of ["dragenter", "dragover"]) {
      zone.addEventListener(name, (event) => {
        event.preventDefault();
        zone.classList.add("over");
      });
    }
    for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files[0]) this.take(event.dataTransfer.files[0]);
    });
    this.showFile();
    return [zone, this.bytesButton()];
  }

  bytesButton() {
    const { inputs, kind } = this.model;
    if (kind !== "tensor" || !fitsBytes(inputs)) return null;
    const take = () => this.take(new File([sampleBytes(inputs)], "input.bin", { type: "application/octet-stream" }));
    return h("div", { class: "line" }, h("span", { class: "note" }, `The model takes ${numberCount(inputs).toLocaleString()} numbers, one after the other.`),
      h("button", { type: "button", class: "small", onclick: take }, "Random numbers"));
  }

  take(file) {
    this.file = file;
    if (this.way !== "file") {
      this.way = "file";
      for (const radio of document.getElementsByName("way")) radio.checked = radio.value === "file";
    }
    this.drawInput();
    if (this.model.kind === "picture") this.ask();
  }

  showFile() {
    if (!this.file) return;
    const name = h("span", { class: "note" }, `${this.file.name} · ${size(this.file.size)}`);
    if (!this.file.type.startsWith("image/") || this.file.type.includes("svg")) {
      this.preview.replaceChildren(name);
      return;
    }
    const picture = h("img", { alt: `The picture ${this.file.name}` });
    picture.src = URL.createObjectURL(this.file);
    picture.onload = picture.onerror = () => URL.revokeObjectURL(picture.src);
    this.preview.replaceChildren(picture, name);
  }

  contentType() {
    if (this.way === "json") return "application/json";
    if (this.way === "text") return "text/plain; charset=utf-8";
    return (this.file && this.file.type) || "application/octet-stream";
  }

  path() {
    return `predictions/${quoted(this.model.name)}${this.model.default ? "" : `/${quoted(this.model.version)}`}`;
  }

  drawSnippet() {
    const made = snippets({
      path: this.path(), name: this.model.name, version: this.model.default ? "" : this.model.version, kind: this.way, type: this.contentType(),
      file: this.file ? this.file.name : this.model.kind === "picture" ? "kitten.jpg" : "input.bin", text: this.editor.value,
    });
    const choose = (name) => {
      const button = h("button", { type: "button", class: "small", "aria-pressed": String(name === this.language) }, LANGUAGES[name]);
      button.onclick = () => {
        this.language = name;
        this.drawSnippet();
        this.code.querySelector('[aria-pressed="true"]').focus();
      };
      return button;
    };
    this.code.replaceChildren(h("div", { class: "line" }, Object.keys(LANGUAGES).map(choose), copyButton(made[this.language])),
      h("pre", { tabindex: "0", "aria-label": `The call in ${LANGUAGES[this.language]}` }, made[this.language]));
  }

  async ask() {
    if (this.asking) this.asking.abort();
    if (this.way === "file" && !this.file) {
      this.answer.replaceChildren(h("p", { class: "message" }, "Choose a file first."));
      return;
    }
    const mine = (this.asking = new AbortController());
    this.send.textContent = "Cancel";
    this.answer.setAttribute("aria-busy", "true");
    const began = performance.now();
    try {
      const answer = await call("inference", "POST", this.path(), {
        body: this.way === "file" ? this.file : this.editor.value, signal: mine.signal,
        headers: { "Content-Type": this.contentType(), "x-server-timing": "1" },
      });
      const blob = await answer.blob();
      const shown = await showAnswer(answer, blob, performance.now() - began);
      if (this.asking === mine) this.answer.replaceChildren(...shown);
      if (answer.status === 401) askForKeys();
    } catch (error) {
      const text = error.name === "AbortError" ? "Cancelled." : error.message;
      if (this.asking === mine) this.answer.replaceChildren(h("p", { class: "message" }, text));
    } finally {
      if (this.asking === mine) {
        this.asking = null;
        this.send.textContent = "Send";
        this.answer.removeAttribute("aria-busy");
      }
    }
  }
}

/** The form for `model`, as the state has it in detail. */
export function tryForm(model) {
  return new TryForm(model).element();
}
