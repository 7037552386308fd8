/** Chats, and their store in the browser's IndexedDB; the server keeps none. */

import { openDB } from "./vendor/idb.js";

/**
 * @typedef {object} Picture
 * @property {string} id
 * @property {string} name The file's name.
 * @property {Blob} blob What is sent.
 * @property {number} width In pixels, as sent.
 * @property {number} height
 * @property {{width: number, height: number} | null} from Its size before it was scaled down.
 */
/**
 * @typedef {object} Answer
 * @property {string} model
 * @property {string} text
 * @property {"waiting" | "streaming" | "done" | "stopped" | "failed"} state
 * @property {string} [note] Why it waits or failed, or where it was cut.
 * @property {number} [tokens] Of the answer.
 * @property {number} [seconds] From the question to the answer's end.
 * @property {{text: string, probability: number}[]} [ranking] The choices, the likeliest first.
 */
/**
 * @typedef {object} Turn
 * @property {string} question
 * @property {Picture[]} pictures
 * @property {string[]} choices Texts of which the likeliest is the answer.
 * @property {string} system
 * @property {Options} options
 * @property {boolean} alone Whether it is asked without the questions and answers before it.
 * @property {Answer[]} answers One, or two side by side.
 */
/** @typedef {Record<string, number>} Options Fields of a request: temperature, top_p, ... */
/** @typedef {{id: string, title: string, updated: number, turns: Turn[]}} Chat */

/** Returns an identifier. Pages that are opened by an address have no `crypto.randomUUID`. */
export function identifier() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @returns {Chat} A chat without a question. */
export function emptyChat() {
  return { id: identifier(), title: "", updated: Date.now(), turns: [] };
}

/** Returns a chat's title by its first question. */
export function titleOf(turn) {
  const words = turn.question.trim().replace(/\s+/g, " ");
  return words.slice(0, 80) || turn.pictures[0]?.name || "Untitled";
}

/**
 * Returns a chat as it is shown after a reload: an answer that was under way then has ended.
 *
 * @param {Chat} chat
 * @returns {Chat}
 */
function ended(chat) {
  const answers = (turn) =>
    turn.answers.map((answer) =>
      ["waiting", "streaming"].includes(answer.state)
        ? { ...answer, state: "stopped", note: "The page was closed before it had ended." }
        : answer,
    );
  return { ...chat, turns: chat.turns.map((turn) => ({ ...turn, answers: answers(turn) })) };
}

/** Returns chats in the order in which they are listed. */
export function newestFirst(chats) {
  return chats.toSorted((one, other) => other.updated - one.updated);
}

/** The chats of this browser. */
export class Chats {
  #database = openDB("vlm_tune", 1, {
    upgrade: (database) => database.createObjectStore("chats", { keyPath: "id" }),
  });

  /** @returns {Promise<Chat[]>} The chats, the newest first. */
  async all() {
    const chats = await (await this.#database).getAll("chats");
    return newestFirst(chats.map(ended));
  }

  /** @param {Chat} chat */
  async save(chat) {
    await (await this.#database).put("chats", chat);
  }

  /** @param {string} id */
  async remove(id) {
    await (await this.#database).delete("chats", id);
  }

  async clear() {
    await (await this.#database).clear("chats");
  }
}
