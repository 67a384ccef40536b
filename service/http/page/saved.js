// Saved inputs: links, which carry them in their fragment, and the history in this browser's storage.
// Inputs have the shape of a /compare request, but may have a single response. Neither source is trusted.

const HISTORY = "judge.history";
const MAX_ENTRIES = 30;
const MAX_STORED = 1_000_000;
const MAX_FRAGMENT = 100_000;
const MAX_RESPONSES = 16;
const MAX_LABELS = 8;
const MAX_NAME = 128;

const isText = (value, limit = MAX_STORED) => typeof value === "string" && value.length <= limit;
const oneOf = (value, allowed) => (allowed.includes(value) ? value : allowed[0]);
const isLabels = (value) =>
  Array.isArray(value) && value.length > 0 && value.length <= MAX_LABELS && value.every((label) => isText(label, MAX_NAME));

function cleanTemplate(template) {
  if (isText(template, MAX_NAME)) return template;
  if (template === null || typeof template !== "object") return null;
  const { layout, instruction = "", labels } = template;
  if (!isText(layout) || !isText(instruction) || !isLabels(labels?.yes) || !isLabels(labels?.no)) return null;
  const format = oneOf(template.format, ["chat", "raw"]);
  return { format, layout, instruction, labels: { yes: [...labels.yes], no: [...labels.no] } };
}

// Inputs reduced to what the form can hold, or null if that would change their meaning.
export function clean(inputs) {
  if (inputs === null || typeof inputs !== "object") return null;
  const { prompt, responses } = inputs;
  if (!isText(prompt) || !Array.isArray(responses) || !responses.every((response) => isText(response))) return null;
  if (responses.length < 1 || responses.length > MAX_RESPONSES) return null;
  const cleaned = {
    prompt,
    responses: [...responses],
    mode: oneOf(inputs.mode, ["pointwise", "pairwise"]),
    truncation: oneOf(inputs.truncation, ["error", "prompt_left", "response_middle"]),
    tie_margin: Number.isFinite(inputs.tie_margin) ? Math.min(Math.max(inputs.tie_margin, 0), 1000) : 0,
  };
  if (inputs.template !== undefined) {
    cleaned.template = cleanTemplate(inputs.template);
    if (cleaned.template === null) return null;
  } else if (inputs.category !== undefined) {
    if (!isText(inputs.category, MAX_NAME)) return null;
    cleaned.category = inputs.category;
  }
  return cleaned;
}

// The fragment for these inputs (base64url of their JSON), or null if it is too long for a link.
export function toFragment(inputs) {
  const bytes = new TextEncoder().encode(JSON.stringify(inputs));
  if (bytes.length * (4 / 3) > MAX_FRAGMENT) return null;
  const binary = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return "#s=" + btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

// The inputs in a fragment; undefined if it has none, null if they are unreadable.
export function fromFragment(fragment) {
  if (!fragment.startsWith("#s=")) return undefined;
  if (fragment.length > MAX_FRAGMENT + 3) return null;
  try {
    const binary = atob(fragment.slice(3).replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0));
    return clean(JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes)));
  } catch {
    return null;
  }
}

// Entries {at, outcome, inputs}, newest first; `at` in milliseconds since 1970.
export function readHistory() {
  try {
    const entries = JSON.parse(localStorage.getItem(HISTORY) ?? "[]");
    return entries
      .slice(0, MAX_ENTRIES)
      .filter((entry) => Number.isFinite(entry?.at) && isText(entry.outcome))
      .map(({ at, outcome, inputs }) => ({ at, outcome, inputs: clean(inputs) }))
      .filter((entry) => entry.inputs !== null);
  } catch {
    return [];
  }
}

// Puts an entry at the front of the history, replacing one with the same inputs. Returns the history.
export function remember(inputs, outcome) {
  const same = JSON.stringify(inputs);
  const others = readHistory().filter((entry) => JSON.stringify(entry.inputs) !== same);
  const entries = [{ at: Date.now(), outcome, inputs }, ...others].slice(0, MAX_ENTRIES);
  while (entries.length && JSON.stringify(entries).length > MAX_STORED) entries.pop();
  try {
    localStorage.setItem(HISTORY, JSON.stringify(entries));
  } catch {
    // Storage is off or full: the history stays as it was.
  }
  return readHistory();
}

export function forget() {
  try {
    localStorage.removeItem(HISTORY);
  } catch {
    // Storage is off: there is no history.
  }
}
