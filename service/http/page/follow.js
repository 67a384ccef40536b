// Who judges, on the model line: follows the service when it stops, returns, or returns with another model.

import { Failure, apiKey, ask } from "./api.js";
import { byId, plural } from "./dom.js";

// Polls of the load between two questions after the model.
const EVERY = 8;

let tell = () => {};
let known = null;
let heard = "";
let since = null;
let started = null;
let polls = 0;
// The key, perhaps "", that the service does not accept: it is not asked again with the same one.
let refused = null;

// `tell(model, templates, before)` is called for each new model, with the one that it replaces or null.
export function setUp(onModel) {
  tell = onModel;
  return introduce();
}

// The load was read; `startTime` is when the service's process began, or null.
export function answered(startTime) {
  const restarted = started !== null && startTime !== started;
  started = startTime ?? started;
  polls += 1;
  if (refused === apiKey() && !since && !restarted) return;
  if (since || restarted || !known?.workers?.length || polls % EVERY === 0) introduce();
}

// Nothing answers at the service's address.
export function lost() {
  since ??= new Date();
  const time = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" }).format(since);
  show(`No answer from the service since ${time}. This page keeps asking${known ? `; the last model was ${known.id}` : ""}.`, "down");
}

// Asks for the model and shows it. If that fails, the page still works.
export async function introduce() {
  try {
    const model = (await ask("v1/models")).data[0];
    since = null;
    refused = null;
    const { workers, ...lasting } = model;
    if (heard !== JSON.stringify(lasting)) {
      const templates = await ask("templates");
      heard = JSON.stringify(lasting);
      tell(model, templates, known);
    }
    known = model;
    show(describe(model), "", model.note ?? "");
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    fail(error);
  }
}

function fail(error) {
  if (error.code === "network") return lost();
  since = null;
  if (error.code !== "unauthorized") return show(error.message, "down");
  if (!apiKey() && refused === null) byId("key-box").open = true;
  refused = apiKey();
  return show(apiKey() ? "The service does not accept this API key." : "This service needs an API key.", "down");
}

function show(text, state, title = "") {
  const line = byId("model");
  // Set only when it differs: it is announced.
  if (line.textContent !== text) line.textContent = text;
  line.className = `quiet ${state}`;
  line.title = title;
}

function describe({ id, engine, judge, fingerprint, workers, note }) {
  const alive = workers?.length ? plural(workers.length, "worker") : "no worker yet";
  return [id, `${judge} by ${engine}`, fingerprint.slice(0, 12), alive, note].filter(Boolean).join(" · ");
}
