// The form: adds and removes responses, offers templates by mode, and reads its inputs as a request body.

import { byId, el, plural } from "./dom.js";

export const MAX_RESPONSES = 16;

const DEFAULT = "category:general";
const INLINE = "inline";
const TEMPLATE_FIELDS = ["instruction", "layout", "yes", "no", "format"];
const SLOTS = { pointwise: "{prompt} and {response}", pairwise: "{prompt}, {response_a} and {response_b}" };

// What each judge can do. An unknown judge is offered everything, and the service refuses what it cannot do.
const MODES_OF = { pairwise: ["pairwise"], "self-reward": ["pointwise"], "reward-model": ["pointwise"] };
const CAN_EDIT = ["yes-no", "pairwise"];

let judge = "yes-no";
let templates = [];
let panels = [];
let categories = ["general"];
let shown = null;
let offeredMode = null;

const boxes = () => [...document.querySelectorAll("#responses textarea")];
const radios = () => [...document.querySelectorAll("input[name=mode]")];
// A single response is always pointwise, whatever mode was chosen before.
const mode = () => (boxes().length === 1 ? "pointwise" : radios().find((radio) => radio.checked).value);
// Not `===` mode(): the pointwise templates of a self-reward judge have modes of their own.
const fitsMode = (template) => (template.mode === "pairwise") === (mode() === "pairwise");
const lines = (id) => byId(id).value.split("\n").filter((line) => line !== "");

export function setUp() {
  byId("add").addEventListener("click", () => addResponse().focus());
  byId("modes").addEventListener("change", describe);
  byId("template").addEventListener("change", showTemplate);
  for (const id of TEMPLATE_FIELDS) byId(id).addEventListener("input", makeOwn);
  addResponse();
  addResponse();
  offerTemplates();
}

// Adapts the form to the service's judge and the templates that it lists.
export function setJudge(name, listed) {
  judge = name;
  ({ templates, categories, panels = [] } = listed);
  offerModes();
  for (const id of TEMPLATE_FIELDS) byId(id).disabled = !canEdit();
  byId("template").disabled = judge === "reward-model";
  offerTemplates();
  describe();
}

const canEdit = () => CAN_EDIT.includes(judge) || !(judge in MODES_OF);

function offerModes() {
  const allowed = MODES_OF[judge] ?? ["pointwise", "pairwise"];
  for (const radio of radios()) {
    radio.disabled = !allowed.includes(radio.value);
    if (radio.disabled) radio.checked = false;
  }
  if (!radios().some((radio) => radio.checked)) radios().find((radio) => !radio.disabled).checked = true;
}

function addResponse(text = "") {
  const box = el("textarea", { rows: 2 });
  box.value = text;
  const remove = el("button", { type: "button", class: "link", click: () => removeResponse(box) }, "Remove");
  byId("responses").append(el("div", { class: "field response" }, el("label"), box, remove));
  describe();
  return box;
}

function removeResponse(box) {
  const index = boxes().indexOf(box);
  box.closest(".field").remove();
  describe();
  boxes()[Math.min(index, boxes().length - 1)].focus();
}

function describe() {
  const all = boxes();
  all.forEach((box, index) => {
    const field = box.closest(".field");
    box.id = `response-${index + 1}`;
    field.querySelector("label").htmlFor = box.id;
    field.querySelector("label").textContent = `Response ${index + 1}`;
    field.querySelector("button").setAttribute("aria-label", `Remove response ${index + 1}`);
    field.querySelector("button").hidden = all.length === 1;
  });
  const n = all.length;
  // A named template fits one mode only; a category or an inline template survives a change of mode.
  const choice = byId("template").value;
  if (offeredMode !== mode()) offerTemplates(choice.startsWith("template:") ? DEFAULT : choice || DEFAULT);
  byId("add").disabled = n >= MAX_RESPONSES;
  byId("count").textContent = n >= MAX_RESPONSES ? `${MAX_RESPONSES} at most` : "";
  byId("modes").disabled = n === 1;
  const lone = judge === "pairwise" ? "This judge compares: give it two responses or more." : "A single response gets a score of its own.";
  const alone = n === 1 ? lone : `Each response by itself: ${plural(n, "judgement")}.`;
  const pairs = `Every pair side by side, in both orders: ${plural(n * (n - 1), "judgement")}.`;
  byId("mode-hint").textContent = mode() === "pairwise" ? pairs : alone;
}

function option(value, text) {
  const made = el("option", {}, text);
  made.value = value;
  return made;
}

function offerTemplates(wanted = byId("template").value || DEFAULT) {
  const select = byId("template");
  offeredMode = mode();
  const [named, ofPanels] = [templates, panels].map((all) => all.filter(fitsMode).map((each) => `${each.name}@${each.version}`));
  select.replaceChildren(
    el("optgroup", { label: "Categories" }, ...categories.map((name) => option(`category:${name}`, name))),
    el("optgroup", { label: "Templates" }, ...named.map((name) => option(`template:${name}`, name))),
    el("optgroup", { label: "Panels" }, ...ofPanels.map((name) => option(`template:${name}`, name))),
    el("optgroup", { label: "Your own" }, ...(canEdit() ? [option(INLINE, "sent with the request")] : [])),
  );
  select.querySelectorAll("optgroup").forEach((group) => group.children.length || group.remove());
  select.value = wanted;
  // A link may name a template that this page does not know (yet): let the service decide.
  if (select.selectedIndex < 0) select.append(option(wanted, wanted.slice(wanted.indexOf(":") + 1)));
  select.value = wanted;
  showTemplate();
}

// The template behind a choice, if GET /templates lists it: a category's template has its name, or is the only one.
function find(choice) {
  const [kind, name] = [choice.slice(0, choice.indexOf(":")), choice.slice(choice.indexOf(":") + 1)];
  const candidates = templates.filter(fitsMode).sort((a, b) => b.version - a.version);
  if (kind === "template") return candidates.find((each) => each.name === name || `${each.name}@${each.version}` === name);
  if (judge === "self-reward") return candidates[0];
  return candidates.find((each) => each.name === name || each.name === `pairwise-${name}`);
}

function showTemplate() {
  const choice = byId("template").value;
  if (choice === INLINE) return hintTemplate();
  shown = find(choice);
  putTemplate(shown ?? { instruction: "", layout: "", format: "chat", labels: null });
  return hintTemplate();
}

function putTemplate({ instruction, layout, format, labels }) {
  byId("instruction").value = instruction;
  byId("layout").value = layout;
  byId("yes").value = labels?.yes.join("\n") ?? "";
  byId("no").value = labels?.no.join("\n") ?? "";
  byId("format").value = format;
}

function makeOwn() {
  byId("template").value = INLINE;
  hintTemplate();
}

function hintTemplate() {
  const name = shown && `${shown.name}@${shown.version}`;
  const own = byId("template").value === INLINE;
  const panel = panels.find((each) => byId("template").value === `template:${each.name}@${each.version}`);
  const slots = `The layout must contain ${SLOTS[mode()]} once each, and may contain {instruction}.`;
  if (!canEdit()) byId("template-hint").textContent = `The judge ${judge} accepts no template in a request${name ? `; this is ${name}` : ""}.`;
  else if (own) byId("template-hint").textContent = `A template of your own, sent with the request. ${slots}`;
  else if (panel) byId("template-hint").textContent = `A panel: ${panel.members.join(", ")} are each asked, and their log-odds averaged.`;
  else if (name) byId("template-hint").textContent = `This is ${name}. Editing it makes a template of your own, on this page only.`;
  else byId("template-hint").textContent = "The service knows this template's text; this page does not.";
}

export function read() {
  const choice = byId("template").value;
  const inputs = {
    prompt: byId("prompt").value,
    responses: boxes().map((box) => box.value),
    mode: mode(),
    truncation: byId("truncation").value,
    tie_margin: Number(byId("tie-margin").value) || 0,
  };
  if (choice === INLINE) {
    const labels = { yes: lines("yes"), no: lines("no") };
    const [format, layout, instruction] = ["format", "layout", "instruction"].map((id) => byId(id).value);
    inputs.template = { format, layout, instruction, labels };
  } else if (judge !== "reward-model") {
    const [kind, name] = [choice.slice(0, choice.indexOf(":")), choice.slice(choice.indexOf(":") + 1)];
    inputs[kind] = name;
  }
  return inputs;
}

// Fills the fields and runs nothing. `inputs` must have passed saved.clean.
export function fill(inputs) {
  byId("prompt").value = inputs.prompt;
  byId("responses").replaceChildren();
  inputs.responses.forEach((text) => addResponse(text));
  radios().find((radio) => radio.value === inputs.mode).checked = true;
  offerModes();
  byId("truncation").value = inputs.truncation;
  byId("tie-margin").value = inputs.tie_margin;
  byId("options").open = inputs.truncation !== "error" || inputs.tie_margin !== 0;
  const own = typeof inputs.template === "object";
  const choice = own ? INLINE : inputs.template ? `template:${inputs.template}` : `category:${inputs.category ?? "general"}`;
  offerTemplates(choice);
  if (own) putTemplate(inputs.template);
  // Open it: nobody should overlook a template that somebody else wrote.
  byId("template-box").open = own;
  describe();
}

// Marks and focuses the first invalid field and returns what is wrong with it; null if all are valid.
export function complaint() {
  const fields = [byId("prompt"), ...boxes(), byId("tie-margin")];
  fields.forEach((field) => field.removeAttribute("aria-invalid"));
  const wrong = fields.find((field) => (field.id === "tie-margin" ? !field.checkValidity() : field.value === ""));
  if (!wrong) return null;
  wrong.setAttribute("aria-invalid", "true");
  if (wrong.id === "tie-margin") byId("options").open = true;
  wrong.focus();
  if (wrong.id === "tie-margin") return "The tie margin must be a number from 0 to 1000.";
  return wrong.id === "prompt" ? "Write a prompt first." : `Response ${wrong.id.slice(9)} is empty: fill it in or remove it.`;
}
