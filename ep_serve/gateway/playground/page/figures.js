// The figures of an answer, as numbers and as text.

export const KINDS = ["video", "audio", "image"];

const whole = new Intl.NumberFormat("en");

export const count = (number) => whole.format(number);

/** A share of one as per cent, with a decimal where it is small. */
export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  const value = share * 100;
  return `${value > 0 && value < 10 ? value.toFixed(1).replace(/\.0$/, "") : Math.round(value)} %`;
}

export function time(milliseconds) {
  if (milliseconds == null) return "–";
  return milliseconds < 1_000
    ? `${Math.round(milliseconds)} ms`
    : `${(milliseconds / 1_000).toFixed(2)} s`;
}

/** Seconds in a clip. */
export const moment = (seconds) => `${seconds.toFixed(1)} s`;

/**
 * What `usage` says; null where it says nothing about a reduction.
 * @returns {{kinds: {name: string, full: number, kept: number}[], full: number, kept: number,
 *   promptFull: number, promptKept: number, saved: number} | null}
 */
export function reductionOf(usage) {
  const given = usage?.reduction;
  if (!given) return null;
  const kinds = KINDS.map((name) => ({
    name,
    full: given[name]?.full ?? 0,
    kept: given[name]?.kept ?? 0,
  }));
  return {
    kinds: kinds.filter((kind) => kind.full > 0),
    full: given.av_tokens_full,
    kept: given.av_tokens_kept,
    promptFull: given.prompt_tokens_full,
    promptKept: given.prompt_tokens_reduced,
    saved: given.prompt_tokens_full - given.prompt_tokens_reduced,
  };
}

/** "251 of 1,728", or a dash for a kind that is not there. */
export function keptOf(reduction, name) {
  const kind = reduction?.kinds.find((it) => it.name === name);
  return kind ? `${count(kind.kept)} of ${count(kind.full)}` : "–";
}

/** "62 % video, 38 % audio": how the budget was spent. */
export function split(reduction) {
  if (!reduction?.kept) return "–";
  return reduction.kinds.map((it) => `${percent(it.kept / reduction.kept)} ${it.name}`).join(", ");
}
