// Colours of scores: dark to bright, so that lightness alone tells the order.

const STOPS = [
  [22, 11, 57],
  [101, 21, 110],
  [188, 55, 84],
  [249, 142, 9],
  [252, 255, 164],
];

/** The colour of a value from 0 to 1. */
export function heat(value, alpha = 1) {
  const place = Math.min(Math.max(value, 0), 1) * (STOPS.length - 1);
  const below = Math.min(Math.floor(place), STOPS.length - 2);
  const mix = (channel) =>
    Math.round(
      STOPS[below][channel] + (place - below) * (STOPS[below + 1][channel] - STOPS[below][channel]),
    );
  return `rgb(${mix(0)} ${mix(1)} ${mix(2)} / ${alpha})`;
}
