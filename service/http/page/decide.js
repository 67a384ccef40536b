// The tab of typed decisions: several questions about one input, through POST /v1/decisions.

import { ask } from "./api.js";
import { copies } from "./copy.js";
import { bar, byId, el, plural, probability, signed } from "./dom.js";
import { Runner } from "./runner.js";
import { MARGIN, isUndecided, massWarning } from "./verdict.js";

const MAX_QUESTIONS = 20;
const KINDS = { predicate: "Yes or no", choice: "Choice", score: "Scale" };
const LIST_OF = { choice: ["choices", "Options, one a line"], score: ["levels", "Levels, one a line, the lowest first"] };
const EXAMPLE = {
  input: "I was charged twice for my order, and nobody has answered my e-mails for a week.",
  questions: [
    { type: "predicate", text: "Is the customer unhappy?", lines: "" },
    { type: "choice", text: "Which team should answer?", lines: "billing\ndelivery\ntechnical support" },
    { type: "score", text: "How urgent is it?", lines: "can wait\nthis week\ntoday\nnow" },
  ],
};

let runner = null;

const items = () => [...document.querySelectorAll("#questions .question")];
const part = (item, name) => item.querySelector(`[data-part=${name}]`);

export function setUp(onFailure) {
  runner = new Runner(byId("decide"), byId("decided"), onFailure);
  byId("decide").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("add-question").addEventListener("click", () => part(addQuestion(), "text").focus());
  byId("decide-example").addEventListener("click", () => {
    byId("input").value = EXAMPLE.input;
    byId("questions").replaceChildren();
    EXAMPLE.questions.forEach(addQuestion);
  });
  addQuestion();
}

export const cancel = () => runner.cancel();

function addQuestion({ type = "predicate", text = "", lines = "" } = {}) {
  const kinds = Object.entries(KINDS).map(([value, name]) => el("option", { value }, name));
  const item = el(
    "fieldset",
    { class: "question" },
    el("legend"),
    el("button", { type: "button", class: "link remove", click: () => removeQuestion(item) }, "Remove"),
    field("Kind", el("select", { "data-part": "type", change: () => describe() }, ...kinds)),
    field("Question", el("textarea", { rows: 1, "data-part": "text" })),
    field("", el("textarea", { rows: 3, "data-part": "lines" })),
  );
  part(item, "type").value = type;
  part(item, "text").value = text;
  part(item, "lines").value = lines;
  byId("questions").append(item);
  describe();
  return item;
}

const field = (name, control) => el("div", { class: "field" }, el("label", {}, name), control);

function removeQuestion(item) {
  const index = items().indexOf(item);
  item.remove();
  describe();
  part(items()[Math.min(index, items().length - 1)], "text").focus();
}

function describe() {
  items().forEach((item, index) => {
    const type = part(item, "type").value;
    item.querySelector("legend").textContent = `Question ${index + 1}`;
    const remove = item.querySelector("button");
    remove.setAttribute("aria-label", `Remove question ${index + 1}`);
    remove.hidden = items().length === 1;
    for (const name of ["type", "text", "lines"]) {
      const control = part(item, name);
      control.id = `question-${index + 1}-${name}`;
      control.previousElementSibling.htmlFor = control.id;
    }
    const lines = part(item, "lines");
    lines.closest(".field").hidden = !(type in LIST_OF);
    lines.previousElementSibling.textContent = LIST_OF[type]?.[1] ?? "";
  });
  byId("add-question").disabled = items().length >= MAX_QUESTIONS;
}

const linesOf = (item) => part(item, "lines").value.split("\n").map((line) => line.trim()).filter(Boolean);

function read() {
  const questions = items().map((item) => {
    const type = part(item, "type").value;
    const question = { type, instructions: part(item, "text").value };
    if (type === "choice") question.choices = linesOf(item).map((value) => ({ value }));
    if (type === "score") question.levels = linesOf(item).map((label) => ({ label }));
    return question;
  });
  return { input: byId("input").value, questions };
}

// Marks and focuses the first invalid field and returns what is wrong with it; null if all are valid.
function complaint() {
  const all = [byId("input"), ...items().flatMap((item) => [part(item, "text"), part(item, "lines")])];
  all.forEach((control) => control.removeAttribute("aria-invalid"));
  const wrong = (control, words) => {
    control.setAttribute("aria-invalid", "true");
    control.focus();
    return words;
  };
  if (!byId("input").value.trim()) return wrong(byId("input"), "Write an input first.");
  for (const [index, item] of items().entries()) {
    if (!part(item, "text").value.trim()) return wrong(part(item, "text"), `Question ${index + 1} is empty: write it or remove it.`);
    const lines = linesOf(item);
    if (part(item, "type").value === "predicate") continue;
    if (lines.length < 2) return wrong(part(item, "lines"), `Question ${index + 1} needs two lines or more to choose from.`);
    if (new Set(lines).size < lines.length) return wrong(part(item, "lines"), `Question ${index + 1} has a line twice.`);
  }
  return null;
}

export function run() {
  const problem = complaint();
  if (problem) return runner.say(problem);
  const body = read();
  return runner.run(`Asking ${plural(body.questions.length, "question")}…`, async (signal, isMine) => {
    const result = await ask("v1/decisions", body, signal);
    return isMine() ? show(result, body) : "";
  });
}

function show(result, body) {
  const answers = result.answers.map((answer, index) => answerCard(answer, body.questions[index], index));
  const { usage } = result;
  const cached = usage.input_tokens_details?.cached_tokens;
  const tokens = plural(usage.input_tokens, "token") + (cached ? `, ${cached.toLocaleString("en")} of them cached` : "");
  const warning = massWarning(result.answers.map((answer) => answer.x_label_mass));
  byId("decided").replaceChildren(
    ...[
      el("h2", {}, plural(answers.length, "answer")),
      warning && el("p", { class: "note" }, warning),
      el("ol", { class: "ranking" }, ...answers),
      el("p", { class: "hint provenance" }, [result.model, result.x_fingerprint?.slice(0, 12), tokens].filter(Boolean).join(" · ")),
      copies({ path: "v1/decisions", body }, result),
    ].filter(Boolean),
  );
  return result.answers.map((answer, index) => `Question ${index + 1}: ${headline(answer).text}`).join(". ");
}

// The answer in words, and whether it is too close to call.
function headline(answer) {
  if (answer.type === "predicate") {
    const close = isUndecided(answer.x_log_odds);
    return { text: close ? "too close to call" : answer.probability > 0.5 ? "yes" : "no", close };
  }
  const shares = answer.probabilities.map((each) => each.probability).sort((a, b) => b - a);
  const close = Math.log(shares[0]) - Math.log(shares[1]) < MARGIN;
  if (answer.type === "choice") return { text: close ? "too close to call" : String(answer.choice), close };
  const likeliest = answer.probabilities.reduce((best, each) => (each.probability > best.probability ? each : best));
  const mean = `${answer.score.toFixed(2)} of ${answer.probabilities.length - 1}`;
  return { text: `${mean}, ${close ? "likeliest level too close to call" : `likeliest ${likeliest.label}`}`, close };
}

function answerCard(answer, question, index) {
  const { text, close } = headline(answer);
  const rows =
    answer.type === "predicate"
      ? [["yes", answer.probability], ["no", 1 - answer.probability]]
      : answer.probabilities.map((each) => [answer.type === "score" ? `${each.value} ${each.label}` : String(each.value), each.probability]);
  const top = Math.max(...rows.map(([, share]) => share));
  const facts = [["Log-odds", signed(answer.x_log_odds)], ["Label mass", probability(answer.x_label_mass)]];
  if (answer.x_rotations > 1) facts.push(["Orders averaged", String(answer.x_rotations)]);
  return el(
    "li",
    { class: "card" },
    el("h3", {}, el("span", { class: "place" }, `${index + 1}`), el("span", {}, text)),
    el("p", { class: "said" }, question.instructions),
    el(
      "ul",
      { class: "shares" },
      ...rows.map(([name, share]) =>
        el("li", { class: share === top && !close ? "best" : "" }, el("span", { class: "name" }, name), bar(share), el("span", { class: "number" }, probability(share))),
      ),
    ),
    el("dl", {}, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
  );
}
