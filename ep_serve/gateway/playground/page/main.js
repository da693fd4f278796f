// The page: what is chosen, asked and shown.
import { Api } from "./api.js";
import { Card } from "./card.js";
import { Clip } from "./clip.js";
import { byId, make } from "./dom.js";
import { percent } from "./figures.js";
import { Recording, whyNot } from "./recorder.js";
import { comparison } from "./tables.js";

const api = new Api();
const cards = [];
let clip = null;
let recording = null;
let running = null; // the run in progress, and what aborts it
let asked = 0;

const ratio = () => Number(byId("ratio").value) / 100;

// --- what the user is told -------------------------------------------------------------------

function tell(text) {
  byId("status").textContent = text;
}

function complain(message) {
  byId("error").textContent = message;
  byId("error").hidden = !message;
}

// --- the clip --------------------------------------------------------------------------------

function choose(next) {
  discardClip();
  clip = next;
  complain("");
  byId("preview").replaceChildren(clip.player());
  byId("clip-name").textContent = `${clip.name} (${(clip.file.size / 1e6).toFixed(2)} MB)`;
  byId("clip").hidden = false;
  tell(`${clip.name} is chosen.`);
}

function discardClip() {
  if (!clip) return;
  const old = clip;
  clip = null;
  forgetUpload(old);
  releaseIfUnused(old);
  byId("preview").replaceChildren();
  byId("clip").hidden = true;
}

/** Delete an upload that no question will come to any more. */
function forgetUpload(old) {
  if (!old.fileId || old === clip || old === running?.run.clip) return;
  api.forget(old.fileId);
  old.fileId = null;
}

function releaseIfUnused(old) {
  if (old !== clip && !cards.some((card) => card.run.clip === old)) old.release();
}

byId("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) choose(new Clip(file));
});

byId("remove-clip").addEventListener("click", () => {
  discardClip();
  byId("file").value = "";
  byId("file").focus();
  tell("The clip is removed.");
});

for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault(); // a browser would open the file instead of the page
    const over = name === "dragenter" || name === "dragover";
    byId("clip-box").classList.toggle("over", over);
    if (name !== "drop" || recording || !event.dataTransfer.files.length) return;
    byId("file").value = "";
    choose(new Clip(event.dataTransfer.files[0]));
  });
}

// --- recording -------------------------------------------------------------------------------

if (whyNot()) {
  byId("record").disabled = true;
  byId("record-hint").textContent = whyNot();
}

byId("record").addEventListener("click", async () => {
  if (recording) {
    recording.stop();
    return;
  }
  complain("");
  byId("record").disabled = true;
  try {
    recording = await Recording.start();
  } catch (error) {
    complain(error.message);
    return;
  } finally {
    byId("record").disabled = false;
    byId("record").focus();
  }
  const watch = make("video", {
    autoplay: true,
    playsinline: true,
    "aria-label": "What is recorded",
  });
  watch.muted = true; // or it would hear itself
  watch.srcObject = recording.stream;
  discardClip();
  byId("file").value = "";
  byId("preview").replaceChildren(...(recording.hasPicture ? [watch] : []));
  byId("clip-name").textContent = "Recording";
  byId("clip").hidden = false;
  byId("remove-clip").hidden = true;
  byId("file").disabled = true;
  byId("record").textContent = "Stop recording";
  tell("Recording.");
  const file = await recording.finished;
  recording = null;
  byId("remove-clip").hidden = false;
  byId("file").disabled = false;
  byId("record").textContent = "Record a clip";
  choose(new Clip(file));
});

// --- models and the key ----------------------------------------------------------------------

async function loadModels() {
  const select = byId("model");
  const before = select.value;
  try {
    const names = await api.models();
    select.replaceChildren(...names.map((name) => make("option", {}, name)));
    if (names.includes(before)) select.value = before;
    complain(names.length ? "" : "No model can be used right now.");
  } catch (error) {
    if (error.status === 401) byId("key-field").hidden = false;
    if (error.status === 401 && !api.key) tell("This server asks for an API key.");
    else complain(error.message);
  }
}

byId("key").addEventListener("change", (event) => {
  api.key = event.target.value.trim();
  loadModels();
});

// --- asking ----------------------------------------------------------------------------------

function setBusy(busy) {
  // Not `disabled`: the focus would be lost.
  byId("ask").setAttribute("aria-disabled", String(busy));
  byId("stop").setAttribute("aria-disabled", String(!busy));
}

async function ask() {
  if (running || recording) return;
  complain("");
  if (!clip) {
    complain("Choose or record a clip first.");
    byId("file").focus();
    return;
  }
  setBusy(true);
  byId("answer-live").textContent = "";
  const run = newRun();
  const abort = new AbortController();
  running = { run, abort };
  const card = new Card(run, () => removeCard(card));
  cards.unshift(card);
  byId("cards").prepend(card.element);
  card.element.scrollIntoView({ block: "nearest" });
  showRuns();
  try {
    await send(run, abort.signal);
    await receive(run, card, abort.signal);
    run.state = "done";
    card.complete(byId("heat").checked);
    tell(`Answered in ${(run.totalMs / 1_000).toFixed(1)} s.`);
  } catch (error) {
    fail(run, error);
  } finally {
    running = null;
    setBusy(false);
    byId("upload").hidden = true;
    forgetUpload(run.clip);
  }
  card.update();
  showRuns();
  byId("answer-live").textContent = run.answer ? `Answer: ${run.answer}` : "";
}

/** @returns {import("./card.js").Run} */
function newRun() {
  return {
    number: ++asked,
    clip,
    question: byId("question").value.trim(),
    ratio: ratio(),
    model: byId("model").value,
    state: "running",
    answer: "",
    usage: null,
    error: null,
    firstTokenMs: null,
    totalMs: null,
  };
}

function fail(run, error) {
  if (error.name === "AbortError") {
    run.state = "stopped";
    tell("Stopped.");
    return;
  }
  run.state = "failed";
  run.error = error.message;
  tell("");
  complain(error.message);
  if (error.status === 401) byId("key-field").hidden = false;
  // The server forgets uploads after a while; the next question sends the clip again.
  if (error.code === "file_not_found") run.clip.fileId = null;
}

async function send(run, signal) {
  if (!run.model) {
    await loadModels();
    run.model = byId("model").value;
  }
  if (run.clip.fileId) return;
  tell("Sending the clip.");
  const progress = byId("upload");
  progress.value = 0;
  progress.hidden = false;
  const { file, name } = run.clip;
  run.clip.fileId = await api.upload(file, name, signal, (share) => (progress.value = share));
  progress.hidden = true;
}

async function receive(run, card, signal) {
  tell("Waiting for the first token.");
  const content = [
    { type: "file", file: { file_id: run.clip.fileId } },
    { type: "text", text: run.question },
  ];
  const request = {
    model: run.model,
    messages: [{ role: "user", content }],
    keep_ratio: run.ratio,
    return_selection: true,
    max_completion_tokens: Number(byId("max-tokens").value),
    temperature: 0, // so that two answers differ by what was asked, not by chance
  };
  const started = performance.now();
  for await (const chunk of api.ask(request, signal)) {
    const text = chunk.choices?.[0]?.delta?.content;
    if (text) {
      if (run.firstTokenMs == null) {
        run.firstTokenMs = performance.now() - started;
        tell("Answering.");
      }
      run.answer += text;
      card.update();
    }
    run.usage = chunk.usage ?? run.usage;
  }
  run.totalMs = performance.now() - started;
}

byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});

byId("stop").addEventListener("click", () => running?.abort.abort());

byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
});

byId("ratio").addEventListener("input", showRatio);

function showRatio() {
  byId("ratio-value").textContent = percent(ratio());
  byId("ratio").setAttribute("aria-valuetext", percent(ratio()));
}

// --- answers ---------------------------------------------------------------------------------

function showRuns() {
  const runs = cards.map((card) => card.run);
  byId("empty").hidden = runs.length > 0;
  byId("runs-tools").hidden = runs.length === 0;
  byId("comparison").hidden = runs.length === 0;
  byId("comparison").replaceChildren(...(runs.length ? [comparison(runs)] : []));
}

function removeCard(card) {
  if (card.run.state === "running") running?.abort.abort();
  card.remove();
  cards.splice(cards.indexOf(card), 1);
  releaseIfUnused(card.run.clip);
  showRuns();
  byId("runs").focus();
}

byId("clear").addEventListener("click", () => [...cards].forEach(removeCard));

function redraw() {
  for (const card of cards) card.redraw(byId("heat").checked);
}

byId("large").addEventListener("change", (event) => {
  byId("cards").classList.toggle("large", event.target.checked);
});

byId("heat").addEventListener("change", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

let width = 0;
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width === width) return; // an answer that grows changes the height only
  width = contentRect.width;
  requestAnimationFrame(redraw);
}).observe(byId("cards"));

addEventListener("pagehide", (event) => {
  if (!event.persisted && clip?.fileId) api.forget(clip.fileId);
});

showRatio();
setBusy(false);
loadModels();
