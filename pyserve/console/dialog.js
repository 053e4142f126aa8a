// Questions that want an answer before anything is changed, in the browser's own modal dialog: Escape means no.

import { h } from "./dom.js";

function open(element) {
  document.body.append(element);
  element.showModal();
  return new Promise((resolve) => {
    element.addEventListener("close", () => {
      element.remove();
      resolve(element.returnValue);
    });
  });
}

/** Whether the user says yes. `is_danger` colours the button of what cannot be undone. */
export async function confirm({ title, text, yes, isDanger = false }) {
  const element = h("dialog", { "aria-labelledby": "dialog-title" },
    h("h2", { id: "dialog-title" }, title), [].concat(text).map((each) => h("p", {}, each)));
  const no = h("button", { type: "button", autofocus: isDanger }, "Cancel");
  const go = h("button", { type: "button", class: isDanger ? "danger" : "primary", autofocus: !isDanger }, yes);
  no.onclick = () => element.close("");
  go.onclick = () => element.close("yes");
  element.append(h("div", { class: "buttons" }, no, go));
  return (await open(element)) === "yes";
}

/** The texts that were typed into `fields`, [{name, label, value}]; null if the user changed their mind. */
export async function askFor({ title, text, fields, yes }) {
  const inputs = fields.map((each) => h("input", { id: `ask-${each.name}`, type: "password", value: each.value, autocomplete: "off", spellcheck: "false" }));
  const element = h("dialog", { "aria-labelledby": "dialog-title" });
  const form = h("form", { method: "dialog" },
    h("h2", { id: "dialog-title" }, title), [].concat(text).map((each) => h("p", {}, each)),
    fields.map((each, index) => h("label", { class: "field", for: `ask-${each.name}` }, each.label, inputs[index])));
  const no = h("button", { type: "button" }, "Cancel");
  no.onclick = () => element.close("");
  form.append(h("div", { class: "buttons" }, no, h("button", { type: "submit", class: "primary", value: "yes" }, yes)));
  form.onsubmit = (event) => {
    event.preventDefault();
    element.close("yes");
  };
  element.append(form);
  const said = await open(element);
  return said === "yes" ? inputs.map((each) => each.value.trim()) : null;
}
