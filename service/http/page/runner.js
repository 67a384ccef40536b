// One form's runs: its buttons, progress, announced status, and errors, which stand beside the button.

import { Failure, apiKey } from "./api.js";
import { duration, el } from "./dom.js";

export class Runner {
  #running = null;
  #results;
  #on = {};

  // `onFailure(failure)` is told of each error after it is shown; an error clears the results unless `keepsResults`.
  constructor(form, results, onFailure, { keepsResults = false } = {}) {
    for (const name of ["run", "cancel", "progress", "status", "trouble"]) this.#on[name] = form.querySelector(`.${name}`);
    this.#results = results;
    this.onFailure = onFailure;
    this.keepsResults = keepsResults;
    this.label = this.#on.run.textContent;
    this.#on.cancel.addEventListener("click", () => this.cancel());
  }

  // Announced to screen readers; `shown: false` for what the page already shows elsewhere, such as a result.
  say(text, { shown = true } = {}) {
    this.#on.status.textContent = text;
    this.#on.status.classList.toggle("away", !shown);
  }

  cancel() {
    this.#running?.abort();
  }

  // `work(signal)` shows the result and returns its outcome in a sentence. A run that is under way is replaced.
  async run(announced, work) {
    this.cancel();
    const mine = (this.#running = new AbortController());
    const isMine = () => this.#running === mine;
    const stopProgress = this.#showProgress();
    this.#on.trouble.replaceChildren();
    this.say(announced);
    try {
      const outcome = await work(mine.signal, isMine);
      if (isMine()) {
        this.say(`${outcome}.`, { shown: false });
        this.#comeIntoView();
      }
    } catch (error) {
      if (isMine()) this.#fail(error);
    } finally {
      stopProgress(isMine());
      if (isMine()) this.#running = null;
    }
  }

  #fail(error) {
    if (error.name === "AbortError") return this.say("Cancelled.");
    if (!(error instanceof Failure)) {
      this.say("This page failed to show the answer.");
      throw error;
    }
    const where = el("p", { class: "hint" }, `The reason is below the button ${this.label}.`);
    if (!this.keepsResults) this.#results.replaceChildren(el("h2", {}, "Not judged"), where);
    this.#showFailure(error);
    return this.onFailure(error);
  }

  #showFailure(failure) {
    const facts = [failure.code, failure.status && `HTTP ${failure.status}`, failure.param && `field ${failure.param}`];
    const advice = failure.code === "unauthorized" && !apiKey() ? "Enter the service's key under API key, then run again." : failure.advice;
    this.#on.trouble.replaceChildren(
      el(
        "div",
        { class: "failure" },
        el("h3", {}, "Not judged"),
        el("p", { class: "message" }, failure.message),
        advice ? el("p", {}, advice) : null,
        el("p", { class: "hint code" }, facts.filter(Boolean).join(" · ")),
        failure.requestId ? el("p", { class: "hint code" }, `request ${failure.requestId}`) : null,
      ),
    );
    this.say(`Not judged: ${failure.code}. ${failure.message}`, { shown: false });
    this.#on.trouble.scrollIntoView({ block: "nearest" });
  }

  #showProgress() {
    const { run, cancel, progress } = this.#on;
    const started = performance.now();
    this.#results.setAttribute("aria-busy", "true");
    progress.hidden = cancel.hidden = false;
    run.textContent = `${this.label} again`;
    // Outside the announced text: screen readers must not read a running clock aloud.
    const tick = setInterval(() => {
      progress.dataset.time = duration((performance.now() - started) / 1000);
    }, 100);
    // If another run has started meanwhile, these indicators belong to it.
    return (last) => {
      clearInterval(tick);
      if (!last) return;
      this.#results.setAttribute("aria-busy", "false");
      progress.hidden = true;
      delete progress.dataset.time;
      if (document.activeElement === cancel) run.focus();
      cancel.hidden = true;
      run.textContent = this.label;
    };
  }

  // The result is below the form on a narrow screen, and above the view where the form is long.
  #comeIntoView() {
    const { top } = this.#results.getBoundingClientRect();
    if (top < 0 || top > innerHeight * 0.7) this.#results.scrollIntoView();
  }
}
