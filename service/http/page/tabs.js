// The tabs: one panel is shown at a time, chosen by a click, the arrow keys, or the address (#decisions, #file).

import { byId } from "./dom.js";

const NAMES = ["judge", "decisions", "file"];

const tab = (name) => byId(`tab-${name}`);
export const current = () => NAMES.find((name) => tab(name).getAttribute("aria-selected") === "true");

export function show(name) {
  for (const each of NAMES) {
    tab(each).setAttribute("aria-selected", String(each === name));
    tab(each).tabIndex = each === name ? 0 : -1;
    byId(`panel-${each}`).hidden = each !== name;
  }
}

export function setUp() {
  for (const name of NAMES) tab(name).addEventListener("click", () => choose(name));
  byId("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = NAMES[(NAMES.indexOf(current()) + step + NAMES.length) % NAMES.length];
    choose(next);
    tab(next).focus();
  });
  followAddress();
}

// A link with inputs is about the first tab.
export function followAddress() {
  const named = location.hash.slice(1);
  if (NAMES.includes(named)) show(named);
  else if (location.hash.startsWith("#s=")) show("judge");
}

function choose(name) {
  show(name);
  history.replaceState(null, "", name === "judge" ? location.href.split("#")[0] : `#${name}`);
}
