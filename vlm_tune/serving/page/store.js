/** The page's state, and everything that changes it. */

import { emptyChat, identifier, newestFirst, titleOf } from "./chats.js";
import { ask, models } from "./client.js";
import { dataUrl } from "./pictures.js";
import { preferences } from "./preferences.js";
import { answeredTurns, picturesOf, requestOf } from "./requests.js";

/**
 * @typedef {object} State
 * @property {import("./chats.js").Chat[]} chats The newest first.
 * @property {string} current The identifier of the chat that is shown; it may be a new one.
 * @property {import("./client.js").Model[]} models Those that are served.
 * @property {string} model The name of the one that is asked.
 * @property {string} other The one beside it; "" for none.
 * @property {string} system What the models read before the first question.
 * @property {import("./chats.js").Options} options Fields of every request.
 * @property {boolean} alone Whether questions are asked without those before them.
 * @property {string} theme "", "light" or "dark".
 * @property {object | null} draft A question to edit: its words, pictures and choices.
 * @property {object | null} dialog Which dialog is open, with what it shows.
 * @property {{text: string, action?: {label: string, run: () => void}} | null} notice
 * @property {ReadonlySet<string>} running The chats that wait for answers.
 */

/** Why an answer ends where it does, if it is not of itself. */
const CUT = { length: "Cut at the most tokens an answer may have." };

/** Keeps the state, tells those who subscribe of changes, and talks to the server. */
export class Store {
  #chats;
  #listeners = new Set();
  /** Stops what runs: a controller a chat. */
  #controllers = new Map();
  /** A promise of the key that the user is asked for, shared by requests that wait for it. */
  #keyPrompt = null;

  /** @param {import("./chats.js").Chats} chats */
  constructor(chats) {
    this.#chats = chats;
    this.empty = emptyChat();
    this.state = {
      chats: [],
      current: this.empty.id,
      models: [],
      draft: null,
      dialog: null,
      notice: null,
      running: new Set(),
      ...preferences.read(),
    };
  }

  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  set(change) {
    this.state = { ...this.state, ...change };
    for (const listener of this.#listeners) listener(this.state);
  }

  /** Changes what the browser remembers of the user's choice. */
  prefer(change) {
    this.set(change);
    preferences.write(this.state);
  }

  /** Shows a text, and a button that does something about it. */
  notify(text, action) {
    this.set({ notice: { text, action } });
  }

  /** Reads this browser's chats and the server's models. */
  async start() {
    await Promise.all([this.#readChats(), this.readModels()]);
  }

  async #readChats() {
    try {
      this.set({ chats: await this.#chats.all() });
    } catch {
      this.notify("This browser stores nothing for this page: chats end with it.");
    }
  }

  async readModels() {
    try {
      const served = await this.#withKey((key) => models({ key }));
      const listed = (name) => (served.some(({ id }) => id === name) ? name : "");
      const { model, other } = this.state;
      this.set({ models: served, model: listed(model) || served[0].id, other: listed(other) });
    } catch (error) {
      this.notify(error.message, { label: "Try again", run: () => this.#retryModels() });
    }
  }

  #retryModels() {
    this.set({ notice: null });
    return this.readModels();
  }

  /** Calls with the API key; where the server refuses it, asks the user for another and repeats. */
  async #withKey(call) {
    for (;;) {
      const key = preferences.key;
      try {
        return await call(key);
      } catch (error) {
        if (error.status !== 401) throw error;
        // Another request may have asked for a new key in the meantime.
        if (preferences.key === key && !(await this.#askForKey(Boolean(key)))) throw error;
      }
    }
  }

  #askForKey(refused) {
    this.#keyPrompt ??= new Promise((resolve) => {
      const answer = (key) => {
        this.#keyPrompt = null;
        if (key) preferences.key = key;
        this.set({ dialog: null });
        resolve(Boolean(key));
      };
      this.set({ dialog: { kind: "key", refused, answer } });
    });
    return this.#keyPrompt;
  }

  /** The chat that is shown. */
  get chat() {
    return this.state.chats.find((chat) => chat.id === this.state.current) ?? this.empty;
  }

  /** The models that the next question is for. */
  get targets() {
    const { models: served, model, other } = this.state;
    return served.filter(({ id }) => id === model || id === other);
  }

  /** How many images the next question may have: the chat's earlier ones are sent with it. */
  get room() {
    const sent = (_, column) =>
      answeredTurns(this.chat.turns, column).flatMap((turn) => turn.pictures).length;
    const most = Math.min(...this.targets.map((model) => model.max_images));
    return Math.max(0, most - Math.max(...this.targets.map(sent)));
  }

  open(id) {
    this.set({ current: id, draft: null, notice: null });
  }

  create() {
    this.empty = emptyChat();
    this.open(this.empty.id);
  }

  #update(id, change) {
    const chats = this.state.chats.map((chat) => (chat.id === id ? change(chat) : chat));
    this.set({ chats });
  }

  /** Changes what the browser stores; a browser that does not is no reason to stop. */
  async #store(change) {
    try {
      await change;
    } catch {
      this.notify("This browser did not store that: it has no room left, or stores nothing here.");
    }
  }

  #save(id) {
    const chat = this.state.chats.find((each) => each.id === id);
    return chat ? this.#store(this.#chats.save(chat)) : undefined;
  }

  rename(id, title) {
    this.#update(id, (chat) => ({ ...chat, title }));
    return this.#save(id);
  }

  async remove(id) {
    this.stop(id);
    const removed = this.state.chats.find((chat) => chat.id === id);
    this.set({ chats: this.state.chats.filter((chat) => chat !== removed) });
    if (id === this.state.current) this.create();
    const undo = () => {
      const chats = newestFirst([removed, ...this.state.chats]);
      this.set({ chats, current: id, notice: null });
      return this.#save(id);
    };
    this.notify(`Deleted “${removed.title}”.`, { label: "Undo", run: undo });
    await this.#store(this.#chats.remove(id));
  }

  async clear() {
    for (const id of this.#controllers.keys()) this.stop(id);
    this.set({ chats: [], dialog: null });
    this.create();
    await this.#store(this.#chats.clear());
  }

  /** Asks a question in the chat that is shown; where two models are chosen, both. */
  async ask({ question, pictures, choices }) {
    const { model, other, system, options, alone } = this.state;
    const answers = (other ? [model, other] : [model]).map(waiting);
    const turn = { question, pictures, choices, system, options, alone, answers };
    const { id, title, turns } = this.chat;
    const chat = {
      id,
      title: title || titleOf(turn),
      updated: Date.now(),
      turns: [...turns, turn],
    };
    const others = this.state.chats.filter((each) => each.id !== id);
    this.set({ chats: [chat, ...others], notice: null });
    await this.#run(id);
  }

  /** Asks the last question of the chat that is shown once more. */
  async repeat() {
    const { id } = this.chat;
    const again = (turn) => ({ ...turn, answers: turn.answers.map(({ model }) => waiting(model)) });
    this.#update(id, (chat) => ({
      ...chat,
      turns: [...chat.turns.slice(0, -1), again(chat.turns.at(-1))],
    }));
    await this.#run(id);
  }

  /** Takes the last question back, to be edited and asked anew. */
  async revise() {
    const { id, turns } = this.chat;
    const { question, pictures, choices } = turns.at(-1);
    this.#update(id, (chat) => ({ ...chat, turns: turns.slice(0, -1) }));
    this.set({ draft: { id: identifier(), question, pictures, choices } });
    await this.#save(id);
  }

  stop(id = this.state.current) {
    this.#controllers.get(id)?.abort();
  }

  /** Has the last turn of a chat answered, by each of its models at the same time. */
  async #run(id) {
    const controller = new AbortController();
    this.#controllers.set(id, controller);
    this.set({ running: new Set(this.#controllers.keys()) });
    const { turns } = this.state.chats.find((chat) => chat.id === id);
    await this.#save(id);
    await Promise.all(
      turns.at(-1).answers.map((_, column) => this.#answer(id, turns, column, controller.signal)),
    );
    this.#controllers.delete(id);
    this.set({ running: new Set(this.#controllers.keys()) });
    await this.#save(id);
  }

  async #answer(id, turns, column, signal) {
    const change = (part) => this.#changeAnswer(id, turns.length - 1, column, part);
    const begin = performance.now();
    try {
      const urls = new Map();
      for (const picture of picturesOf(turns, column)) {
        urls.set(picture, await dataUrl(picture.blob));
      }
      const request = requestOf(turns, column, (picture) => urls.get(picture));
      const onText = (text) => change({ state: "streaming", text, note: "" });
      const onWait = (seconds) =>
        change({ note: `The server is busy. Asking again in ${seconds} s.` });
      const answer = await this.#withKey((key) => ask(request, { key, signal, onText, onWait }));
      const { text, tokens, ranking, finish } = answer;
      const note = text ? CUT[finish] : "The answer is empty.";
      const seconds = (performance.now() - begin) / 1000;
      change({ state: "done", text, tokens, ranking, note, seconds });
    } catch (error) {
      if (signal.aborted) change({ state: "stopped", note: "Stopped." });
      else change({ state: "failed", note: error.message });
    }
  }

  #changeAnswer(id, index, column, part) {
    const inColumn = (answer, at) => (at === column ? { ...answer, ...part } : answer);
    const inTurn = (turn, at) =>
      at === index ? { ...turn, answers: turn.answers.map(inColumn) } : turn;
    this.#update(id, (chat) => ({ ...chat, turns: chat.turns.map(inTurn) }));
  }
}

/** An answer of which nothing has come yet. */
function waiting(model) {
  return { model, text: "", state: "waiting", note: "" };
}
