// Shows answers. Each show function returns its outcome in one sentence, to announce and to keep in the history.

import { byId, el, plural, probability, signed } from "./dom.js";

const LOW_MASS = 0.5;
// What a response's score is called, by judge; in pairwise mode it is always the mean win probability.
const SCORE_OF = { "self-reward": "Score", "reward-model": "Sigmoid of the reward" };

let judge = "yes-no";

export function setJudge(name) {
  judge = name;
}

const scoreName = (mode) => (mode === "pairwise" ? "Mean win probability" : (SCORE_OF[judge] ?? "P(Yes)"));

function put(...children) {
  byId("results").replaceChildren(...children.filter((child) => child !== null));
}

export function showScore(result, inputs, request) {
  const outcome = `${scoreName("pointwise")} ${probability(result.score)}`;
  put(
    el("h2", {}, outcome),
    el("ol", { class: "ranking" }, card({ score: result, text: inputs.responses[0], number: 1 }, scoreName("pointwise"))),
    warning([result.label_mass]),
    result.label_is_argmax === false ? el("p", { class: "note" }, "The model's most likely next token was none of the labels.") : null,
    provenance(result),
    asJson(request, result),
  );
  return `${outcome}, log-odds ${signed(result.log_odds)}`;
}

export function showComparison(result, inputs, request) {
  const sentence = verdict(result, inputs.tie_margin);
  const cards = result.ranking.map((index, place) =>
    card(
      { score: result.scores[index], text: inputs.responses[index], number: index + 1, place: place + 1, best: !result.tie && index === result.best },
      scoreName(result.mode),
    ),
  );
  put(
    el("h2", {}, `${sentence}.`),
    el("ol", { class: "ranking" }, ...cards),
    warning(result.scores.map((score) => score.label_mass)),
    matrix(result),
    result.position_bias ? bias(result.position_bias) : null,
    provenance(result),
    asJson(request, result),
  );
  return sentence;
}

export function showFailure(failure) {
  const facts = [failure.code, failure.status && `HTTP ${failure.status}`, failure.param && `field ${failure.param}`];
  put(
    el(
      "div",
      { class: "failure" },
      el("h2", {}, "Not judged"),
      el("p", { class: "message" }, failure.message),
      failure.advice ? el("p", {}, failure.advice) : null,
      el("p", { class: "hint code" }, facts.filter(Boolean).join(" · ")),
      failure.requestId ? el("p", { class: "hint code" }, `request ${failure.requestId}`) : null,
    ),
  );
  return `Not judged: ${failure.code}. ${failure.message}`;
}

function verdict(result, margin) {
  if (!result.tie) return `Response ${result.best + 1} is best`;
  const [first, second] = result.ranking;
  const within = margin ? `, within ${margin} in log-odds` : "";
  return `A tie between responses ${first + 1} and ${second + 1}${within}`;
}

function card({ score, text, number, place = null, best = false }, label) {
  const known = typeof score.score === "number" ? score.score : 0;
  const bar = el("div", { class: "bar", "aria-hidden": "true" }, el("div"));
  // Set through the DOM: the page's content policy forbids style attributes.
  bar.firstChild.style.inlineSize = `${known * 100}%`;
  const facts = [
    fact(label, probability(score.score), "first"),
    fact(judge === "reward-model" ? "Reward" : "Log-odds", signed(score.log_odds)),
    judge === "reward-model" ? null : fact("Label mass", probability(score.label_mass)),
    typeof score.grade === "number" ? fact("Grade", `${score.grade.toFixed(2)} of 5`) : null,
    score.samples ? fact("Texts with a grade", `${score.samples.parsed} of ${score.samples.drawn}`) : null,
    typeof score.calibrated === "number" ? fact("Calibrated", probability(score.calibrated)) : null,
    typeof score.yes_logprob === "number" ? fact("log P(Yes)", signed(score.yes_logprob)) : null,
    typeof score.no_logprob === "number" ? fact("log P(No)", signed(score.no_logprob)) : null,
  ];
  return el(
    "li",
    { class: best ? "card best" : "card" },
    el(
      "h3",
      {},
      place && el("span", { class: "place" }, `${place}`),
      el("span", {}, `Response ${number}`),
      best ? el("span", { class: "tag" }, "best") : null,
      score.floored ? el("span", { class: "tag warn" }, "floor used") : null,
      score.truncated ? el("span", { class: "tag warn" }, "truncated") : null,
    ),
    el("p", { class: "said" }, text),
    bar,
    el("dl", {}, ...facts),
  );
}

const fact = (name, value, kind = null) => el("div", { class: kind }, el("dt", {}, name), el("dd", {}, value));

function warning(masses) {
  if (!masses.some((mass) => typeof mass === "number" && mass < LOW_MASS)) return null;
  return el("p", { class: "note" }, "With so little label mass the model hardly meant to answer with a label at all.");
}

function matrix(result) {
  const numbers = result.win_probability.map((_, index) => index + 1);
  const rows = result.win_probability.map((row, i) =>
    el("tr", {}, el("th", { scope: "row" }, `${i + 1}`), ...row.map((value, j) => cell(value, i === j))),
  );
  return el(
    "section",
    {},
    el("h3", { id: "matrix-title" }, "Win probability"),
    el("p", { class: "hint" }, "How likely the row's response is better than the column's."),
    el(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": "matrix-title" },
      el(
        "table",
        { class: "matrix" },
        el("thead", {}, el("tr", {}, el("td"), ...numbers.map((n) => el("th", { scope: "col" }, `${n}`)))),
        el("tbody", {}, ...rows),
      ),
    ),
  );
}

function cell(value, diagonal) {
  if (diagonal) return el("td", { class: "self" }, el("span", { class: "away" }, "itself"));
  const made = el("td", { class: value >= 0.5 ? "wins" : "loses" }, value.toFixed(2));
  // No tint at even odds, the full tint at certainty.
  made.style.setProperty("--tint", `${Math.round(Math.abs(value - 0.5) * 90)}%`);
  return made;
}

function bias({ pairs, flips, first_log_odds: first }) {
  const lean = Math.abs(first) < 0.005 ? "neither position is preferred" : `the response shown first gains ${signed(first)} log-odds`;
  return el(
    "section",
    {},
    el("h3", {}, "Position bias"),
    el("p", {}, `${flips} of ${plural(pairs, "pair")} ${flips === 1 ? "changes its" : "change their"} winner with the order; on average ${lean}.`),
  );
}

function provenance({ template, model, mode, usage, timing_ms: timing, fingerprint }) {
  const tokens = plural(usage.prompt_tokens, "token") + (usage.cached_tokens ? `, ${usage.cached_tokens.toLocaleString("en")} of them cached` : "");
  const times = Object.entries(timing).map(([stage, ms]) => `${stage} ${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`);
  const parts = [template, mode, model, fingerprint?.slice(0, 12), tokens, times.join(", ")];
  return el("p", { class: "hint provenance" }, parts.filter(Boolean).join(" · "));
}

function asJson(request, result) {
  const text = (value) => el("pre", { tabindex: "0" }, JSON.stringify(value, null, 2));
  return el(
    "details",
    {},
    el("summary", {}, "Request and answer as JSON"),
    el("p", { class: "hint code" }, `POST /${request.path}`),
    text(request.body),
    text(result),
  );
}
