// The page's main module: runs requests, and moves inputs between form, link and history.

import { apiKey, ask, setApiKey } from "./api.js";
import * as decide from "./decide.js";
import { byId, el, plural } from "./dom.js";
import * as follow from "./follow.js";
import * as form from "./form.js";
import * as live from "./live.js";
import { setJudge, showComparison, showScore } from "./results.js";
import { Runner } from "./runner.js";
import * as saved from "./saved.js";
import * as tabs from "./tabs.js";
import * as upload from "./upload.js";

const EXAMPLE = {
  prompt: "What is the capital of Australia?",
  responses: [
    "Canberra.",
    "Sydney is the capital of Australia.",
    "Australia's capital is Canberra, chosen in 1908 as a compromise between Sydney and Melbourne.",
  ],
};

const runner = new Runner(byId("form"), byId("results"), onFailure);
const say = (text) => runner.say(text);
const PANELS = { judge: { run, cancel: () => runner.cancel() }, decisions: decide, file: upload };

function requestOf({ responses, mode, tie_margin: margin, ...question }) {
  if (responses.length === 1) return { path: "score", body: { ...question, response: responses[0] } };
  return { path: "compare", body: { ...question, responses, mode, tie_margin: margin } };
}

function run() {
  const problem = form.complaint();
  if (problem) return say(problem);
  const inputs = form.read();
  const request = requestOf(inputs);
  return runner.run(`Judging ${plural(inputs.responses.length, "response")}…`, async (signal, isMine) => {
    const result = await ask(request.path, request.body, signal);
    if (!isMine()) return "";
    const outcome = (request.path === "score" ? showScore : showComparison)(result, inputs, request);
    showHistory(saved.remember(inputs, outcome));
    return outcome;
  });
}

function onFailure(failure) {
  if (failure.code === "unauthorized") askForKey();
  if (failure.code === "network") follow.lost();
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

function adapt(model, templates, before) {
  form.setJudge(model.judge, templates);
  upload.setJudge(model.judge, templates);
  setJudge(model.judge, model, before);
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
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
    follow.introduce();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      // The key field has not fired its change event yet.
      if (document.activeElement === byId("key")) setApiKey(byId("key").value.trim());
      PANELS[tabs.current()].run();
    } else if (event.key === "Escape") {
      if (byId("key-box").open && byId("key-box").contains(document.activeElement)) {
        byId("key-box").open = false;
        byId("key-box").firstElementChild.focus();
      } else PANELS[tabs.current()].cancel();
    }
  });
  addEventListener("hashchange", () => {
    tabs.followAddress();
    openLink();
  });
}

form.setUp();
decide.setUp(onFailure);
upload.setUp(onFailure);
tabs.setUp();
byId("key").value = apiKey();
listen();
showHistory(saved.readHistory());
openLink();
follow.setUp(adapt);
live.setUp(follow);
