/** Where a question is put together: words, images, and the choices among which to answer. */

import { useEffect, useRef, useState } from "./vendor/preact-hooks.js";
import { html, Icon, IconButton, Picture } from "./html.js";
import { imageFiles, LONGEST_SIDE, PictureError, pictureOf } from "./pictures.js";

/** A finger types line breaks with Enter, and sends with the button. */
const TOUCH = matchMedia("(pointer: coarse)");
const NO_FILE = "Only image files can be dropped or pasted: save the image first.";

/** Returns the texts of a list with one a line, without empty and repeated ones. */
function linesOf(text) {
  return [...new Set(text.split("\n").map((line) => line.trim()))].filter(Boolean);
}

/** How many images a question may have, and what becomes of large ones. */
function Room({ room }) {
  if (!Number.isFinite(room)) return null;
  const images = room === 1 ? "1 image" : `${room} images`;
  return html`Up to ${images}<span class="detail">, scaled into ${LONGEST_SIDE} pixels</span>`;
}

/**
 * Takes images from files, from what is dropped anywhere on the page, and from what is pasted.
 *
 * @param {import("./chats.js").Picture[]} initial
 * @param {number} room The most images.
 * @param {(message: string) => void} notify Shows why an image was not taken.
 */
function usePictures(initial, room, notify) {
  const [pictures, setPictures] = useState(initial);
  const [dragged, setDragged] = useState(false);
  // The listeners below are those of the first call.
  const limit = useRef(room);
  limit.current = room;
  const add = async (files) => {
    for (const file of files) {
      try {
        const picture = await pictureOf(file);
        setPictures((before) => {
          if (before.length < limit.current) return [...before, picture];
          notify(`${picture.name} was left out: the model takes no more images in this chat.`);
          return before;
        });
      } catch (error) {
        if (!(error instanceof PictureError)) throw error;
        notify(error.message);
      }
    }
  };
  useEffect(() => takeTransfers(add, setDragged, notify), []);
  const remove = (id) => setPictures((before) => before.filter((picture) => picture.id !== id));
  return { pictures, dragged, add, remove, clear: () => setPictures([]) };
}

/** Whether a drag is of files or of another page's image; words may be dragged into a field. */
function carriesImage({ dataTransfer }) {
  return ["Files", "text/uri-list"].some((type) => dataTransfer.types.includes(type));
}

/** Listens for images that are dropped and pasted; returns what ends it. */
function takeTransfers(add, setDragged, notify) {
  const ending = new AbortController();
  const { signal } = ending;
  const on = (type, listener) => addEventListener(type, listener, { signal });
  on("paste", ({ clipboardData }) => add(imageFiles(clipboardData)));
  on("dragover", (event) => {
    if (!carriesImage(event)) return;
    event.preventDefault();
    setDragged(true);
  });
  // It leaves the window where it leaves for nothing.
  on("dragleave", (event) => event.relatedTarget === null && setDragged(false));
  on("drop", (event) => {
    if (!carriesImage(event)) return;
    event.preventDefault();
    setDragged(false);
    const files = imageFiles(event.dataTransfer);
    if (files.length) add(files);
    else notify(NO_FILE);
  });
  return () => ending.abort();
}

function Thumbnails({ pictures, onRemove }) {
  if (!pictures.length) return null;
  return html`<ul class="thumbnails" aria-label="Images of the question">
    ${pictures.map(
      (picture) => html`<li key=${picture.id}>
        <${Picture} picture=${picture} />
        <span class="size"
          >${picture.width} × ${picture.height}${picture.from && " (scaled down)"}</span>
        <${IconButton} icon="close" label=${`Remove ${picture.name}`}
          onClick=${() => onRemove(picture.id)} /></li>`,
    )}
  </ul>`;
}

/** A button that opens the browser's choice of files, or on a phone its camera. */
function FileButton({ icon, label, onFiles, camera }) {
  const input = useRef(null);
  const change = () => {
    onFiles([...input.current.files]);
    input.current.value = "";
  };
  return html`<${IconButton} icon=${icon} label=${label} onClick=${() => input.current.click()} />
    <input ref=${input} type="file" accept="image/*" hidden multiple=${!camera}
      capture=${camera ? "environment" : undefined} aria-label=${label} onChange=${change} />`;
}

function ChoiceField({ text, onText }) {
  return html`<div class="choice-field">
    <label for="choices">Choices, one per line: each gets its probability</label>
    <textarea id="choices" rows="3" value=${text} onInput=${(event) => onText(event.target.value)}
    ></textarea>
  </div>`;
}

/** The form; `draft` is what stands in it at first. */
export function Composer({ draft, ready, running, compares, room, onAsk, onStop, notify }) {
  const [question, setQuestion] = useState(draft?.question ?? "");
  const [choiceText, setChoiceText] = useState((draft?.choices ?? []).join("\n"));
  const [choosing, setChoosing] = useState(choiceText !== "");
  const taken = usePictures(draft?.pictures ?? [], room, notify);
  const field = useRef(null);
  useEffect(() => TOUCH.matches || field.current.focus(), []);
  const choices = choosing ? linesOf(choiceText) : [];
  const short = choosing && choices.length < 2;
  const empty = !question.trim() && !taken.pictures.length;
  const blocked = !ready || empty || short;
  const send = (event) => {
    event.preventDefault();
    if (running || blocked) return;
    onAsk({ question: question.trim(), pictures: taken.pictures, choices });
    setQuestion("");
    taken.clear();
  };
  const press = (event) => {
    if (event.key === "Escape" && running) onStop();
    const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
    if (sends && !TOUCH.matches) send(event);
  };
  return html`<form class="composer" aria-label="Question" onSubmit=${send}>
    ${taken.dragged && html`<div class="drop"><${Icon} name="image" />Drop images here</div>`}
    <${Thumbnails} pictures=${taken.pictures} onRemove=${taken.remove} />
    ${choosing && html`<${ChoiceField} text=${choiceText} onText=${setChoiceText} />`}
    <label class="hidden" for="question">Question</label>
    <textarea id="question" ref=${field} rows="1" value=${question} onKeyDown=${press}
      onInput=${(event) => setQuestion(event.target.value)}
      placeholder=${compares ? "Ask both about an image" : "Ask about an image"}></textarea>
    <div class="tools">
      <${FileButton} icon="image" label="Add images" onFiles=${taken.add} />
      ${TOUCH.matches &&
      html`<${FileButton} icon="camera" label="Take a photo" camera onFiles=${taken.add} />`}
      <button type="button" class="quiet" aria-pressed=${choosing}
        onClick=${() => setChoosing(!choosing)}><${Icon} name="bars" />Choices</button>
      <span class="hint">${short
        ? "Give two choices or more"
        : html`<${Room} room=${room} />`}</span>
      ${running
        ? html`<button type="button" class="send" aria-label="Stop" title="Stop"
            onClick=${onStop}><${Icon} name="stop" /></button>`
        : html`<button class="send" aria-label="Send" title="Send" disabled=${blocked}
          ><${Icon} name="send" /></button>`}
    </div>
  </form>`;
}
