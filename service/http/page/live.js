// The service's load, polled from its metrics every two seconds while the page is visible.

import { duration, svg } from "./dom.js";

const EVERY_MS = 2000;
const TIMEOUT_MS = 10_000;
const GATEWAY = new Set([502, 503, 504]);
// Number of samples shown (two minutes) and averaged over (one minute).
const SHOWN = 60;
const WINDOW = 30;
const JUDGING = new Set(["/score", "/compare", "/score/batch", "/compare/batch"]);

let samples = [];
let timer = null;
let tell = null;

// `listener.answered(startTime)` and `listener.lost()` hear of every poll: whether anything answers at this address.
export function setUp(listener) {
  tell = listener;
  document.addEventListener("visibilitychange", follow);
  follow();
}

function follow() {
  clearTimeout(timer);
  if (document.visibilityState === "visible") poll();
}

async function poll() {
  try {
    const answer = await fetch("metrics", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    const metrics = answer.ok ? parse(await answer.text()) : [];
    // A proxy that answers for a service that is gone.
    if (GATEWAY.has(answer.status)) tell.lost();
    else tell.answered(metrics.find((each) => each.name === "process_start_time_seconds")?.value ?? null);
    if (!answer.ok) blank();
    else {
      add(sample(metrics, performance.now() / 1000));
      draw();
    }
  } catch {
    blank();
    tell.lost();
  }
  clearTimeout(timer);
  if (document.visibilityState === "visible") timer = setTimeout(poll, EVERY_MS);
}

function blank() {
  samples = [];
  for (const name of ["queue", "batch", "rate", "latency"]) show(name, "no answer", []);
}

// Prometheus' text format as [{name, labels, value}].
export function parse(text) {
  const metrics = [];
  for (const line of text.split("\n")) {
    const match = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const pairs = [...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)];
    metrics.push({ name: match[1], labels: Object.fromEntries(pairs.map((pair) => [pair[1], pair[2]])), value: Number(match[3]) });
  }
  return metrics;
}

function sample(metrics, at) {
  const value = (name) => metrics.find((each) => each.name === name)?.value ?? 0;
  const buckets = new Map();
  for (const { name, labels, value: count } of metrics) {
    if (name !== "judge_request_seconds_bucket" || !JUDGING.has(labels.route)) continue;
    const limit = labels.le === "+Inf" ? Infinity : Number(labels.le);
    buckets.set(limit, (buckets.get(limit) ?? 0) + count);
  }
  return {
    at,
    queue: value("judge_queue_jobs"),
    tokens: value("judge_queue_tokens"),
    judged: value("judge_judgements_total"),
    batches: value("judge_batch_jobs_count"),
    jobs: value("judge_batch_jobs_sum"),
    buckets,
  };
}

function add(latest) {
  const before = samples.at(-1);
  // Start over after a restart of the service, which resets its counters, and after the tab was hidden.
  if (before && (latest.judged < before.judged || latest.batches < before.batches || latest.at - before.at > 10)) samples = [];
  samples = [...samples, latest].slice(-SHOWN);
}

function draw() {
  const latest = samples.at(-1);
  const first = samples.at(-1 - WINDOW) ?? samples[0];
  const batches = latest.batches - first.batches;
  const size = batches ? (latest.jobs - first.jobs) / batches : null;
  const seconds = latest.at - first.at;
  const rate = seconds ? (latest.judged - first.judged) / seconds : null;
  const times = [0.5, 0.95].map((q) => quantile(q, first.buckets, latest.buckets));
  const unit = latest.queue === 1 ? "job" : "jobs";
  show("queue", `${latest.queue.toLocaleString("en")} ${unit}`, samples.map((each) => each.queue));
  show("batch", size === null ? "idle" : `${size.toFixed(1)} jobs`, steps((a, b) => (b.jobs - a.jobs) / (b.batches - a.batches || 1)));
  show("rate", rate === null ? "–" : `${rate.toFixed(rate < 10 ? 1 : 0)} / s`, steps((a, b) => (b.judged - a.judged) / (b.at - a.at)));
  show("latency", times[0] === null ? "idle" : times.map(duration).join(" · "), steps((a, b) => quantile(0.5, a.buckets, b.buckets) ?? 0));
}

const steps = (measure) => samples.slice(1).map((each, index) => measure(samples[index], each));

// Like Prometheus' histogram_quantile: linear within a bucket; null if nothing was counted in between.
export function quantile(q, before, after) {
  const limits = [...after.keys()].sort((a, b) => a - b);
  const counts = limits.map((limit) => after.get(limit) - (before.get(limit) ?? 0));
  const rank = q * (counts.at(-1) ?? 0);
  if (!rank) return null;
  const index = counts.findIndex((count) => count >= rank);
  const low = index ? limits[index - 1] : 0;
  if (limits[index] === Infinity) return low;
  const below = index ? counts[index - 1] : 0;
  return low + ((limits[index] - low) * (rank - below)) / (counts[index] - below);
}

function show(name, text, values) {
  const meter = document.querySelector(`[data-meter=${name}]`);
  meter.querySelector("dd").textContent = text;
  meter.querySelector("svg")?.remove();
  meter.append(sparkline(values));
}

const WIDTH = 120;
const HEIGHT = 28;

function sparkline(values) {
  const top = Math.max(...values, Number.MIN_VALUE);
  const x = (index) => (WIDTH - 1 - ((values.length - 1 - index) * (WIDTH - 2)) / (SHOWN - 1)).toFixed(1);
  const y = (value) => (HEIGHT - 1.5 - (value / top) * (HEIGHT - 4)).toFixed(1);
  const points = values.map((value, index) => `${x(index)},${y(value)}`).join(" ");
  return svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 }),
    svg("polyline", { points }),
  );
}
