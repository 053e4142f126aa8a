// What is known of the server: asked for every other second while somebody looks, and kept for the charts.

import { ask, GoneError } from "./api.js";
import { modelBetween, rateOfRow, totalsBetween } from "./rates.js";

const INTERVAL_MS = 2000;
const INTERVAL_AWAY_MS = 5000;
const ANSWER_MS = 10000; // a server that hangs keeps the connection, and says nothing
const POINTS_MAX = 150; // five minutes

export const state = {
  now: null, // the last answer
  error: null, // why there is none that is newer
  scope: document.documentElement.dataset.scope, // whose port this is
  both: document.documentElement.dataset.both === "true", // it is the other API's, too
  totals: [], // points of the charts: {at, rate, failures, mean_ms}
  points: [], // of the model that is looked at
  rates: new Map(), // requests/s by name and version
};

let query = {};
let before = null;
let timer = 0;
let asking = null;
let listener = () => {};

const modelKey = (model) => `${model.name} ${model.version}`;

/** Calls `call` after each answer, and after each that did not come. */
export function onChange(call) {
  listener = call;
}

/** What the answers are to have: {search, state, offset, limit, model, version, errors, log}. Asks at once if it is new. */
export function want(wanted) {
  const changed = JSON.stringify(wanted) !== JSON.stringify(query);
  if (wanted.model !== query.model || wanted.version !== query.version) state.points = [];
  query = wanted;
  if (changed) refresh();
}

/** Asks now. */
export async function refresh() {
  clearTimeout(timer);
  if (asking) asking.abort();
  const mine = (asking = new AbortController());
  const limit = setTimeout(() => mine.abort(new GoneError("The server does not answer.")), ANSWER_MS);
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) if (value !== "" && value !== undefined && value !== false) parameters.set(name, value);
  try {
    take(await ask(state.scope, "GET", `console/state?${parameters}`, { signal: mine.signal }));
    state.error = null;
  } catch (error) {
    if (asking !== mine) return;
    state.error = error;
    before = null; // no rate is drawn over a gap
  } finally {
    clearTimeout(limit);
  }
  if (asking !== mine) return;
  asking = null;
  listener();
  schedule();
}

function schedule() {
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, state.error ? INTERVAL_AWAY_MS : INTERVAL_MS);
}

function take(answer) {
  if (before) addPoints(before, answer);
  before = answer;
  state.now = answer;
}

function addPoints(then, answer) {
  const milliseconds = answer.at - then.at;
  if (milliseconds < 500) return;
  const totals = totalsBetween(then, answer);
  if (totals) push(state.totals, { at: answer.at, ...totals });
  const rows = new Map(then.models.rows.map((row) => [modelKey(row), row]));
  for (const row of answer.models.rows) state.rates.set(modelKey(row), rateOfRow(rows.get(modelKey(row)), row, milliseconds));
  if (state.rates.size > 2000) state.rates.clear();
  if (answer.model && then.model && modelKey(answer.model) === modelKey(then.model)) {
    push(state.points, { at: answer.at, ...modelBetween(then.model, answer.model, milliseconds) });
  }
}

function push(points, point) {
  points.push(point);
  if (points.length > POINTS_MAX) points.shift();
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else refresh();
});
