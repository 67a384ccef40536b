// The page's main module: runs requests, and moves inputs between form, link and history.

import { Failure, apiKey, ask, setApiKey } from "./api.js";
import { byId, duration, el, plural } from "./dom.js";
import * as form from "./form.js";
import * as live from "./live.js";
import { setJudge, showComparison, showFailure, showScore } from "./results.js";
import * as saved from "./saved.js";

const EXAMPLE = {
  prompt: "What is the capital of Australia?",
  responses: [
    "Canberra.",
    "Sydney is the capital of Australia.",
    "Australia's capital is Canberra, chosen in 1908 as a compromise between Sydney and Melbourne.",
  ],
};

let running = null;

// Announced to screen readers; `shown: false` for what the page already shows elsewhere, such as a result.
const say = (text, { shown = true } = {}) => {
  byId("status").textContent = text;
  byId("status").classList.toggle("away", !shown);
};

function requestOf({ responses, mode, tie_margin: margin, ...question }) {
  if (responses.length === 1) return { path: "score", body: { ...question, response: responses[0] } };
  return { path: "compare", body: { ...question, responses, mode, tie_margin: margin } };
}

async function run() {
  const problem = form.complaint();
  if (problem) return say(problem);
  running?.abort();
  const mine = (running = new AbortController());
  const inputs = form.read();
  const request = requestOf(inputs);
  const stopProgress = showProgress(inputs.responses.length);
  try {
    const result = await ask(request.path, request.body, mine.signal);
    if (running !== mine) return undefined;
    const show = request.path === "score" ? showScore : showComparison;
    const outcome = show(result, inputs, request);
    say(`${outcome}.`, { shown: false });
    comeIntoView();
    showHistory(saved.remember(inputs, outcome));
  } catch (error) {
    if (running === mine) fail(error);
  } finally {
    stopProgress(running === mine);
    if (running === mine) running = null;
  }
  return undefined;
}

function fail(error) {
  if (error.name === "AbortError") return say("Cancelled.");
  if (!(error instanceof Failure)) {
    say("This page failed to show the answer.");
    throw error;
  }
  say(showFailure(error), { shown: false });
  comeIntoView();
  if (error.code === "unauthorized") askForKey();
  return undefined;
}

function showProgress(responses) {
  const started = performance.now();
  byId("results").setAttribute("aria-busy", "true");
  byId("progress").hidden = false;
  byId("cancel").hidden = false;
  byId("run").textContent = "Run again";
  say(`Judging ${plural(responses, "response")}…`);
  // Outside the announced text: screen readers must not read a running clock aloud.
  const tick = setInterval(() => {
    byId("progress").dataset.time = duration((performance.now() - started) / 1000);
  }, 100);
  // If another run has started meanwhile, these indicators belong to it.
  return (last) => {
    clearInterval(tick);
    if (!last) return;
    byId("results").setAttribute("aria-busy", "false");
    byId("progress").hidden = true;
    delete byId("progress").dataset.time;
    if (document.activeElement === byId("cancel")) byId("run").focus();
    byId("cancel").hidden = true;
    byId("run").textContent = "Run";
  };
}

// On a narrow screen the result is below the form: scroll to it.
function comeIntoView() {
  if (byId("results").getBoundingClientRect().top > innerHeight * 0.7) byId("results").scrollIntoView();
}

function askForKey() {
  byId("key-box").open = true;
  byId("key").focus();
}

function showHistory(entries) {
  const time = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "short" });
  byId("history").hidden = entries.length === 0;
  byId("entries").replaceChildren(
    ...entries.map(({ at, outcome, inputs }) =>
      el(
        "li",
        {},
        el(
          "button",
          { type: "button", click: () => restore(inputs) },
          el("span", { class: "said" }, inputs.prompt),
          el("span", { class: "hint" }, `${outcome} · ${time.format(at)}`),
        ),
      ),
    ),
  );
}

function restore(inputs) {
  form.fill(inputs);
  say("The form is filled from the history. Nothing has been run.");
  byId("prompt").focus();
}

function openLink() {
  const inputs = saved.fromFragment(location.hash);
  if (inputs === undefined) return;
  if (inputs === null) return say("This link cannot be read: it is incomplete, or was not made by this page.");
  form.fill(inputs);
  const own = typeof inputs.template === "object" ? " It has a template of its own: read it before you run." : "";
  say(`The form is filled from the link. Nothing has been run.${own}`);
}

async function share() {
  const fragment = saved.toFragment(form.read());
  if (fragment === null) return say("This is too long for a link.");
  history.replaceState(null, "", fragment);
  try {
    await navigator.clipboard.writeText(location.href);
    return say("Link copied. It contains all inputs, after the #, but no key.");
  } catch {
    return say("The link is in the address bar. It contains all inputs, after the #, but no key.");
  }
}

// Shows who judges, and adapts the form to that. If it fails, the page still works.
async function introduce() {
  try {
    const [models, templates] = await Promise.all([ask("v1/models"), ask("templates")]);
    form.setJudge(models.data[0].judge, templates);
    setJudge(models.data[0].judge);
    byId("model").textContent = describe(models.data[0]);
    byId("model").title = models.data[0].note ?? "";
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    byId("model").textContent = error.code === "unauthorized" ? "This service needs a key." : error.message;
    if (error.code === "unauthorized" && !apiKey()) byId("key-box").open = true;
  }
}

function describe({ id, engine, judge, fingerprint, workers, note }) {
  const alive = workers?.length ? plural(workers.length, "worker") : "no worker";
  return [id, `${judge} by ${engine}`, fingerprint.slice(0, 12), alive, note].filter(Boolean).join(" · ");
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("cancel").addEventListener("click", () => running?.abort());
  byId("share").addEventListener("click", share);
  byId("example").addEventListener("click", () => form.fill({ ...form.read(), ...EXAMPLE }));
  byId("forget").addEventListener("click", () => {
    saved.forget();
    showHistory([]);
    say("The history is cleared.");
    byId("run").focus();
  });
  byId("key").addEventListener("change", () => {
    setApiKey(byId("key").value.trim());
    introduce();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      // The key field has not fired its change event yet.
      if (document.activeElement === byId("key")) setApiKey(byId("key").value.trim());
      run();
    } else if (event.key === "Escape") {
      if (byId("key-box").open && byId("key-box").contains(document.activeElement)) {
        byId("key-box").open = false;
        byId("key-box").firstElementChild.focus();
      } else running?.abort();
    }
  });
  addEventListener("hashchange", openLink);
}

form.setUp();
byId("key").value = apiKey();
listen();
showHistory(saved.readHistory());
openLink();
live.setUp();
introduce();
