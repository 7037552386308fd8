/** What this browser remembers of the user's choices; the API key only until its tab is closed. */

const PLACE = "vlm_tune.preferences";
const KEY_PLACE = "vlm_tune.key";
const INITIAL = { model: "", other: "", system: "", options: {}, alone: false, theme: "" };

/** Uses a storage that the browser may refuse, as in some private windows. */
function attempt(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

export const preferences = {
  read() {
    const text = attempt(() => localStorage.getItem(PLACE));
    return { ...INITIAL, ...attempt(() => JSON.parse(text)) };
  },

  write({ model, other, system, options, alone, theme }) {
    const text = JSON.stringify({ model, other, system, options, alone, theme });
    attempt(() => localStorage.setItem(PLACE, text));
  },

  get key() {
    return attempt(() => sessionStorage.getItem(KEY_PLACE)) ?? "";
  },

  set key(key) {
    attempt(() => sessionStorage.setItem(KEY_PLACE, key));
  },
};
