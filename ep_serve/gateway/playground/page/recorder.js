// Recording a clip with camera and microphone, or with the one of them that is there.

const LONGEST_SECONDS = 120;
const TYPES = ["video/webm;codecs=vp8,opus", "video/mp4", "audio/webm;codecs=opus", "audio/mp4"];

/** Why recording cannot work here; null if it can. */
export function whyNot() {
  if (!window.isSecureContext) return "Recording needs https, or a server on this machine.";
  if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) {
    return "This browser cannot record.";
  }
  return null;
}

/** A recording that runs. `finished` gives its file. */
export class Recording {
  #recorder;
  #limit;

  static async start() {
    return new Recording(await devices());
  }

  constructor(stream) {
    this.stream = stream;
    this.hasPicture = stream.getVideoTracks().length > 0;
    const kind = this.hasPicture ? "video" : "audio";
    const type = TYPES.find((it) => it.startsWith(kind) && MediaRecorder.isTypeSupported(it));
    this.#recorder = new MediaRecorder(stream, { mimeType: type });
    const pieces = [];
    this.#recorder.ondataavailable = (event) => pieces.push(event.data);
    this.finished = new Promise((resolve) => {
      this.#recorder.onstop = () => {
        for (const track of stream.getTracks()) track.stop();
        clearTimeout(this.#limit);
        const plain = this.#recorder.mimeType.split(";")[0];
        const name = `recording.${plain.split("/")[1]}`;
        resolve(new File(pieces, name, { type: plain }));
      };
    });
    this.#limit = setTimeout(() => this.stop(), LONGEST_SECONDS * 1_000);
    this.#recorder.start();
  }

  stop() {
    if (this.#recorder.state !== "inactive") this.#recorder.stop();
  }
}

async function devices() {
  const video = { width: 640, height: 480 };
  let error = null;
  for (const wanted of [{ video, audio: true }, { video }, { audio: true }]) {
    try {
      return await navigator.mediaDevices.getUserMedia(wanted);
    } catch (refusal) {
      error = refusal;
      if (error.name !== "NotFoundError") break; // another wish would only ask the user again
    }
  }
  throw new Error(reason(error));
}

function reason(error) {
  if (error.name === "NotFoundError") return "No camera and no microphone was found.";
  if (error.name === "NotAllowedError") return "The browser does not allow camera and microphone.";
  return `Camera and microphone cannot be used (${error.message || error.name}).`;
}
