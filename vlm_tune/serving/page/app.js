/** The page: the list of chats, the conversation, and where a question is put together. */

import { render } from "./vendor/preact.js";
import { useEffect, useState } from "./vendor/preact-hooks.js";
import { Chats } from "./chats.js";
import { Composer } from "./composer.js";
import { OpenDialog } from "./dialogs.js";
import { html, Icon, IconButton } from "./html.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { Transcript } from "./transcript.js";

function ModelPicker({ label, model, models, onModel }) {
  const change = ({ target }) => onModel(target.value);
  return html`<select aria-label=${label} value=${model} onChange=${change}>
    ${models.map(
      ({ id }) => html`<option key=${id} value=${id} selected=${id === model}>${id}</option>`,
    )}
  </select>`;
}

/** The models that are asked: one, or two side by side. */
function Models({ state, store }) {
  const { models, model, other } = state;
  const compare = () =>
    store.prefer({ other: other ? "" : models.find(({ id }) => id !== model).id });
  return html`<div class="models">
    <${ModelPicker} label="Model" model=${model} models=${models}
      onModel=${(name) => store.prefer({ model: name })} />
    ${other &&
    html`<span class="hint">and</span><${ModelPicker} label="Second model" model=${other}
      models=${models} onModel=${(name) => store.prefer({ other: name })} />`}
    ${models.length > 1 &&
    html`<button type="button" class="quiet" aria-label="Compare two models"
      aria-pressed=${Boolean(other)} onClick=${compare}
      ><${Icon} name="columns" /><span>Compare</span></button>`}
  </div>`;
}

function Welcome({ compares }) {
  return html`<section class="welcome">
    <img src="icon.svg" alt="" width="56" height="56" />
    <h2>Ask about an image</h2>
    <p>Drop or paste one, or choose it below, and type a question.
      ${compares ? " Two models answer side by side." : ""}</p>
  </section>`;
}

function Notice({ notice, store }) {
  return html`<div class="notice" role="status">
    ${notice &&
    html`<p>${notice.text}</p>
      ${notice.action &&
      html`<button type="button" class="quiet" onClick=${notice.action.run}
        >${notice.action.label}</button>`}
      <${IconButton} icon="close" label="Dismiss" onClick=${() => store.set({ notice: null })} />`}
  </div>`;
}

function App({ store }) {
  const [state, setState] = useState(store.state);
  const [listed, setListed] = useState(false);
  useEffect(() => store.subscribe(setState), []);
  useEffect(() => {
    document.documentElement.dataset.theme = state.theme;
  }, [state.theme]);
  const { chat } = store;
  const running = state.running.has(chat.id);
  const compares = Boolean(state.other);
  return html`<a class="skip" href="#question">Skip to the question</a>
    <${Sidebar} state=${state} store=${store} open=${listed} onClose=${() => setListed(false)} />
    <div class="page">
      <header class="bar">
        <${IconButton} icon="menu" label="Chats" aria-expanded=${listed} aria-controls="chats"
          onClick=${() => setListed(!listed)} />
        <h1 class="hidden">${chat.title || "New chat"}</h1>
        <${Models} state=${state} store=${store} />
        <${IconButton} icon="settings" label="Settings"
          onClick=${() => store.set({ dialog: { kind: "settings" } })} />
      </header>
      <main class=${chat.turns.some((turn) => turn.answers.length > 1) ? "wide" : ""}>
        ${chat.turns.length
          ? html`<${Transcript} key=${chat.id} chat=${chat} running=${running} store=${store} />`
          : html`<${Welcome} compares=${compares} />`}
        <div class="bottom">
          <${Notice} notice=${state.notice} store=${store} />
          <${Composer} key=${`${chat.id} ${state.draft?.id}`} draft=${state.draft}
            running=${running} compares=${compares}
            ready=${store.targets.length > 0} room=${store.room}
            onAsk=${(question) => store.ask(question)} onStop=${() => store.stop()}
            notify=${(text) => store.notify(text)} />
        </div>
      </main>
    </div>
    <${OpenDialog} state=${state} store=${store} />`;
}

const store = new Store(new Chats());
render(html`<${App} store=${store} />`, document.body);
store.start();
