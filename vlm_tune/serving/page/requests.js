/** What is asked of the server for a turn of a chat: bodies of `/v1/chat/completions`. */

/** Returns a user's message; `urlOf` gives a picture's URL. */
function userMessage(question, pictures, urlOf) {
  if (!pictures.length) return { role: "user", content: question };
  const content = pictures.map((picture) => ({
    type: "image_url",
    image_url: { url: urlOf(picture) },
  }));
  if (question) content.push({ type: "text", text: question });
  return { role: "user", content };
}

/**
 * Returns the answer from which a side of a comparison goes on: its own, or before there were two,
 * the one.
 */
function answerOf(turn, column) {
  return turn.answers[column] ?? turn.answers[0];
}

/** Returns the turns that are sent with later questions: those with an answer. */
export function answeredTurns(turns, column) {
  return turns.filter((turn) => answerOf(turn, column).text);
}

/**
 * Returns the request that answers a turn: one that stands alone has the chat's images, but not
 * its words.
 *
 * @param {import("./chats.js").Turn[]} turns The chat up to the turn that is asked, its last.
 * @param {number} column Which of its answers.
 * @param {(picture: import("./chats.js").Picture) => string} urlOf
 */
export function requestOf(turns, column, urlOf) {
  const turn = turns.at(-1);
  const earlier = turn.alone ? [] : answeredTurns(turns.slice(0, -1), column);
  const messages = [
    ...(turn.system ? [{ role: "system", content: turn.system }] : []),
    ...earlier.flatMap((each) => [
      userMessage(each.question, each.pictures, urlOf),
      { role: "assistant", content: answerOf(each, column).text },
    ]),
    userMessage(turn.question, turn.alone ? picturesOf(turns, column) : turn.pictures, urlOf),
  ];
  // Where choices are compared, nothing is generated that options could change.
  const fields = turn.choices.length ? { choices: turn.choices } : turn.options;
  return { model: turn.answers[column].model, messages, ...fields };
}

/** Returns the pictures that such a request sends. */
export function picturesOf(turns, column) {
  const earlier = answeredTurns(turns.slice(0, -1), column);
  return [...earlier, turns.at(-1)].flatMap((turn) => turn.pictures);
}
