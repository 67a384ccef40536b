// The rows of an uploaded file, checked one by one, and the files to download.

export const MAX_ROWS = 1000;
export const MAX_BYTES = 2_000_000;
const MAX_RESPONSES = 16;
const MAX_NAME = 128;
const ROLES = ["system", "user", "assistant"];

const isText = (value) => typeof value === "string" && value.trim() !== "";
const isPrompt = (value) =>
  isText(value) || (Array.isArray(value) && value.length > 0 && value.every((turn) => ROLES.includes(turn?.role) && isText(turn.content)));

// {rows} or {problem}. A row is {line, fields, items, problem}; one that cannot be used has a problem and no items.
export function parse(text) {
  const lines = text
    .replace(/^\ufeff/, "")
    .split(/\r?\n/)
    .map((content, index) => ({ content, line: index + 1 }))
    .filter(({ content }) => content.trim() !== "");
  if (!lines.length) return { problem: "This file has no lines." };
  if (lines.length > MAX_ROWS) return { problem: `This file has ${lines.length.toLocaleString("en")} rows; this page takes ${MAX_ROWS.toLocaleString("en")} at most. For more use the client: Judge.score_many.` };
  const rows = lines.map(({ content, line }) => readRow(content, line));
  if (rows.every((row) => row.problem)) return { problem: `No row can be used. Line ${rows[0].line}: ${rows[0].problem}.` };
  return { rows };
}

function readRow(content, line) {
  const row = { line, fields: null, items: [], problem: null };
  let fields = null;
  try {
    fields = JSON.parse(content);
  } catch {
    return { ...row, problem: "not JSON: each line must be a JSON object" };
  }
  row.problem = problemOf(fields);
  if (row.problem) return row;
  row.fields = fields;
  row.items = (fields.responses ?? [fields.response]).map((response) => ({ row, response }));
  return row;
}

function problemOf(fields) {
  if (fields === null || typeof fields !== "object" || Array.isArray(fields)) return "not a JSON object";
  if (!isPrompt(fields.prompt)) return "prompt must be a text, or a list of messages";
  if (fields.responses === undefined && !isText(fields.response)) return "response must be a text, or responses a list of texts";
  const responses = fields.responses ?? [fields.response];
  if (!Array.isArray(responses) || !responses.length || !responses.every(isText)) return "responses must be a list of texts";
  if (responses.length > MAX_RESPONSES) return `${responses.length} responses are over the limit of ${MAX_RESPONSES}`;
  const names = [fields.category, fields.template].filter((name) => name !== undefined && name !== null);
  if (!names.every((name) => isText(name) && name.length <= MAX_NAME)) return "category and template must be names";
  return null;
}

const answerOf = ({ response, result, error }) => ({ response, ...(result ? { result } : { error: error ?? { code: "not_scored" } }) });

// The rows as they were, each with `scores`: a result or an error for every response, in order.
export function toJsonl({ rows }) {
  const made = rows.map((row) => (row.problem ? { line: row.line, error: { code: "invalid_row", message: row.problem } } : { ...row.fields, scores: row.items.map(answerOf) }));
  return made.map((row) => `${JSON.stringify(row)}\n`).join("");
}

const COLUMNS = ["line", "number", "prompt", "response", "score", "log_odds", "label_mass", "calibrated", "template", "model", "error"];

// A line for every response. Texts that a spreadsheet would run as a formula get an apostrophe in front.
export function toCsv({ rows }) {
  const lines = rows.flatMap((row) => (row.problem ? [[row.line, "", "", "", "", "", "", "", "", "", row.problem]] : row.items.map((item, index) => csvLine(row, item, index))));
  return [COLUMNS, ...lines].map((cells) => cells.map(cell).join(",")).join("\r\n") + "\r\n";
}

function csvLine({ line, fields }, { response, result, error }, index) {
  const prompt = typeof fields.prompt === "string" ? fields.prompt : JSON.stringify(fields.prompt);
  const { score, log_odds: logOdds, label_mass: mass, calibrated, template, model } = result ?? {};
  return [line, index + 1, prompt, response, score, logOdds, mass, calibrated, template, model, result ? "" : (error?.code ?? "not_scored")];
}

function cell(value) {
  if (value === undefined || value === null) return "";
  if (typeof value === "number") return String(value);
  const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
