/** The server's API, as the page uses it. */

import { createParser } from "./vendor/eventsource-parser.js";

/** How often a question is sent again while the server's queue is full. */
const ATTEMPTS = 8;
/** Seconds between attempts where the server names none. */
const PAUSE = 2;

/** The most characters of a request, a little less than the server's limit of 32 MiB. */
const MOST_CHARACTERS = 31 * 2 ** 20;

/** An answer that did not come; its message is for the user. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} status The HTTP status; 0 where the server was not reached.
   */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Returns the address of a route of this server. */
export function address(route) {
  return new URL(route, document.baseURI).href;
}

const UNREACHED = "The server can't be reached. Does `vlm-tune serve` still run?";
const BROKEN = "The connection broke before the answer's end. Ask again.";
const PLAIN = {
  413: "The images of this chat are too large together: start a new chat, or send fewer.",
  429: "The server is busy, and stayed so. Ask again in a while.",
  500: "The server failed. Its log says why.",
  503: "The server is about to stop, and takes no more questions.",
  504: "The answer took longer than this server allows.",
};

/** Returns a response that is no answer as an error in plain words. */
async function failure(response) {
  const { status } = response;
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `${status} ${response.statusText}`;
  return new ServerError(PLAIN[status] ? `${PLAIN[status]} (${message})` : message, status);
}

/** Fetches a route; without a connection the error says so. */
async function reach(route, { key, ...options }) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    return await fetch(address(route), { headers, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(UNREACHED, 0);
  }
}

/** Waits some seconds, or until the user stops; `onWait` is told how many are left. */
async function pause(seconds, signal, onWait) {
  for (let left = Math.ceil(seconds); left > 0; left -= 1) {
    onWait(left);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    signal.throwIfAborted();
  }
}

/** Yields the events' data of a streamed response as objects, until its `[DONE]`. */
async function* chunks(response) {
  const events = [];
  const parser = createParser({ onEvent: (event) => events.push(event.data) });
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  for (;;) {
    const { done, value: bytes } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError(BROKEN, 0);
    });
    if (done) throw new ServerError(BROKEN, 0);
    parser.feed(decoder.decode(bytes, { stream: true }));
    for (const event of events.splice(0)) {
      if (event === "[DONE]") return;
      yield JSON.parse(event);
    }
  }
}

/** Returns choices with their probabilities, the likeliest first. */
function rankingOf(probabilities) {
  const pairs = Object.entries(probabilities).sort(([, one], [, other]) => other - one);
  return pairs.map(([text, probability]) => ({ text, probability }));
}

/** Reads a streamed answer; `onText` gets its text so far. */
async function streamed(response, onText) {
  const answer = { text: "", finish: "", tokens: undefined, ranking: undefined };
  for await (const chunk of chunks(response)) {
    if (chunk.error) throw new ServerError(chunk.error.message, response.status);
    answer.tokens = chunk.usage?.completion_tokens ?? answer.tokens;
    // The last chunk has the numbers of tokens, and no answer.
    const [choice] = chunk.choices;
    if (!choice) continue;
    answer.finish = choice.finish_reason ?? answer.finish;
    if (choice.probabilities) answer.ranking = rankingOf(choice.probabilities);
    if (!choice.delta.content) continue;
    answer.text += choice.delta.content;
    onText(answer.text);
  }
  return answer;
}

/**
 * Asks a question. While the server's queue is full it is asked again.
 *
 * @param {object} request A body of `/v1/chat/completions`.
 * @param {object} options
 * @param {string} options.key The API key, or "".
 * @param {AbortSignal} options.signal Stops it.
 * @param {(text: string) => void} options.onText Gets the answer's text so far.
 * @param {(seconds: number) => void} options.onWait Gets the seconds until the next attempt.
 * @returns {Promise<{text: string, finish: string, tokens?: number, ranking?: object[]}>}
 * @throws {ServerError} There is no answer.
 */
export async function ask(request, { key, signal, onText, onWait }) {
  const streaming = { stream: true, stream_options: { include_usage: true } };
  const body = JSON.stringify({ ...request, ...streaming });
  // A server that refuses a body need not read it, and then the browser may miss its answer.
  if (body.length > MOST_CHARACTERS) throw new ServerError(PLAIN[413], 413);
  for (let attempt = 1; ; attempt += 1) {
    const response = await reach("v1/chat/completions", { method: "POST", body, key, signal });
    if (response.ok) return streamed(response, onText);
    if (response.status !== 429 || attempt === ATTEMPTS) throw await failure(response);
    await pause(Number(response.headers.get("Retry-After")) || PAUSE, signal, onWait);
  }
}

/**
 * @typedef {object} Model A served model; an adapter is one too.
 * @property {string} id The name to ask it by.
 * @property {number} max_images The maximum number of images in a request.
 * @property {number} max_tokens The most tokens of an answer.
 */

/** @returns {Promise<Model[]>} The models that are served. */
export async function models({ key }) {
  const response = await reach("v1/models", { key });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data;
}
