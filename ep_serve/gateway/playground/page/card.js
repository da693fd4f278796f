// One answer: its text, its figures and what was kept of its clip.
import { make, table } from "./dom.js";
import { moment, percent } from "./figures.js";
import { drawStep } from "./overlay.js";
import { keptIn, mediaOf, scoreRange, stepTime } from "./selection.js";
import { figures, inNumbers, inWords, legend } from "./tables.js";
import { drawTimeline } from "./timeline.js";

/**
 * A question and what became of it.
 * @typedef {{number: number, clip: import("./clip.js").Clip, question: string, ratio: number,
 *   model: string, state: "running" | "done" | "stopped" | "failed", answer: string,
 *   usage: object | null, error: string | null, firstTokenMs: number | null,
 *   totalMs: number | null}} Run
 */

const STATES = {
  running: "Answering",
  done: "Done",
  stopped: "Stopped before its end, so there are no figures",
  failed: "Failed",
};

const PATCH_WORDS = "Kept patches are clear and outlined; dropped ones are dark and hatched.";
const HEAT_WORDS = "Brighter patches have higher scores; kept ones are outlined.";

export class Card {
  #drawings = [];
  #range = null; // of the scores, if the sieve gives some
  #shown = null; // the same while scores are shown
  #legend = null;
  #answer = make("p", { class: "answer" });
  #state = make("p", { class: "hint state" });
  #words = make("p", { class: "hint" });
  #details = make("div", { class: "details" });
  #visible;

  /** @param {Run} run */
  constructor(run, onRemove) {
    this.run = run;
    const title = make("h3", { id: `run-${run.number}-title` }, `${run.number}. ${run.question}`);
    const remove = make("button", { type: "button", class: "quiet", onclick: onRemove }, "Remove");
    remove.setAttribute("aria-label", `Remove answer ${run.number}`);
    this.element = make(
      "article",
      { class: "card", id: `run-${run.number}`, "aria-labelledby": title.id },
      make("div", { class: "row between top" }, title, remove),
      make(
        "p",
        { class: "hint" },
        `${run.clip.name} · keep ratio ${percent(run.ratio)} · ${run.model}`,
      ),
      this.#answer,
      this.#state,
      this.#details,
    );
    const appear = (entries) => {
      for (const entry of entries) if (entry.isIntersecting) this.#appear(entry.target);
    };
    this.#visible = new IntersectionObserver(appear, { rootMargin: "400px" });
    this.update();
  }

  /** Show the text so far and what became of the run. */
  update() {
    this.#answer.textContent = this.run.answer;
    this.#state.textContent = this.run.error ?? `${STATES[this.run.state]}.`;
    this.#state.hidden = this.run.state === "done";
    this.#state.classList.toggle("error", this.run.state === "failed");
  }

  /** Show figures and drawings, once the usage is there. */
  complete(showHeat) {
    const { run } = this;
    const media = mediaOf(run.usage?.reduction?.selection);
    this.#range = scoreRange(media);
    this.#details.replaceChildren(...figures(run));
    if (this.#range) this.#details.append((this.#legend = legend(this.#range)));
    for (const medium of media) this.#details.append(...this.#pictures(medium));
    this.redraw(showHeat);
  }

  /** Draw what is on screen again: another size, other colours, or scores instead of patches. */
  redraw(showHeat) {
    this.#shown = showHeat && this.#range ? this.#range : null;
    if (this.#legend) this.#legend.hidden = !this.#shown;
    this.#words.textContent = this.#shown ? HEAT_WORDS : PATCH_WORDS;
    for (const drawing of this.#drawings) if (drawing.seen) drawing.draw();
  }

  remove() {
    this.#visible.disconnect();
    this.element.remove();
  }

  #pictures(medium) {
    const parts = [];
    const { run } = this;
    if (medium.audio || medium.video?.secondsPerStep) {
      const canvas = make("canvas", {
        class: "timeline",
        role: "img",
        "aria-label": inWords(medium),
      });
      parts.push(make("h4", {}, "Kept over time"), make("div", { class: "lane" }, canvas));
      this.#add(canvas, async () => {
        const peaks = medium.audio ? await run.clip.peaks(medium.audio.secondsPerToken) : null;
        if (canvas.isConnected) drawTimeline(canvas, medium, peaks, this.#shown);
      });
    }
    if (medium.video) parts.push(...this.#film(medium.video));
    parts.push(inNumbers(medium));
    return parts;
  }

  #film(video) {
    const size = video.rows * video.columns;
    const still = video.secondsPerStep == null;
    const items = Array.from({ length: video.steps }, (_, step) => {
      // The caption says the same as the picture.
      const canvas = make("canvas", {
        "aria-hidden": "true",
        width: video.columns * 12,
        height: video.rows * 12,
      });
      const kept = keptIn(video, step * size, (step + 1) * size);
      const when = still ? "Picture" : moment(step * video.secondsPerStep);
      this.#add(canvas, async () => {
        const picture = await this.run.clip.frame(stepTime(video, step));
        if (canvas.isConnected) drawStep(canvas, picture, video, step, this.#shown);
      });
      return make(
        "li",
        {},
        canvas,
        make("span", { class: "caption" }, `${when}: ${kept} of ${size}`),
      );
    });
    const rhythm = still ? "" : `, every ${moment(video.secondsPerStep)}`;
    const title = `Patches: ${video.rows} × ${video.columns}${rhythm}`;
    return [
      make("h4", {}, title),
      this.#words,
      make(
        "div",
        {
          class: "film",
          role: "region",
          tabindex: "0",
          "aria-label": `Frames of answer ${this.run.number}`,
        },
        make("ol", { class: still ? "still" : "" }, ...items),
      ),
    ];
  }

  #add(canvas, draw) {
    this.#drawings.push({ canvas, draw, seen: false });
    this.#visible.observe(canvas);
  }

  #appear(canvas) {
    this.#visible.unobserve(canvas);
    const drawing = this.#drawings.find((it) => it.canvas === canvas);
    drawing.seen = true;
    drawing.draw();
  }
}
