// A clip along its time: how much of each step of the picture was kept, and the waveform with the
// kept audio tokens. What was kept is marked by height and ticks, not by colour alone.
import { colours, context2d } from "./dom.js";
import { percent } from "./figures.js";
import { heat } from "./heat.js";
import { duration, keptIn, relative } from "./selection.js";

const LABELS = 62;
const VIDEO = 44;
const WAVE = 56;
const TICKS = 12;
const HEAT = 10;
const GAP = 10;
const AXIS = 18;

/**
 * @param {HTMLCanvasElement} canvas
 * @param {import("./selection.js").Medium} medium
 * @param {Float32Array | null} peaks of the sound, one for each audio token
 * @param {{low: number, high: number} | null} range scores are shown as heat if it is given
 */
export function drawTimeline(canvas, medium, peaks, range) {
  const video = medium.video?.secondsPerStep ? medium.video : null;
  const { audio } = medium;
  const width = Math.max(200, canvas.parentElement.clientWidth);
  const below = (range ? HEAT : 0) + GAP;
  const height = (video ? VIDEO + below : 0) + (audio ? WAVE + TICKS + below : 0) + AXIS;
  canvas.style.height = `${height}px`;
  const pen = context2d(canvas, width, height);
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  const seconds = duration(medium);
  const lane = { pen, paint: colours(), range, left: LABELS, width: width - LABELS - 1, seconds };
  let top = 0;
  if (video) {
    drawSteps(lane, video, top);
    top += VIDEO + below;
  }
  if (audio) {
    drawSound(lane, audio, peaks, top);
    top += WAVE + TICKS + below;
  }
  drawAxis(lane, top - GAP / 2);
}

function drawSteps({ pen, paint, range, left, width, seconds }, video, top) {
  ground(pen, paint, "", left, top, width, VIDEO);
  pen.fillStyle = paint.muted;
  pen.fillText("Video", 0, top + VIDEO / 2 - 8);
  const size = video.rows * video.columns;
  const each = (video.secondsPerStep / seconds) * width;
  const bar = Math.max(1, each - (each > 4 ? 2 : 0));
  const shares = Array.from(
    { length: video.steps },
    (_, step) => keptIn(video, step * size, (step + 1) * size) / size,
  );
  // As tall as the lane where most was kept: five per cent of it could hardly be seen.
  const most = Math.max(...shares);
  pen.fillStyle = paint.muted;
  pen.fillText(`to ${percent(most)}`, 0, top + VIDEO / 2 + 8);
  for (let step = 0; step < video.steps; step++) {
    const [start, end] = [step * size, (step + 1) * size];
    const x = left + step * each;
    const tall = shares[step] && Math.max(2, (shares[step] / most) * VIDEO);
    pen.fillStyle = paint.video;
    pen.fillRect(x, top + VIDEO - tall, bar, tall);
    strip(pen, video, start, end, range, x, top + VIDEO, each);
  }
}

function drawSound({ pen, paint, range, left, width, seconds }, audio, peaks, top) {
  ground(pen, paint, "Audio", left, top, width, WAVE);
  ground(pen, paint, "kept", left, top + WAVE, width, TICKS);
  const perPixel = seconds / width / audio.secondsPerToken;
  const loudest = peaks?.reduce((most, peak) => Math.max(most, peak), 1e-4) ?? 1;
  for (let x = 0; x < width; x++) {
    const start = Math.floor(x * perPixel);
    const end = Math.min(Math.max(start + 1, Math.floor((x + 1) * perPixel)), audio.count);
    if (start >= end) break;
    const share = keptIn(audio, start, end) / (end - start);
    let peak = 0;
    for (let place = start; place < end; place++) peak = Math.max(peak, peaks?.[place] ?? 0);
    const tall = Math.max(1, (peak / loudest) * (WAVE - 6));
    pen.fillStyle = share >= 0.5 ? paint.audio : paint.faint;
    pen.fillRect(left + x, top + (WAVE - tall) / 2, 1, tall);
    pen.fillStyle = paint.audio;
    pen.fillRect(left + x, top + WAVE + TICKS * (1 - share), 1, TICKS * share);
    strip(pen, audio, start, end, range, left + x, top + WAVE + TICKS, 1);
  }
}

function ground(pen, paint, name, left, top, width, height) {
  pen.fillStyle = paint.muted;
  pen.fillText(name, 0, top + height / 2);
  pen.fillStyle = paint.lane;
  pen.fillRect(left, top, width, height);
}

/** The mean score of some tokens, below their lane. */
function strip(pen, tokens, start, end, range, x, y, width) {
  if (!range || !tokens.scores) return;
  let sum = 0;
  for (let place = start; place < end; place++) sum += relative(tokens.scores[place], range);
  pen.fillStyle = heat(sum / (end - start));
  pen.fillRect(x, y, width, HEAT);
}

function drawAxis({ pen, paint, left, width, seconds }, top) {
  const step =
    [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600].find((it) => seconds / it <= width / 55) ?? 1_200;
  pen.fillStyle = paint.muted;
  for (let time = 0; time <= seconds + 1e-6; time += step) {
    const x = left + (time / seconds) * width;
    pen.fillRect(Math.min(x, left + width - 1), top, 1, 4);
    const text = `${time} s`;
    const half = pen.measureText(text).width / 2;
    pen.fillText(text, Math.min(Math.max(x - half, left), left + width - 2 * half), top + 11);
  }
}
