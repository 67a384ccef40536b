// Shows answers. Each show function returns its outcome in one sentence, to announce and to keep in the history.

import { copies } from "./copy.js";
import { bar, byId, el, plural, probability, signed } from "./dom.js";
import { isUndecided, massWarning, verdict, why } from "./verdict.js";

// What a response's score is called, by judge; in pairwise mode it is always the mean win probability.
const SCORE_OF = { "self-reward": "Score", "reward-model": "Sigmoid of the reward" };
// With more responses the matrix is set smaller.
const DENSE = 8;

let judge = "yes-no";
let answeredBy = null;

// Another model judges from now on: what is shown stays, and says whose it is.
export function setJudge(name, model, before) {
  judge = name;
  if (!before || before.fingerprint === model.fingerprint || !answeredBy || answeredBy.fingerprint === model.fingerprint) return;
  byId("stale")?.remove();
  const note = `This result is by ${answeredBy.model}. The service now runs ${model.id}: run again for its judgement.`;
  byId("results").prepend(el("p", { id: "stale", class: "note", role: "status" }, note));
}

const scoreName = (mode) => (mode === "pairwise" ? "Mean win probability" : (SCORE_OF[judge] ?? "P(Yes)"));

function put(...children) {
  byId("results").replaceChildren(...children.filter((child) => child !== null));
}

export function showScore(result, inputs, request) {
  const outcome = `${scoreName("pointwise")} ${probability(result.score)}`;
  answeredBy = result;
  put(
    el("h2", {}, outcome),
    judge === "yes-no" && isUndecided(result.log_odds) ? el("p", { class: "why" }, "Too close to call: Yes and No are about equally likely.") : null,
    warning([result.label_mass]),
    el("ol", { class: "ranking" }, card({ score: result, text: inputs.responses[0], number: 1 }, scoreName("pointwise"))),
    result.label_is_argmax === false ? el("p", { class: "note" }, "The model's most likely next token was none of the labels.") : null,
    provenance(result),
    copies(request, result),
  );
  return `${outcome}, log-odds ${signed(result.log_odds)}`;
}

export function showComparison(result, inputs, request) {
  const { sentence, kind, close } = verdict(result, inputs.tie_margin);
  const reason = why(kind);
  answeredBy = result;
  const cards = result.ranking.map((index, place) => {
    const tag = index === result.best && ["best", "ahead"].includes(kind) ? kind : kind === "close" && close.includes(index) ? "close" : null;
    return card({ score: result.scores[index], text: inputs.responses[index], number: index + 1, place: place + 1, tag }, scoreName(result.mode));
  });
  put(
    el("h2", {}, `${sentence}.`),
    reason ? el("p", { class: "why" }, reason) : null,
    warning(result.scores.map((score) => score.label_mass)),
    el("ol", { class: "ranking" }, ...cards),
    matrix(result),
    result.position_bias ? bias(result.position_bias) : null,
    provenance(result),
    copies(request, result),
  );
  showOverflow();
  return sentence;
}

function card({ score, text, number, place = null, tag = null }, label) {
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
    { class: tag === "best" ? "card best" : "card" },
    el(
      "h3",
      {},
      place && el("span", { class: "place" }, `${place}`),
      el("span", {}, `Response ${number}`),
      tag ? el("span", { class: tag === "best" ? "tag" : "tag warn" }, tag === "close" ? "too close" : tag) : null,
      score.floored ? el("span", { class: "tag warn" }, "floor used") : null,
      score.truncated ? el("span", { class: "tag warn" }, "truncated") : null,
    ),
    el("p", { class: "said" }, text),
    bar(typeof score.score === "number" ? score.score : 0),
    el("dl", {}, ...facts),
    score.panel ? el("p", { class: "hint members" }, `Log-odds by question: ${score.panel.map((each) => `${each.template} ${signed(each.log_odds)}`).join(", ")}`) : null,
  );
}

const fact = (name, value, kind = null) => el("div", { class: kind }, el("dt", {}, name), el("dd", {}, value));

function warning(masses) {
  // A reward model has no labels.
  const words = judge === "reward-model" ? null : massWarning(masses);
  return words && el("p", { class: "note" }, words);
}

function matrix(result) {
  const calibrated = result.calibrated_win_probability;
  const wins = calibrated ?? result.win_probability;
  const numbers = wins.map((_, index) => index + 1);
  const rows = wins.map((row, i) =>
    el("tr", {}, el("th", { scope: "row" }, `${i + 1}`), ...row.map((value, j) => cell(value, i === j))),
  );
  return el(
    "section",
    {},
    el("h3", { id: "matrix-title" }, calibrated ? "Win probability, calibrated" : "Win probability"),
    el("p", { class: "hint" }, "How likely the row's response is better than the column's.", el("span", { id: "more", hidden: true }, " Scroll sideways for all columns.")),
    el(
      "div",
      { id: "matrix", class: "scroll", tabindex: "0", role: "region", "aria-labelledby": "matrix-title" },
      el(
        "table",
        { class: numbers.length > DENSE ? "matrix dense" : "matrix" },
        el("thead", {}, el("tr", {}, el("td"), ...numbers.map((n) => el("th", { scope: "col" }, `${n}`)))),
        el("tbody", {}, ...rows),
      ),
    ),
  );
}

function showOverflow() {
  const box = byId("matrix");
  byId("more").hidden = box.scrollWidth <= box.clientWidth;
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
