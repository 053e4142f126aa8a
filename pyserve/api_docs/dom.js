// Elements made of text: nothing here reads markup.

export function make(name, attributes, children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function pretty(value) {
  return JSON.stringify(value, null, 2);
}

// What a $ref of the document stands for; anything else as it is.
export function resolved(schema, document) {
  const name = schema && schema.$ref && schema.$ref.split("/").pop();
  return name ? document.components.schemas[name] : schema || {};
}
