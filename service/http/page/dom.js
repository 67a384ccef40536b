// Makes elements and formats numbers. Strings only ever become text nodes, never markup.

export const byId = (id) => document.getElementById(id);

// el("p", {class: "hint"}, "text", child, null): functions become listeners, null children are skipped.
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

// A probability with three digits; never shown as 0 or 1 unless it is.
export function probability(value) {
  if (!isNumber(value)) return "–";
  if (value > 0 && value < 0.0005) return "<0.001";
  if (value < 1 && value > 0.9995) return ">0.999";
  return value.toFixed(3);
}

// With a plus or a real minus sign: the sign is the verdict.
export function signed(value) {
  if (!isNumber(value)) return "–";
  const digits = Math.abs(value).toFixed(2);
  if (Number(digits) === 0) return "0.00";
  return (value < 0 ? "−" : "+") + digits;
}

// A share as a percentage; never shown as 0% or 100% unless it is.
export function percent(value) {
  if (value > 0 && value < 0.01) return "under 1%";
  if (value < 1 && value > 0.99) return "over 99%";
  return `${Math.round(100 * value)}%`;
}

// A bar that is filled to a share; the number beside it says the same to screen readers.
export function bar(share) {
  const made = el("div", { class: "bar", "aria-hidden": "true" }, el("div"));
  // Set through the DOM: the page's content policy forbids style attributes.
  made.firstChild.style.inlineSize = `${100 * share}%`;
  return made;
}

export function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  return seconds < 0.9995 ? `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
}

export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
