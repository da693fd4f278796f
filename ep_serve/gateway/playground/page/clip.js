// A clip in the browser: its frames and its sound, decoded here and never sent for the overlay.

const FRAME_WIDTH = 360;
const SEEK_MS = 10_000;
const SOUND_HZ = 8_000; // enough to draw; a minute takes 2 MB
const MAX_SOUND_BYTES = 256 * 2 ** 20; // the browser decodes a file's sound all at once

export class Clip {
  /** The id of the upload, once there is one. */
  fileId = null;
  #frames = new Map();
  #seeking = Promise.resolve();
  #video = null;
  #sound = null;

  constructor(file, name = file.name) {
    this.file = file;
    this.name = name;
    this.url = URL.createObjectURL(file);
    this.kind = file.type.split("/")[0] || "video";
  }

  /** An element that plays or shows the clip. */
  player() {
    const tag = { audio: "audio", image: "img" }[this.kind] ?? "video";
    const player = document.createElement(tag);
    player.src = this.url;
    if (tag === "img") player.alt = `The picture ${this.name}`;
    else player.controls = true;
    player.setAttribute("aria-label", `The clip ${this.name}`);
    return player;
  }

  /**
   * The picture at a time, as a small canvas; null if the browser cannot show it.
   * @param {number} seconds
   * @returns {Promise<HTMLCanvasElement | null>}
   */
  frame(seconds) {
    const name = seconds.toFixed(3);
    if (!this.#frames.has(name)) {
      // One after the other: a video element is at one place at a time.
      const frame = this.#seeking.then(() => this.#read(seconds)).catch(() => null);
      this.#seeking = frame;
      this.#frames.set(name, frame);
    }
    return this.#frames.get(name);
  }

  async #read(seconds) {
    if (this.kind === "image") {
      const image = new Image();
      image.src = this.url;
      await image.decode();
      return shrunk(image, image.naturalWidth, image.naturalHeight);
    }
    const video = await this.#seekable();
    if (Math.abs(video.currentTime - seconds) > 1e-3) {
      const arrived = happens(video, "seeked");
      video.currentTime = seconds;
      await arrived;
    }
    return shrunk(video, video.videoWidth, video.videoHeight);
  }

  async #seekable() {
    if (this.#video) return this.#video;
    const video = document.createElement("video");
    video.muted = true;
    video.preload = "auto";
    video.playsInline = true;
    const loaded = happens(video, "loadeddata");
    video.src = this.url;
    await loaded;
    this.#video = video;
    return video;
  }

  /**
   * The loudest sample of each stretch of sound; null if the browser cannot decode it.
   * @param {number} secondsEach
   * @returns {Promise<Float32Array | null>}
   */
  async peaks(secondsEach) {
    this.#sound ??= this.#decode().catch(() => null);
    const samples = await this.#sound;
    if (!samples) return null;
    const size = Math.round(secondsEach * SOUND_HZ);
    const peaks = new Float32Array(Math.ceil(samples.length / size));
    for (let index = 0; index < samples.length; index++) {
      const place = Math.floor(index / size);
      peaks[place] = Math.max(peaks[place], Math.abs(samples[index]));
    }
    return peaks;
  }

  async #decode() {
    if (this.file.size > MAX_SOUND_BYTES) return null;
    const bytes = await this.file.arrayBuffer();
    const sound = await new OfflineAudioContext(1, 1, SOUND_HZ).decodeAudioData(bytes);
    return sound.getChannelData(0);
  }

  /** Give back what the browser holds for it. */
  release() {
    this.#video?.removeAttribute("src");
    this.#frames.clear();
    URL.revokeObjectURL(this.url);
  }
}

function shrunk(source, width, height) {
  if (!width || !height) return null;
  const canvas = document.createElement("canvas");
  canvas.width = Math.min(width, FRAME_WIDTH);
  canvas.height = Math.max(1, Math.round((canvas.width * height) / width));
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function happens(target, name) {
  return new Promise((resolve, reject) => {
    const late = setTimeout(() => reject(new Error(`no ${name}`)), SEEK_MS);
    const settle = (finish) => () => {
      clearTimeout(late);
      finish();
    };
    target.addEventListener(name, settle(resolve), { once: true });
    target.addEventListener(
      "error",
      settle(() => reject(target.error)),
      { once: true },
    );
  });
}
