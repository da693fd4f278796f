// The page of `ep-serve inspect`: the playground's cards, fed with what the page itself holds.
import { Card } from "./card.js";
import { byId } from "./dom.js";
import { percent } from "./figures.js";

const data = JSON.parse(byId("data").textContent);

/** The clip as the cards need it: its frames and its sound, decoded when the page was made. */
class Recorded {
  name = data.name;
  #frames = new Map();

  /** The picture nearest to a time. */
  frame(seconds) {
    if (!data.times.length) return Promise.resolve(null);
    const far = data.times.map((time) => Math.abs(time - seconds));
    const place = far.indexOf(Math.min(...far));
    if (!this.#frames.has(place)) {
      const image = new Image();
      image.src = data.pictures[place];
      this.#frames.set(
        place,
        image.decode().then(() => image),
      );
    }
    return this.#frames.get(place);
  }

  /** The loudest sample of each audio token. */
  peaks() {
    return Promise.resolve(data.peaks.length ? Float32Array.from(data.peaks) : null);
  }
}

const clip = new Recorded();
let cards = [];

function show(ratio) {
  cards.forEach((card) => card.remove());
  cards = data.runs.filter((run) => run.ratio === ratio).map(newCard);
  byId("cards").replaceChildren(...cards.map((card) => card.element));
  byId("status").textContent = `${cards.length} answers at ${percent(ratio)}.`;
}

function newCard(run) {
  const card = new Card({
    ...run,
    clip,
    model: run.server,
    state: "done",
    error: null,
    firstTokenMs: null,
    totalMs: run.seconds * 1_000,
  });
  card.element.querySelector("button").remove(); // nothing is removed from a page that is a record
  card.complete(byId("heat").checked);
  for (const pair of card.element.querySelectorAll(".times > div")) {
    if (pair.querySelector("dd").textContent === "–") pair.remove(); // was not measured
  }
  return card;
}

function redraw() {
  for (const card of cards) card.redraw(byId("heat").checked);
}

byId("ratios").addEventListener("change", (event) => show(Number(event.target.value)));

byId("heat").addEventListener("change", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

byId("large").addEventListener("change", (event) => {
  byId("cards").classList.toggle("large", event.target.checked);
});

let width = 0;
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width === width) return;
  width = contentRect.width;
  requestAnimationFrame(redraw);
}).observe(byId("cards"));

// Browsers keep what was chosen when a page is loaded again.
show(Number(document.querySelector("input[name=ratio]:checked").value));
byId("cards").classList.toggle("large", byId("large").checked);
