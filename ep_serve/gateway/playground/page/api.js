// The API, as any client uses it. Addresses are relative to this file, so a prefix does not matter.
import { eventData } from "./sse.js";

const BASE = new URL("../v1/", import.meta.url);

/** A refusal, in the words of the API. */
export class ApiError extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? (status ? `The server answered with status ${status}.` : UNREACHABLE));
    this.status = status;
    this.code = error.code ?? null;
  }
}

const UNREACHABLE = "The server cannot be reached.";

export class Api {
  /** Kept in memory only. */
  key = "";

  /** Names of the models that the key may use. */
  async models() {
    const { data } = await (await this.#fetch("models")).json();
    return data.map((model) => model.id);
  }

  /**
   * Upload a file; its id. `XMLHttpRequest` because `fetch` tells nothing about progress.
   * @param {(share: number) => void} onProgress
   */
  upload(file, name, signal, onProgress) {
    const form = new FormData();
    form.set("purpose", "user_data");
    form.set("file", file, name);
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open("POST", new URL("files", BASE));
      for (const [header, value] of Object.entries(this.#headers())) {
        request.setRequestHeader(header, value);
      }
      request.responseType = "json";
      request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
      request.onload = () => {
        if (request.status === 200) resolve(request.response.id);
        else reject(new ApiError(request.status, request.response));
      };
      request.onerror = () => reject(new ApiError(0));
      request.onabort = () => reject(new DOMException("Stopped.", "AbortError"));
      signal.addEventListener("abort", () => request.abort());
      if (signal.aborted) request.onabort();
      else request.send(form);
    });
  }

  /** Delete an upload, even while the page is being closed. */
  forget(fileId) {
    this.#fetch(`files/${fileId}`, { method: "DELETE", keepalive: true }).catch(() => {});
  }

  /** The chunks of a streamed answer. */
  async *ask(request, signal) {
    const response = await this.#fetch("chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(200, chunk);
      yield chunk;
    }
    throw new ApiError(200, { error: { message: "The answer broke off." } });
  }

  async #fetch(path, options = {}) {
    const headers = { ...options.headers, ...this.#headers() };
    let response;
    try {
      response = await fetch(new URL(path, BASE), { ...options, headers, cache: "no-store" });
    } catch (error) {
      throw error.name === "AbortError" ? error : new ApiError(0);
    }
    if (response.ok) return response;
    throw new ApiError(response.status, await response.json().catch(() => null));
  }

  #headers() {
    return this.key ? { authorization: `Bearer ${this.key}` } : {};
  }
}
