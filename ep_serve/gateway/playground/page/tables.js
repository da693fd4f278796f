// What is shown about answers in figures and words.
import { make, table } from "./dom.js";
import { count, keptOf, moment, percent, reductionOf, split, time } from "./figures.js";
import { heat } from "./heat.js";
import { duration, keptIn } from "./selection.js";

/** What an answer took: tokens of each kind, KV cache and time. */
export function figures(run) {
  const reduction = reductionOf(run.usage);
  if (!reduction) {
    const words = "The engine reports no reduction for this request.";
    return [make("p", { class: "hint" }, words), terms(times(run))];
  }
  const rows = [
    ...reduction.kinds.map((kind) => [capital(kind.name), kind.full, kind.kept]),
    ["Whole prompt", reduction.promptFull, reduction.promptKept],
  ].map(([name, full, kept]) => [name, count(full), count(kept), percent(kept / full)]);
  const saved = percent(reduction.saved / reduction.promptFull);
  return [
    table("Tokens before and after the reduction", ["Tokens", "Full", "Kept", "Share"], rows),
    terms([["KV cache saved", `${count(reduction.saved)} tokens (${saved})`], ...times(run)]),
    budget(reduction),
  ];
}

const capital = (word) => word[0].toUpperCase() + word.slice(1);

const times = (run) => [
  ["First token", time(run.firstTokenMs)],
  ["Total", time(run.totalMs)],
];

function terms(pairs) {
  const items = pairs.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value)),
  );
  return make("dl", { class: "times" }, ...items);
}

/** How the kept tokens are shared out, as one bar. */
function budget(reduction) {
  const bar = make("div", { class: "split", "aria-hidden": "true" });
  for (const kind of reduction.kinds) {
    const part = make("span", { class: `part ${kind.name}` });
    part.style.flexGrow = kind.kept;
    bar.append(part);
  }
  return make(
    "div",
    {},
    make("h4", {}, "Where the budget went"),
    bar,
    make(
      "p",
      { class: "key" },
      ...reduction.kinds.map((kind) =>
        make(
          "span",
          {},
          make("span", { class: `swatch ${kind.name}`, "aria-hidden": "true" }),
          `${percent(kind.kept / reduction.kept)} ${kind.name} (${count(kind.kept)})`,
        ),
      ),
    ),
  );
}

/** What the colours of scores mean. */
export function legend(range) {
  const canvas = make("canvas", { width: 160, height: 10, "aria-hidden": "true" });
  const pen = canvas.getContext("2d");
  for (let x = 0; x < 160; x++) {
    pen.fillStyle = heat(x / 159);
    pen.fillRect(x, 0, 1, 10);
  }
  return make(
    "p",
    { class: "legend hint", hidden: true },
    `Score ${range.low.toFixed(2)} `,
    canvas,
    ` ${range.high.toFixed(2)}`,
  );
}

/** How much was kept of a medium. */
export function inWords({ video, audio }) {
  const parts = [
    ["Video", video],
    ["Audio", audio],
  ].filter(([, tokens]) => tokens);
  return parts
    .map(([name, it]) => `${name}: ${it.keptCount} of ${it.count} tokens kept.`)
    .join(" ");
}

/** The drawings as a table: a row for each step, or for each second of sound. */
export function inNumbers(medium) {
  const { video, audio } = medium;
  const each = video ? video.secondsPerStep : 1;
  const steps = video ? video.steps : Math.ceil(duration(medium));
  const rows = Array.from({ length: steps }, (_, step) => {
    const row = [
      each == null ? "Picture" : `${moment(step * each)} – ${moment((step + 1) * each)}`,
    ];
    if (video) {
      const size = video.rows * video.columns;
      row.push(`${keptIn(video, step * size, (step + 1) * size)} of ${size}`);
    }
    if (audio) {
      const perStep = each / audio.secondsPerToken;
      const last = step === steps - 1;
      const [start, end] = [step, step + 1].map((it) =>
        Math.min(Math.round(it * perStep), audio.count),
      );
      const until = last ? audio.count : end;
      row.push(`${keptIn(audio, start, until)} of ${until - start}`);
    }
    return row;
  });
  const columns = ["Time", ...(video ? ["Video kept"] : []), ...(audio ? ["Audio kept"] : [])];
  return make(
    "details",
    {},
    make("summary", {}, "The same in numbers"),
    table("Kept tokens over time", columns, rows),
  );
}

/** The answers side by side, as one table. */
export function comparison(runs) {
  const columns = ["Answer", "Keep ratio", "Video kept", "Audio kept", "Image kept", "Budget"];
  columns.push("KV saved", "First token", "Total");
  const rows = runs.map((run) => {
    const reduction = reductionOf(run.usage);
    return [
      make("a", { href: `#run-${run.number}` }, `${run.number}. ${run.question}`),
      percent(run.ratio),
      ...["video", "audio", "image"].map((name) => keptOf(reduction, name)),
      split(reduction),
      reduction ? percent(reduction.saved / reduction.promptFull) : "–",
      time(run.firstTokenMs),
      time(run.totalMs),
    ];
  });
  return table("All answers", ...withoutEmpty(columns, rows));
}

/** Columns that say nothing about any answer only take room. */
function withoutEmpty(columns, rows) {
  const shown = columns.map((_, place) => rows.some((row) => row[place] !== "–"));
  const pick = (cells) => cells.filter((_, place) => shown[place]);
  return [pick(columns), rows.map(pick)];
}
