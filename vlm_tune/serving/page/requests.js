/** What is asked of the server for a turn of a chat: bodies of `/v1/chat/completions`. */

/** Returns a user's message; `urlOf` gives a picture's URL. */
function userMessage(turn, urlOf) {
  if (!turn.pictures.length) return { role: "user", content: turn.question };
  const content = turn.pictures.map((picture) => ({
    type: "image_url",
    image_url: { url: urlOf(picture) },
  }));
  if (turn.question) content.push({ type: "text", text: turn.question });
  return { role: "user", content };
}

/**
 * Returns the messages before a turn. Each side of a comparison goes on from its answers; before
 * there were two, from the one. A question without an answer is left out.
 */
function earlierMessages(turns, column, urlOf) {
  return turns.flatMap((turn) => {
    const answer = turn.answers[column] ?? turn.answers[0];
    if (!answer.text) return [];
    return [userMessage(turn, urlOf), { role: "assistant", content: answer.text }];
  });
}

/**
 * Returns the request that answers a turn.
 *
 * @param {import("./chats.js").Turn[]} turns The chat up to the turn that is asked, its last.
 * @param {number} column Which of its answers.
 * @param {(picture: import("./chats.js").Picture) => string} urlOf
 */
export function requestOf(turns, column, urlOf) {
  const turn = turns.at(-1);
  const messages = [
    ...(turn.system ? [{ role: "system", content: turn.system }] : []),
    ...earlierMessages(turns.slice(0, -1), column, urlOf),
    userMessage(turn, urlOf),
  ];
  const choices = turn.choices.length ? { choices: turn.choices } : {};
  return { model: turn.answers[column].model, messages, ...choices, ...turn.options };
}

/** Returns the pictures that such a request sends. */
export function picturesOf(turns) {
  return turns.flatMap((turn) => turn.pictures);
}
