// Requests to the service that serves this page, and advice on its errors.

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
    // Storage is off: the key cannot be kept, and a service with keys answers 401.
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

const BUSY = "The service takes no new work at the moment. Run again shortly.";
const ADVICE = {
  bad_label: "Choose labels that are one token at the end of the layout; try each with and without a leading space.",
  bad_template: "Correct the layout, or choose a template for this mode.",
  body_timeout: "The request arrived too slowly. Run again.",
  context_length_exceeded: "Shorten the text, or choose a cut under Options, text over the model's length.",
  deadline_exceeded: "The judgement took too long. Run again when the queue is shorter.",
  draining: BUSY,
  inference_failed: "The model failed on this text. Run again; if that fails too, the service's log says why.",
  internal_error: "The service's log has the details under the request's id.",
  invalid_request: "Correct the named field.",
  network: "Check that the service runs and is reachable from this page. What you have written stays here.",
  label_not_returned: "The upstream server returned none of the labels among its likely tokens: start the service with --floor.",
  not_ready: "No worker is ready: the model may still be loading. Run again in a moment.",
  overloaded: BUSY,
  payload_too_large: "Send less text.",
  queue_unavailable: "The queue (Redis) cannot be reached. Run again in a moment.",
  rate_limited: "This key has used up its rate limit. Run again later.",
  template_not_found: "Choose another category or template.",
  unauthorized: "The service does not accept this key. Enter another under API key, then run again.",
  unparseable: "The judge's text states no readable grade. Try another wording, or another judge.",
  unsupported_by_judge: "This judge cannot do that: choose another mode, or start a service with another judge.",
  unreadable: "Something between this page and the service answered instead, perhaps a proxy.",
};

// Returns the parsed answer. Throws Failure, or AbortError for a cancelled request.
export async function ask(path, body = null, signal = null) {
  const headers = {};
  const key = apiKey();
  if (/[^\x21-\x7e]/.test(key)) {
    throw new Failure({ code: "unauthorized", message: "The key contains a space or another character that keys cannot have." });
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
  if (!content?.error?.code) throw new Failure({ ...about, code: "unreadable", message: "The answer is not from the service." });
  throw new Failure({ ...content.error, ...about });
}
