// Runs before the page is drawn: otherwise it would flash in the wrong theme first.
"use strict";

const THEMES = ["auto", "light", "dark"];

function storedTheme() {
  try {
    const name = localStorage.getItem("judge.theme");
    return THEMES.includes(name) ? name : "auto";
  } catch {
    return "auto";
  }
}

function applyTheme(name) {
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  if (button) button.textContent = `Theme: ${name}`;
}

applyTheme(storedTheme());

document.addEventListener("DOMContentLoaded", () => {
  applyTheme(storedTheme());
  document.getElementById("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    try {
      localStorage.setItem("judge.theme", next);
    } catch {
      // Storage is off: the choice lasts only as long as the page.
    }
    applyTheme(next);
  });
});
