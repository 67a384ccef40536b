// The tab that scores a file: a small JSONL, read and sent from this browser through POST /score/batch.

import { Failure, ask } from "./api.js";
import { byId, el, plural, probability, signed } from "./dom.js";
import { MAX_BYTES, parse, toCsv, toJsonl } from "./rows.js";
import { Runner } from "./runner.js";
import { MARGIN, massWarning } from "./verdict.js";

const PART = 32;
const SHOWN = 200;
const TRIES = 6;
const BUSY = ["overloaded", "rate_limited", "queue_unavailable", "not_ready", "deadline_exceeded"];

let runner = null;
// {name, rows, items}: items are the responses, one request each, with `result` or `error` once they are answered.
let file = null;

export function setUp(onFailure) {
  runner = new Runner(byId("upload"), byId("scored"), onFailure, { keepsResults: true });
  byId("upload").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("file").addEventListener("change", () => open(byId("file").files[0]));
  byId("file-category").addEventListener("change", forget);
  byId("file-truncation").addEventListener("change", forget);
  byId("download-jsonl").addEventListener("click", () => save("jsonl", "application/jsonl", toJsonl(file)));
  byId("download-csv").addEventListener("click", () => save("csv", "text/csv", toCsv(file)));
}

export const cancel = () => runner.cancel();

// Offers the service's categories; a reward model has none.
export function setJudge(judge, { categories }) {
  const select = byId("file-category");
  const before = select.value || "general";
  select.replaceChildren(...categories.map((name) => el("option", {}, name)));
  select.value = categories.includes(before) ? before : categories[0];
  select.disabled = judge === "reward-model";
}

async function open(chosen) {
  runner.cancel();
  file = null;
  show();
  if (!chosen) return;
  if (chosen.size > MAX_BYTES) {
    runner.say(`This file is over ${MAX_BYTES / 1e6} MB, the most that this page takes. For larger ones use the client: Judge.score_many.`);
    return;
  }
  const { rows, problem } = parse(await chosen.text());
  if (problem) {
    runner.say(problem);
    return;
  }
  file = { name: chosen.name, rows, items: rows.flatMap((row) => row.items) };
  const broken = rows.filter((row) => row.problem).length;
  const unusable = broken ? `, ${broken} of them unusable` : "";
  runner.say(`${chosen.name}: ${plural(rows.length, "row")}${unusable}, ${plural(file.items.length, "response")} to score.`);
  show();
}

// The settings have changed: what was scored with others no longer counts.
function forget() {
  file?.items.forEach((item) => {
    delete item.result;
    delete item.error;
  });
  show();
}

export function run() {
  if (!file) return runner.say("Choose a file first.");
  const pending = file.items.filter((item) => !item.result);
  if (!pending.length) return runner.say("Every response is scored already: choose another file or category.");
  return runner.run(`Scoring ${plural(pending.length, "response")}…`, async (signal) => {
    try {
      await scoreAll(pending, signal);
    } finally {
      byId("file-progress").hidden = true;
      if (pending.some((item) => item.result)) show();
    }
    return show();
  });
}

async function scoreAll(pending, signal) {
  const bar = byId("file-progress");
  bar.max = file.items.length;
  for (let start = 0; start < pending.length; start += PART) {
    const part = pending.slice(start, start + PART);
    bar.hidden = false;
    bar.value = file.items.length - pending.length + start;
    const { results } = await patiently({ items: part.map(requestOf) }, signal);
    for (const { index, result, error } of results) Object.assign(part[index], { result, error });
    const done = Math.min(start + PART, pending.length);
    runner.say(`${done.toLocaleString("en")} of ${plural(pending.length, "response")} scored…`);
  }
}

function requestOf({ row, response }) {
  const { prompt, category, template } = row.fields;
  const body = { prompt, response, truncation: byId("file-truncation").value };
  if (template) body.template = template;
  else if (!byId("file-category").disabled) body.category = category ?? byId("file-category").value;
  return body;
}

// A busy service is asked again; a cancelled wait ends at once.
async function patiently(body, signal) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await ask("score/batch", body, signal);
    } catch (error) {
      if (!(error instanceof Failure) || !BUSY.includes(error.code) || attempt === TRIES) throw error;
      const seconds = Number(error.retryAfter) || attempt;
      runner.say(`The service is busy: asking again in ${seconds} s…`);
      await pause(seconds * 1000, signal);
    }
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

// Draws what is known so far and returns it in a sentence.
function show() {
  const answered = file?.items.filter((item) => item.result || item.error) ?? [];
  byId("downloads").hidden = !answered.length;
  if (!file) {
    byId("scored").replaceChildren(byId("file-empty").content.cloneNode(true));
    return "";
  }
  const scored = answered.filter((item) => item.result);
  const failed = answered.length - scored.length + file.rows.filter((row) => row.problem).length;
  const mean = scored.reduce((sum, item) => sum + item.result.score, 0) / scored.length;
  const parts = [`${scored.length.toLocaleString("en")} of ${plural(file.items.length, "response")} scored`];
  if (scored.length) parts.push(`mean score ${probability(mean)}`);
  if (failed) parts.push(`${plural(failed, "error")}`);
  const sentence = parts.join(", ");
  const lines = file.rows.flatMap((row) => (row.problem ? [{ row }] : row.items));
  const warning = massWarning(scored.map((item) => item.result.label_mass));
  const more = lines.length > SHOWN ? `The first ${SHOWN} of ${lines.length.toLocaleString("en")} lines; the downloads have all. ` : "";
  byId("scored").replaceChildren(
    ...[
      el("h2", {}, `${sentence}.`),
      warning && el("p", { class: "note" }, warning),
      table(lines.slice(0, SHOWN)),
      el("p", { class: "hint" }, `${more}Of several responses to a prompt the best is marked, unless it leads by less than ${MARGIN} log-odds.`),
    ].filter(Boolean),
  );
  return sentence;
}

function table(lines) {
  const heads = ["Line", "Prompt and response", "Score", "Log-odds", "Label mass"].map((name) => el("th", { scope: "col" }, name));
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Scores" },
    el("table", { class: "scores" }, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...lines.map(tableRow))),
  );
}

function tableRow({ row, response, result, error }) {
  const problem = row.problem ?? error?.message;
  const prompt = row.fields && (typeof row.fields.prompt === "string" ? row.fields.prompt : row.fields.prompt.at(-1).content);
  const texts = el("td", { class: "texts" }, prompt ? el("span", { class: "said hint" }, prompt) : null, response ? el("span", { class: "said" }, response) : null);
  if (result && bestOf(row)?.result === result) texts.append(el("span", { class: "tag" }, `best of ${row.items.length}`));
  const head = el("th", { scope: "row" }, `${row.line}`);
  if (problem) {
    texts.append(el("span", { class: "problem" }, error ? `${error.code}: ${problem}` : problem));
    return el("tr", {}, head, texts, el("td"), el("td"), el("td"));
  }
  const numbers = result ? [probability(result.score), signed(result.log_odds), probability(result.label_mass)] : ["", "", ""];
  return el("tr", {}, head, texts, ...numbers.map((text) => el("td", {}, text)));
}

function bestOf(row) {
  if (row.items.length < 2 || !row.items.every((item) => item.result)) return null;
  const [first, second] = [...row.items].sort((a, b) => b.result.log_odds - a.result.log_odds);
  return first.result.log_odds - second.result.log_odds < MARGIN ? null : first;
}

function save(ending, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: `${file.name.replace(/\.[^.]*$/, "")}-scores.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
