// Calls to the server that the page came from, with the key of the API that each belongs to.

/** An answer that is no success. */
export class ApiError extends Error {
  constructor(status, body, text) {
    super((body && body.message) || text || `The server answered ${status}.`);
    this.status = status;
    this.detail = (body && body.detail) || {};
    this.needsKey = status === 401 || status === 403 && this.message.startsWith("Token") || Boolean(body && body.type === "InvalidKeyException");
  }
}

/** The server does not answer at all. */
export class GoneError extends Error {}

const name = (scope) => `pyserve-key-${scope}`;

/** The key for "inference" or "management"; "" if none was given. It is forgotten with the tab. */
export function key(scope) {
  return sessionStorage.getItem(name(scope)) || "";
}

export function setKey(scope, text) {
  if (text) sessionStorage.setItem(name(scope), text);
  else sessionStorage.removeItem(name(scope));
}

/** fetch() with the key of `scope`. Raises GoneError. */
export async function call(scope, method, path, options = {}) {
  const headers = { ...options.headers };
  if (key(scope)) headers.Authorization = `Bearer ${key(scope)}`;
  try {
    return await fetch(path, { ...options, method, headers, cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new GoneError("The server does not answer.");
  }
}

/** The JSON answer of a call. Raises ApiError for any but 2xx. */
export async function ask(scope, method, path, options) {
  const answer = await call(scope, method, path, options);
  let text = "";
  try {
    text = await answer.text();
  } catch {
    throw new GoneError("The server hung up.");
  }
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // an answer of something between us and the server
  }
  if (!answer.ok) throw new ApiError(answer.status, body, text.slice(0, 300));
  return body;
}

export const quoted = encodeURIComponent;

/** What the error says, with its cause and fix where it has them. */
export function reasonOf(error) {
  const { text, fix, reason, exception, where } = error.detail || {};
  return [error.message, exception && text ? `${exception}: ${text}` : text || reason, where, fix]
    .filter((each, index, all) => each && all.indexOf(each) === index).join(" — ");
}
