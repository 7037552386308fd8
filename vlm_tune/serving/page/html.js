/** Elements as template strings, and small parts that several components use. */

import { h } from "./vendor/preact.js";
import { useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact-hooks.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);

/** Paths of the icons, drawn as lines of 24 × 24 units. */
const ICONS = {
  add: "M12 5v14M5 12h14",
  bars: "M4 6h12M4 12h16M4 18h7",
  camera: "M4 8h3l2-3h6l2 3h3v11H4zM12 17a4 4 0 1 0 0-8 4 4 0 0 0 0 8",
  close: "M6 6l12 12M18 6L6 18",
  code: "M8 7l-5 5 5 5M16 7l5 5-5 5",
  columns: "M4 5h16v14H4zM12 5v14",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  image: "M4 5h16v14H4zM4 17l5-5 4 4 3-3 4 4M9 9.5h.01",
  menu: "M4 7h16M4 12h16M4 17h16",
  remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  repeat: "M4 12a8 8 0 0 1 14-5l2 2M20 4v5h-5M20 12a8 8 0 0 1-14 5l-2-2M4 20v-5h5",
  send: "M12 19V5M6 11l6-6 6 6",
  settings: "M4 7h9M17 7h3M15 5v4M4 17h3M11 17h9M9 15v4",
  stop: "M7 7h10v10H7z",
};

/** An icon beside words or on a button that bears a label: nothing for a screen reader. */
export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"
    ><path d=${ICONS[name]} /></svg>`;
}

/** A button that shows an icon alone; `label` is its name and its tooltip. */
export function IconButton({ icon, label, ...attributes }) {
  return html`<button type="button" class="icon-button" aria-label=${label} title=${label}
    ...${attributes}><${Icon} name=${icon} /></button>`;
}

/** A modal dialog, which Escape, its cross and a click beside it close. */
export function Dialog({ title, onClose, children }) {
  const dialog = useRef(null);
  useLayoutEffect(() => dialog.current.showModal(), []);
  const close = () => dialog.current.close();
  const beside = (event) => event.target === dialog.current && close();
  return html`<dialog ref=${dialog} aria-labelledby="dialog-title" onClose=${onClose}
      onPointerDown=${beside}>
    <div class="dialog-body">
      <header><h2 id="dialog-title">${title}</h2>
        <${IconButton} icon="close" label="Close" onClick=${close} /></header>
      ${children}
    </div>
  </dialog>`;
}

/** Returns a URL that shows a picture's bytes while the component is there. */
function useUrlOf(blob) {
  const [url, setUrl] = useState(undefined);
  useEffect(() => {
    const address = URL.createObjectURL(blob);
    setUrl(address);
    return () => URL.revokeObjectURL(address);
  }, [blob]);
  return url;
}

/** A picture, with the place that it takes before it has loaded. */
export function Picture({ picture }) {
  const url = useUrlOf(picture.blob);
  const { name, width, height } = picture;
  return html`<img src=${url} alt=${name} width=${width} height=${height} />`;
}

/**
 * Puts text into the clipboard. Browsers offer `navigator.clipboard` on HTTPS and on this
 * computer alone; a page that a phone opens by the computer's address copies a selection.
 */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  // A modal dialog lets nothing outside of it be selected.
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A button that copies a text and says so for two seconds. */
export function CopyButton({ text, label }) {
  const [copied, setCopied] = useState(false);
  useEffect(() => {
    if (!copied) return undefined;
    const timer = setTimeout(() => setCopied(false), 2000);
    return () => clearTimeout(timer);
  }, [copied]);
  const click = () => copy(text).then(() => setCopied(true));
  return html`<button type="button" class="quiet" onClick=${click}>
    <${Icon} name="copy" /><span aria-live="polite">${copied ? "Copied" : label}</span></button>`;
}
