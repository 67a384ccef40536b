// Requests to the service beside which this page lies, and what to do about its errors.

const KEY = "judge.key";

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function setApiKey(key) {
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Storage is off: then no key can be kept, and a guarded service says 401.
  }
}

export class Failure extends Error {
  constructor({ code, message, status = 0, param = null, requestId = null, retryAfter = null }) {
    super(message);
    Object.assign(this, { code, status, param, requestId, retryAfter });
  }

  get advice() {
    return (this.retryAfter ? `Try again in ${this.retryAfter} s. ` : "") + (ADVICE[this.code] ?? "");
  }
}

const WAIT = "The service works, but not on this now. Run again in a moment.";
const ADVICE = {
  bad_label: "Choose labels that are one token where the layout ends; try them with and without a leading space.",
  bad_template: "Correct the layout, or choose a template for this mode.",
  body_timeout: "The request arrived too slowly. Run again.",
  context_length_exceeded: "Shorten the text, or have it cut: Options, text over the model's length.",
  deadline_exceeded: "The judgement took too long. Run again when the queue is shorter.",
  draining: WAIT,
  inference_failed: "The model failed on this text. Run again; if it fails again, the service's log says why.",
  internal_error: "The service's log says more, under the request's id.",
  invalid_request: "Correct the field that is named.",
  network: "Check that the service runs and that this page can reach it.",
  label_not_returned: "The upstream server's list of likely tokens holds none of the labels: start the service with a floor.",
  not_ready: "No worker is ready: the model may still be loading. Run again in a moment.",
  overloaded: WAIT,
  payload_too_large: "Send less text.",
  queue_unavailable: "The queue (Redis) cannot be reached. Run again in a moment.",
  rate_limited: "This key asks for more than it may. Run again later.",
  template_not_found: "Choose another category or template.",
  unauthorized: "Enter a valid key under API key, then run again.",
  unparseable: "The judge wrote no grade that can be read. Try another wording, or another judge.",
  unsupported_by_judge: "Ask for what this judge does, or start a service with another one.",
  unreadable: "Something between this page and the service answered in its place, a proxy perhaps.",
};

// The parsed answer, or a Failure; a cancelled request raises AbortError.
export async function ask(path, body = null, signal = null) {
  const headers = {};
  const key = apiKey();
  if (/[^\x21-\x7e]/.test(key)) {
    throw new Failure({ code: "unauthorized", message: "The key holds a space or a character that no key can have." });
  }
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure({ code: "network", message: "No answer from the service." });
  }
  return read(answer);
}

async function read(answer) {
  let content = null;
  try {
    content = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (answer.ok && content !== null) return content;
  const about = {
    status: answer.status,
    requestId: answer.headers.get("x-request-id"),
    retryAfter: answer.headers.get("retry-after"),
  };
  if (!content?.error?.code) throw new Failure({ ...about, code: "unreadable", message: "The answer is none of the service's." });
  throw new Failure({ ...content.error, ...about });
}
