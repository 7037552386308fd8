/** The chats of this browser: opened, renamed, deleted. */

import { useEffect, useRef, useState } from "./vendor/preact-hooks.js";
import { html, Icon, IconButton } from "./html.js";

function TitleField({ chat, onTitle }) {
  const field = useRef(null);
  useEffect(() => field.current.select(), []);
  const press = (event) => {
    if (event.key === "Enter") field.current.blur();
    if (event.key === "Escape") onTitle(chat.title);
  };
  return html`<input ref=${field} aria-label="Title of the chat" value=${chat.title} maxlength="80"
    onKeyDown=${press} onBlur=${() => onTitle(field.current.value.trim() || chat.title)} />`;
}

function Entry({ chat, current, store, onOpen }) {
  const [renaming, setRenaming] = useState(false);
  const rename = (title) => {
    setRenaming(false);
    if (title !== chat.title) store.rename(chat.id, title);
  };
  if (renaming) return html`<li><${TitleField} chat=${chat} onTitle=${rename} /></li>`;
  return html`<li class=${current ? "current" : ""}>
    <button type="button" class="title" aria-current=${current ? "page" : undefined}
      title=${chat.title} onClick=${onOpen}>${chat.title}</button>
    <${IconButton} icon="edit" label=${`Rename ${chat.title}`} onClick=${() => setRenaming(true)} />
    <${IconButton} icon="remove" label=${`Delete ${chat.title}`}
      onClick=${() => store.remove(chat.id)} />
  </li>`;
}

/**
 * Moves the focus into a list that has opened; Escape closes it. Returns what gives the focus back,
 * where it is still in the list.
 */
function focused(list, onClose) {
  const opener = document.activeElement;
  const press = (event) => event.key === "Escape" && onClose();
  list.querySelector(".new").focus();
  addEventListener("keydown", press);
  return () => {
    removeEventListener("keydown", press);
    if (list.contains(document.activeElement)) opener.focus();
  };
}

/** The list, which on a narrow screen opens over the conversation. */
export function Sidebar({ state, store, open, onClose }) {
  const after = (action) => () => {
    action();
    onClose();
  };
  const list = useRef(null);
  useEffect(() => (open ? focused(list.current, onClose) : undefined), [open]);
  return html`<nav ref=${list} id="chats" class=${open ? "open" : ""} aria-label="Chats">
      <div class="brand"><img src="icon.svg" alt="" width="28" height="28" /><b>vlm_tune</b>
        <${IconButton} icon="close" label="Close the list of chats" onClick=${onClose} /></div>
      <button type="button" class="new" onClick=${after(() => store.create())}
        ><${Icon} name="add" />New chat</button>
      <ul>
        ${state.chats.map(
          (chat) => html`<${Entry} key=${chat.id} chat=${chat} store=${store}
            current=${chat.id === state.current} onOpen=${after(() => store.open(chat.id))} />`,
        )}
      </ul>
      ${state.chats.length > 0 &&
      html`<button type="button" class="quiet"
        onClick=${after(() => store.set({ dialog: { kind: "clear" } }))}
        ><${Icon} name="remove" />Delete all chats</button>`}
    </nav>
    ${open && html`<div class="shade" onClick=${onClose}></div>`}`;
}
