// What a result says in words, and when it says nothing: too close to call, decided by the order, hardly answered.

import { percent, plural } from "./dom.js";

// Smaller differences in log-odds are not called. Where the service has a calibration, calibrated log-odds count.
export const MARGIN = 0.1;
const LOW_MASS = 0.5;

const logit = (p) => Math.log(p) - Math.log1p(-p);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const listed = (numbers) => `${numbers.slice(0, -1).join(", ")} and ${numbers.at(-1)}`;

// How far response `i` is ahead of `j`, in log-odds.
function lead(result, i, j) {
  if (result.calibrated_win_probability) return logit(result.calibrated_win_probability[i][j]);
  const calibrated = logit(result.scores[i].calibrated) - logit(result.scores[j].calibrated);
  return isNumber(calibrated) ? calibrated : logit(result.win_probability[i][j]);
}

// {sentence, kind, close}: kind is "best", "ahead" (the order decides often), "close", "tie" or "none" (the order decides
// always); `close` are the responses between which nothing is called, as indices.
export function verdict(result, tieMargin) {
  const [first, second] = result.ranking;
  const { pairs, flips } = result.position_bias ?? { pairs: 0, flips: 0 };
  if (pairs && flips === pairs) {
    const what = pairs === 1 ? "the winner changes with the order" : `${flips} of ${pairs} pairs change their winner with the order`;
    return { sentence: `No verdict: ${what}`, kind: "none", close: [] };
  }
  if (result.tie) {
    const within = tieMargin ? `, within ${tieMargin} in log-odds` : "";
    return { sentence: `A tie between responses ${first + 1} and ${second + 1}${within}`, kind: "tie", close: [first, second] };
  }
  const close = result.ranking.filter((index) => index === first || lead(result, first, index) < MARGIN);
  if (close.length > 1) {
    const apart = close.length > 2 ? `within ${MARGIN} log-odds` : `${Math.abs(lead(result, first, close[1])).toFixed(2)} log-odds apart`;
    const sentence = `Too close to call between responses ${listed(close.map((index) => index + 1))}: ${apart}`;
    return { sentence, kind: "close", close };
  }
  if (pairs && 2 * flips >= pairs) {
    return { sentence: `Response ${first + 1} is ahead, but ${flips} of ${pairs} pairs change their winner with the order`, kind: "ahead", close };
  }
  return { sentence: `Response ${first + 1} is best`, kind: "best", close };
}

const WHY = {
  none: "The judge goes by the position here, not by the text. Try pointwise mode, or a larger judge.",
  close: `Gaps below ${MARGIN} log-odds, a win probability under 0.525, are not called.`,
  ahead: "Its lead is averaged over both orders, but the judge goes by the position too often to call it.",
};
export const why = (kind) => WHY[kind] ?? null;

// Whether Yes and No are about equally likely.
export const isUndecided = (logOdds) => isNumber(logOdds) && Math.abs(logOdds) < MARGIN;

// Low label mass in words; null if the model meant to answer.
export function massWarning(masses) {
  const low = masses.filter((mass) => isNumber(mass) && mass < LOW_MASS);
  if (!low.length) return null;
  const all = masses.length > 1 ? `in ${low.length} of ${plural(masses.length, "judgement")} ` : "";
  const least = percent(Math.min(...low));
  return `Low label mass: ${all}the model hardly meant to answer with a label, and gave all of them together ${least} of its probability${masses.length > 1 ? " at the least" : ""}. Trust this little; try another template or model.`;
}
