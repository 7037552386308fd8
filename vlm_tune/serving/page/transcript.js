/** The questions and answers of a chat. */

import { useLayoutEffect, useRef } from "./vendor/preact-hooks.js";
import { CopyButton, html, Icon, Picture } from "./html.js";

const PERCENT = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });

function Question({ turn, last, running, onRevise, onPicture }) {
  return html`<article class="question" aria-label="Question">
    ${turn.pictures.length > 0 &&
    html`<ul class="pictures">
      ${turn.pictures.map(
        (picture) => html`<li key=${picture.id}
          ><button type="button" aria-label=${`Enlarge ${picture.name}`}
            onClick=${() => onPicture(picture)}><${Picture} picture=${picture} /></button></li>`,
      )}
    </ul>`}
    ${turn.question && html`<p class="text">${turn.question}</p>`}
    ${last &&
    !running &&
    html`<button type="button" class="quiet" onClick=${onRevise}
      ><${Icon} name="edit" />Edit</button>`}
  </article>`;
}

/** The choices with their probabilities, the likeliest first. */
function Ranking({ ranking }) {
  return html`<table class="ranking">
    <caption class="hidden">Choices and their probabilities</caption>
    <tbody>
      ${ranking.map(
        ({ text, probability }) => html`<tr key=${text}>
          <th scope="row">${text}</th>
          <td class="share" aria-hidden="true"
            ><div><i style=${{ width: `${100 * probability}%` }}></i></div></td>
          <td>${PERCENT.format(probability)}</td></tr>`,
      )}
    </tbody>
  </table>`;
}

function figuresOf({ tokens, seconds, ranking }) {
  if (!seconds) return "";
  const long = `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const time = seconds < 1 ? `${Math.ceil(1000 * seconds)} ms` : long;
  if (ranking || !tokens) return time;
  return tokens === 1 ? `1 token in ${time}` : `${tokens} tokens in ${time}`;
}

function Answer({ answer, onCode, onRepeat }) {
  const { model, text, state, note, ranking } = answer;
  const ended = !["waiting", "streaming"].includes(state);
  return html`<article class="answer ${state}" aria-label=${`Answer of ${model}`}
      aria-busy=${!ended}>
    <h2>${model}</h2>
    ${ranking ? html`<${Ranking} ranking=${ranking} />` : text && html`<p class="text">${text}</p>`}
    ${state === "waiting" && !note && html`<p class="dots"><span class="hidden">Waiting</span></p>`}
    ${note && html`<p class="note" role=${state === "failed" ? "alert" : undefined}>${note}</p>`}
    ${ended &&
    html`<footer>
      ${text && html`<${CopyButton} text=${text} label="Copy" />`}
      <button type="button" class="quiet" onClick=${onCode}><${Icon} name="code" />Code</button>
      ${onRepeat &&
      html`<button type="button" class="quiet" onClick=${onRepeat}
        ><${Icon} name="repeat" />Ask again</button>`}
      <span class="hint">${figuresOf(answer)}</span>
    </footer>`}
  </article>`;
}

/** Scrolls to a new question and with its answer, unless the reader has scrolled away. */
function useFollowing(turns) {
  const following = useRef(true);
  const root = document.documentElement;
  const follow = () => following.current && scrollTo({ top: root.scrollHeight });
  useLayoutEffect(() => {
    const scrolled = () => {
      following.current = root.scrollHeight - root.scrollTop - root.clientHeight < 80;
    };
    const growth = new ResizeObserver(follow);
    growth.observe(document.body);
    addEventListener("scroll", scrolled, { passive: true });
    return () => {
      growth.disconnect();
      removeEventListener("scroll", scrolled);
    };
  }, []);
  useLayoutEffect(() => {
    following.current = true;
    follow();
  }, [turns.length]);
}

/** A chat's turns. A screen reader reads an answer once it has ended. */
export function Transcript({ chat, running, store }) {
  const { turns } = chat;
  useFollowing(turns);
  const show = (picture) => store.set({ dialog: { kind: "picture", picture } });
  const code = (index, column) => () =>
    store.set({ dialog: { kind: "code", turns: turns.slice(0, index + 1), column } });
  return html`<div class="transcript" role="log" aria-live="polite" aria-label="Conversation">
    ${turns.map((turn, index) => {
      const last = index === turns.length - 1;
      const repeat = last && !running ? () => store.repeat() : undefined;
      return html`<section key=${index} aria-label=${`Turn ${index + 1}`}>
        <${Question} turn=${turn} last=${last} running=${running} onPicture=${show}
          onRevise=${() => store.revise()} />
        <div class="answers">
          ${turn.answers.map(
            (answer, column) => html`<${Answer} key=${column} answer=${answer}
              onCode=${code(index, column)} onRepeat=${column === 0 ? repeat : undefined} />`,
          )}
        </div>
      </section>`;
    })}
  </div>`;
}
