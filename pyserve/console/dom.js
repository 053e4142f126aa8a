// Elements made of plain values: text becomes text nodes and is never read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element[name] = value;
    else if (name === "make") element.make = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(3)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

/** An HTML element: h("a", {href: "#/"}, "text", [more]). Handlers are properties: {onclick: f}. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** An SVG element. */
export function svg(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/** A place that `patch` fills once, with what make() returns, and then leaves alone: forms keep what was typed. */
export function slot(key, make, properties) {
  return h("div", { ...properties, "data-slot": key, make });
}

const HANDLERS = ["onclick", "oninput", "onchange", "onsubmit", "onkeydown", "onpointermove", "onpointerleave"];

function mount(node) {
  if (node.nodeType !== Node.ELEMENT_NODE) return node;
  const places = [...node.querySelectorAll("[data-slot]")];
  if (node.dataset && node.dataset.slot !== undefined) places.push(node);
  for (const place of places) if (place.make) place.replaceChildren(...[].concat(place.make()));
  return node;
}

const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") || node.getAttribute("data-slot") : null);

function fits(old, fresh) {
  return old && old.nodeName === fresh.nodeName && keyOf(old) === keyOf(fresh);
}

/** Makes `old` equal to `fresh` and keeps its nodes where it can, so that focus, scrolling and layout stay. */
export function patch(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) {
    const isOwn = name === "open" || (name === "style" && !fresh.hasAttribute("style"));
    if (!fresh.hasAttribute(name) && !isOwn) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const name of HANDLERS) if (old[name] !== fresh[name]) old[name] = fresh[name];
  if (old.dataset && old.dataset.slot !== undefined) return;
  patchChildren(old, [...fresh.childNodes]);
}

/** As `patch`, of the children of `parent`. */
export function patchChildren(parent, fresh) {
  let at = parent.firstChild;
  for (const child of fresh) {
    if (at && keyOf(child) !== null && !fits(at, child)) {
      const same = [...parent.childNodes].find((each) => fits(each, child));
      if (same) {
        parent.insertBefore(same, at);
        at = same;
      }
    }
    if (fits(at, child)) {
      patch(at, child);
      at = at.nextSibling;
    } else {
      parent.insertBefore(mount(child), at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

/** Copies text and says so on the button. */
export function copyButton(text, label = "Copy") {
  const button = h("button", { type: "button", class: "quiet small" }, label);
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(typeof text === "function" ? text() : text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => { button.textContent = label; }, 1500);
  };
  return button;
}
