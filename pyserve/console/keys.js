// The keys that calls need where the server asks for them. They stay in this tab, and are sent to this server only.

import { key, setKey } from "./api.js";
import { askFor } from "./dialog.js";
import { refresh, state } from "./state.js";

/** Asks for the keys of the APIs on this port. */
export async function askForKeys() {
  const scopes = state.both ? ["management", "inference"] : [state.scope];
  const said = await askFor({
    title: "Key for this server",
    text: "It is kept in this tab until that is closed. The file key_file.json in the folder where the server was started has the keys.",
    fields: scopes.map((each) => ({ name: each, label: `${each === "management" ? "Management" : "Inference"} key`, value: key(each) })),
    yes: "Use",
  });
  if (said === null) return;
  scopes.forEach((each, index) => setKey(each, said[index]));
  refresh();
}

export function hasKey() {
  return Boolean(key("management") || key("inference"));
}
