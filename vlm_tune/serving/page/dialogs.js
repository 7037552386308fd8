/** The page's dialogs. */

import { useState } from "./vendor/preact-hooks.js";
import { CopyButton, Dialog, html, Picture } from "./html.js";
import { preferences } from "./preferences.js";
import { LANGUAGES, snippet } from "./snippets.js";

/** The options of a request, with the limits that the server has too; an empty field sends none. */
const OPTIONS = [
  { name: "temperature", label: "Temperature", note: "0 is greedy", min: 0, max: 2, step: 0.1 },
  { name: "top_p", label: "Top p", note: "1: all tokens", min: 0.05, max: 1, step: 0.05 },
  { name: "max_tokens", label: "Most tokens", note: "of an answer", min: 1, step: 1 },
  { name: "seed", label: "Seed", note: "of the sampling", min: 0, step: 1 },
];
const THEMES = { "": "As the system", light: "Light", dark: "Dark" };

function OptionField({ option, options, onChange }) {
  const { name, label, note, ...limits } = option;
  const change = ({ target }) => {
    if (!target.reportValidity()) return;
    const { [name]: _, ...others } = options;
    onChange(target.value === "" ? others : { ...others, [name]: target.valueAsNumber });
  };
  return html`<label>${label}<input type="number" name=${name} ...${limits}
    value=${options[name]} placeholder="default" inputmode="decimal" onChange=${change}
    /><small>${note}</small></label>`;
}

function Settings({ state, store, onClose }) {
  const most = { max_tokens: Math.min(...store.targets.map((model) => model.max_tokens)) };
  return html`<${Dialog} title="Settings" onClose=${onClose}>
    <label>System text<textarea rows="3" value=${state.system}
      placeholder="What the model reads before the first question"
      onChange=${(event) => store.prefer({ system: event.target.value.trim() })}></textarea></label>
    <div class="fields">
      ${OPTIONS.map(
        (option) => html`<${OptionField} key=${option.name}
          option=${{ max: most[option.name], ...option }} options=${state.options}
          onChange=${(options) => store.prefer({ options })} />`,
      )}
    </div>
    <label class="check"><input type="checkbox" checked=${state.alone}
      onChange=${({ target }) => store.prefer({ alone: target.checked })}
      />Each question by itself<small>with the chat's images, without the words before it: for
      models that were trained on single questions</small></label>
    <fieldset><legend>Colours</legend>
      <div class="segments">
        ${Object.entries(THEMES).map(
          ([theme, label]) => html`<label key=${theme}><input type="radio" name="theme"
            checked=${state.theme === theme} onChange=${() => store.prefer({ theme })}
            />${label}</label>`,
        )}
      </div>
    </fieldset>
    <p class="hint">They apply from the next question on. Empty fields use the server's defaults.
      Chats and settings stay in this browser.</p>
  <//>`;
}

function Key({ dialog }) {
  const [key, setKey] = useState("");
  const submit = (event) => {
    event.preventDefault();
    dialog.answer(key.trim());
  };
  return html`<${Dialog} title="API key" onClose=${() => dialog.answer("")}>
    <form onSubmit=${submit}>
      <p>${dialog.refused ? "The server refused this key." : "This server needs an API key."}</p>
      <label>Key<input type="password" autocomplete="current-password" required value=${key}
        onInput=${(event) => setKey(event.target.value)} /></label>
      <p class="hint">It is remembered until this tab is closed.</p>
      <button class="primary">Continue</button>
    </form>
  <//>`;
}

function Code({ dialog, onClose }) {
  const [language, setLanguage] = useState(LANGUAGES[0]);
  const { turns, column } = dialog;
  const text = snippet(language, turns, column, Boolean(preferences.key));
  const pictured = turns.some((turn) => turn.pictures.length);
  return html`<${Dialog} title="Code for this question" onClose=${onClose}>
    <fieldset><legend class="hidden">Language</legend>
      <div class="segments">
        ${LANGUAGES.map(
          (each) => html`<label key=${each}><input type="radio" name="language"
            checked=${each === language} onChange=${() => setLanguage(each)} />${each}</label>`,
        )}
      </div>
    </fieldset>
    <pre tabindex="0" aria-label="Code"><code>${text}</code></pre>
    ${pictured && html`<p class="hint">It reads the image files from the folder it runs in.</p>`}
    <${CopyButton} text=${text} label="Copy code" />
  <//>`;
}

function Enlarged({ dialog, onClose }) {
  const { picture } = dialog;
  return html`<${Dialog} title=${picture.name} onClose=${onClose}>
    <div class="enlarged"><${Picture} picture=${picture} /></div>
    <p class="hint">${picture.width} × ${picture.height} pixels as sent${picture.from &&
    `, ${picture.from.width} × ${picture.from.height} in the file`}</p>
  <//>`;
}

function Clear({ state, store, onClose }) {
  return html`<${Dialog} title="Delete all chats?" onClose=${onClose}>
    <p>${state.chats.length} chats and their images are deleted from this browser permanently.</p>
    <div class="actions">
      <button type="button" onClick=${onClose}>Keep them</button>
      <button type="button" class="danger" onClick=${() => store.clear()}>Delete all</button>
    </div>
  <//>`;
}

const DIALOGS = { settings: Settings, key: Key, code: Code, picture: Enlarged, clear: Clear };

/** The dialog that is open, if any. */
export function OpenDialog({ state, store }) {
  const { dialog } = state;
  if (!dialog) return null;
  // A dialog that closes because another has taken its place leaves that one open.
  const onClose = () => store.state.dialog === dialog && store.set({ dialog: null });
  const Shown = DIALOGS[dialog.kind];
  return html`<${Shown} key=${dialog.kind} dialog=${dialog} state=${state} store=${store}
    onClose=${onClose} />`;
}
