// One step of a video, or a picture, with its patches: kept ones clear and outlined, dropped ones
// dimmed and hatched, so that nothing depends on colour.
import { heat } from "./heat.js";
import { relative } from "./selection.js";

const WIDTH = 336;
const HATCH = 7;

/**
 * @param {HTMLCanvasElement} canvas
 * @param {CanvasImageSource | null} picture null draws the patches alone
 * @param {import("./selection.js").Video} video
 * @param {number} step
 * @param {{low: number, high: number} | null} range scores are shown as heat if it is given
 */
export function drawStep(canvas, picture, video, step, range) {
  const { rows, columns } = video;
  const cell = Math.max(3, Math.round(WIDTH / columns));
  const start = step * rows * columns;
  const isKept = (row, column) =>
    row >= 0 && row < rows && column >= 0 && column < columns
      ? video.kept[start + row * columns + column] === 1
      : false;
  canvas.width = columns * cell;
  canvas.height = rows * cell;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#8a8f98";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  // The processor stretches a frame to whole patches, and so does this.
  if (picture) pen.drawImage(picture, 0, 0, canvas.width, canvas.height);

  const dropped = new Path2D();
  const border = new Path2D();
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const [x, y] = [column * cell, row * cell];
      if (range && video.scores) {
        pen.fillStyle = heat(relative(video.scores[start + row * columns + column], range), 0.72);
        pen.fillRect(x, y, cell, cell);
      }
      if (!isKept(row, column)) {
        dropped.rect(x, y, cell, cell);
        continue;
      }
      if (!isKept(row - 1, column)) line(border, x, y, x + cell, y);
      if (!isKept(row + 1, column)) line(border, x, y + cell, x + cell, y + cell);
      if (!isKept(row, column - 1)) line(border, x, y, x, y + cell);
      if (!isKept(row, column + 1)) line(border, x + cell, y, x + cell, y + cell);
    }
  }
  if (!range) dim(pen, dropped, canvas);
  stroke(pen, border);
}

function dim(pen, area, { width, height }) {
  pen.fillStyle = "rgb(12 14 20 / 0.66)";
  pen.fill(area);
  pen.save();
  pen.clip(area);
  pen.beginPath();
  for (let x = -height; x < width; x += HATCH) {
    pen.moveTo(x, height);
    pen.lineTo(x + height, 0);
  }
  pen.strokeStyle = "rgb(255 255 255 / 0.16)";
  pen.lineWidth = 1;
  pen.stroke();
  pen.restore();
}

/** A light line inside a dark one can be seen on every picture. */
function stroke(pen, path) {
  pen.lineCap = "square";
  pen.strokeStyle = "rgb(0 0 0 / 0.85)";
  pen.lineWidth = 4;
  pen.stroke(path);
  pen.strokeStyle = "#ffffff";
  pen.lineWidth = 2;
  pen.stroke(path);
}

function line(path, x1, y1, x2, y2) {
  path.moveTo(x1, y1);
  path.lineTo(x2, y2);
}
