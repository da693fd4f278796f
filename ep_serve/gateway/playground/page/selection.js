// What `usage.reduction.selection` says, in the form that the drawings need.

/**
 * Tokens of one kind in one medium.
 * @typedef {{count: number, kept: Uint8Array, keptCount: number, scores: number[] | null}} Tokens
 * @typedef {Tokens & {steps: number, rows: number, columns: number,
 *   secondsPerStep: number | null}} Video
 * @typedef {Tokens & {secondsPerToken: number}} Audio
 * @typedef {{type: string, video: Video | null, audio: Audio | null}} Medium
 */

/**
 * The media of a request.
 * @returns {Medium[]}
 */
export function mediaOf(selection) {
  return (selection ?? []).map(({ type, video, audio }) => ({
    type,
    video: video ? videoTokens(video) : null,
    audio: audio
      ? { ...tokens(audio.tokens, audio), secondsPerToken: audio.seconds_per_token }
      : null,
  }));
}

function videoTokens(video) {
  const [steps, rows, columns] = video.grid;
  return {
    ...tokens(steps * rows * columns, video),
    steps,
    rows,
    columns,
    secondsPerStep: video.seconds_per_step,
  };
}

function tokens(count, { kept, scores }) {
  const flags = new Uint8Array(count);
  for (const place of kept) flags[place] = 1;
  return { count, kept: flags, keptCount: kept.length, scores };
}

/** How many of the tokens from `start` to `end` were kept. */
export function keptIn(tokens, start, end) {
  let sum = 0;
  for (let place = start; place < end; place++) sum += tokens.kept[place];
  return sum;
}

/** Seconds that a medium lasts, as far as its tokens tell. */
export function duration({ video, audio }) {
  const picture = video?.secondsPerStep ? video.steps * video.secondsPerStep : 0;
  return Math.max(picture, audio ? audio.count * audio.secondsPerToken : 0);
}

/** The lowest and the highest score of a request; null if its sieve gives none. */
export function scoreRange(media) {
  let low = Infinity;
  let high = -Infinity;
  for (const medium of media) {
    for (const tokens of [medium.video, medium.audio]) {
      for (const score of tokens?.scores ?? []) {
        low = Math.min(low, score);
        high = Math.max(high, score);
      }
    }
  }
  return low <= high ? { low, high } : null;
}

/** Where a score lies between the lowest and the highest one, 0 to 1. */
export function relative(score, { low, high }) {
  return high > low ? (score - low) / (high - low) : 0.5;
}

/** When the first of the two frames of a step was on screen. The engine spreads the sampled frames
 * evenly from the first frame of a video to its last one. */
export function stepTime(video, step) {
  const seconds = video.steps * (video.secondsPerStep ?? 0);
  return (2 * step * seconds) / Math.max(1, 2 * video.steps - 1);
}
