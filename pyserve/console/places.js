// Where in the page we are (the part of the address behind #), and where the other API's page is.

import { state } from "./state.js";

/** {view, name, version, tab} of the address. */
export function here() {
  const parts = location.hash.replace(/^#\/?/, "").split("/").map((each) => {
    try {
      return decodeURIComponent(each);
    } catch {
      return each;
    }
  });
  if (parts[0] === "models" && parts[1]) return { view: "model", name: parts[1], version: parts[2] || "", tab: parts[3] || "" };
  return { view: ["errors", "log", "deploy"].includes(parts[0]) ? parts[0] : "models" };
}

export function modelPlace(name, version, tab = "") {
  return `#/models/${encodeURIComponent(name)}/${encodeURIComponent(version)}${tab ? `/${tab}` : ""}`;
}

/** The base URL of an API as this browser reaches it; "" if it cannot. */
export function base(scope) {
  if (state.scope === scope || state.both) return new URL(".", location.href).href;
  const place = state.now && state.now.server[scope];
  return place ? `${place.scheme}://${place.host || location.hostname}:${place.port}/` : "";
}
