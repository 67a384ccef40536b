// A request and its answer to copy: as JSON, as a curl command, and as Python. A key is named, never copied.

import { apiKey } from "./api.js";
import { el } from "./dom.js";

const COPIED_MS = 2000;
const KEY = "JUDGE_API_KEY";
const CLIENT_METHODS = ["score", "compare"];

const address = (path = "") => new URL(path, location.href.split("#")[0]).href;
const json = (value) => JSON.stringify(value, null, 2);

function asCurl({ path, body }) {
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const lines = [`curl -sS '${address(path)}'`, "-H 'content-type: application/json'"];
  if (apiKey()) lines.push(`-H "authorization: Bearer $${KEY}"`);
  return [...lines, `-d '${quoted}'`].join(" \\\n  ");
}

function asPython({ path, body }) {
  const key = apiKey() ? "import os\n\n" : "";
  if (!CLIENT_METHODS.includes(path)) {
    const headers = apiKey() ? `, headers={"authorization": f"Bearer {os.environ['${KEY}']}"}` : "";
    return `${key}import httpx\n\nbody = ${literal(body)}\nanswer = httpx.post("${address(path)}", json=body, timeout=60${headers})\nprint(answer.raise_for_status().json())\n`;
  }
  const own = apiKey() ? `, api_key=os.environ["${KEY}"]` : "";
  const fields = Object.entries(body).map(([name, value]) => `        ${name}=${literal(value, 2)},\n`);
  return `${key}from client import Judge\n\nwith Judge("${address()}"${own}) as judge:\n    result = judge.${path}(\n${fields.join("")}    )\nprint(result)\n`;
}

// A JSON value as a Python literal; JSON's strings are Python's too.
function literal(value, depth = 0) {
  const inner = "    ".repeat(depth + 1);
  const block = (open, lines, close) => (lines.length ? `${open}\n${lines.map((line) => `${inner}${line},\n`).join("")}${"    ".repeat(depth)}${close}` : open + close);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return block("[", value.map((each) => literal(each, depth + 1)), "]");
  if (typeof value === "object") return block("{", Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each, depth + 1)}`), "}");
  return JSON.stringify(value);
}

// The line of buttons, and request and answer folded below it.
export function copies(request, result) {
  const done = el("span", { class: "hint", role: "status" });
  const shown = el("div");
  const button = (name, text) => el("button", { type: "button", class: "link", click: () => copy(name, text(), done, shown) }, name);
  return el(
    "section",
    { class: "copies", "aria-label": "Copy" },
    el(
      "p",
      { class: "buttons" },
      el("span", { class: "hint" }, "Copy as"),
      button("curl", () => asCurl(request)),
      button("Python", () => asPython(request)),
      button("JSON request", () => json(request.body)),
      button("JSON answer", () => json(result)),
      done,
    ),
    shown,
    el(
      "details",
      {},
      el("summary", {}, "Request and answer as JSON"),
      el("p", { class: "hint code" }, `POST /${request.path}`),
      el("pre", { tabindex: "0" }, json(request.body)),
      el("pre", { tabindex: "0" }, json(result)),
    ),
  );
}

async function copy(name, text, done, shown) {
  shown.replaceChildren();
  try {
    await navigator.clipboard.writeText(text);
    done.textContent = `${name} copied${apiKey() && name !== "JSON answer" && name !== "JSON request" ? `; set ${KEY} before you run it` : ""}`;
    setTimeout(() => (done.textContent = ""), apiKey() ? 3 * COPIED_MS : COPIED_MS);
  } catch {
    // Without permission, or on a page that is not from https or loopback: show it to be copied by hand.
    done.textContent = "The browser does not allow copying: select the text below.";
    shown.replaceChildren(el("pre", { tabindex: "0" }, text));
  }
}
