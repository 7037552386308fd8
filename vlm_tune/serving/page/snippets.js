/** A turn's request as code to run elsewhere: Python, curl, and the `openai` package. */

import { address } from "./client.js";
import { picturesOf, requestOf } from "./requests.js";

/** Fields that the `openai` package passes on in `extra_body`: they are this server's. */
const EXTRA_FIELDS = new Set(["choices"]);
const KEY_VARIABLE = "VLM_TUNE_API_KEY";
const IMAGE_FUNCTION = [
  "",
  "",
  "def image(path):",
  "    kind = mimetypes.guess_type(path)[0]",
  '    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"',
  "",
];

/** Returns lines of code without those that are `false`: what only some requests need. */
function lines(...parts) {
  return `${parts.flat().filter((part) => part !== false).join("\n")}\n`;
}

/**
 * Returns JSON text with an expression in the place of each picture's URL, which in the text is the
 * picture's identifier.
 */
function withPictures(text, pictures, expression) {
  const names = new Map(pictures.map(({ id, name }) => [id, name]));
  return text.replace(/"([0-9a-f]{24})"/g, (quoted, id) =>
    names.has(id) ? expression(names.get(id)) : quoted,
  );
}

/**
 * Returns a request's part as an expression of Python. Numbers, strings, lists and objects of JSON
 * are those of Python; a request has nothing else.
 */
function pythonOf(part, pictures) {
  const text = JSON.stringify(part, null, 4).replaceAll("\n", "\n    ");
  return withPictures(text, pictures, (name) => `image(${JSON.stringify(name)})`);
}

function python({ request, pictures, key }) {
  const pictured = pictures.length > 0;
  return lines(
    pictured && "import base64",
    "import json",
    pictured && "import mimetypes",
    key && "import os",
    "import urllib.request",
    pictured && "from pathlib import Path",
    pictured && IMAGE_FUNCTION,
    "",
    "request = urllib.request.Request(",
    `    ${JSON.stringify(address("v1/chat/completions"))},`,
    `    json.dumps(${pythonOf(request, pictures)}).encode(),`,
    "    {",
    '        "Content-Type": "application/json",',
    key && `        "Authorization": "Bearer " + os.environ["${KEY_VARIABLE}"],`,
    "    },",
    ")",
    "with urllib.request.urlopen(request) as response:",
    "    completion = json.load(response)",
    'print(completion["choices"][0]["message"]["content"])',
  );
}

function openai({ request, pictures, key }) {
  const pictured = pictures.length > 0;
  const fields = Object.entries(request);
  const extra = fields.filter(([name]) => EXTRA_FIELDS.has(name));
  const standard = fields.filter(([name]) => !EXTRA_FIELDS.has(name));
  if (extra.length) standard.push(["extra_body", Object.fromEntries(extra)]);
  return lines(
    pictured && ["import base64", "import mimetypes"],
    key && "import os",
    pictured && "from pathlib import Path",
    (pictured || key) && "",
    "from openai import OpenAI",
    pictured && IMAGE_FUNCTION,
    "",
    "client = OpenAI(",
    `    base_url=${JSON.stringify(address("v1"))},`,
    `    api_key=${key ? `os.environ["${KEY_VARIABLE}"]` : '"none"'},`,
    ")",
    "completion = client.chat.completions.create(",
    standard.map(([name, part]) => `    ${name}=${pythonOf(part, pictures)},`),
    ")",
    "print(completion.choices[0].message.content)",
  );
}

/** Returns a text as one word of a shell. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** Returns the URL of a file's bytes as a JSON string, for a shell to fill in. */
function shellImage(name) {
  const ending = name.split(".").at(-1).toLowerCase();
  const type = ["png", "webp", "gif"].includes(ending) ? ending : "jpeg";
  return `"data:image/${type};base64,$(base64 < ${quoted(name)} | tr -d '\\n')"`;
}

function curl({ request, pictures, key }) {
  const body = JSON.stringify(request, null, 2);
  // A here-document expands these three; a picture's identifier has none of them.
  const escaped = body.replace(/[\\$`]/g, "\\$&");
  return lines(
    `curl ${quoted(address("v1/chat/completions"))} \\`,
    "  -H 'Content-Type: application/json' \\",
    key && `  -H "Authorization: Bearer $${KEY_VARIABLE}" \\`,
    "  --data-binary @- <<JSON",
    withPictures(escaped, pictures, shellImage),
    "JSON",
  );
}

const WRITERS = { Python: python, curl, openai };
export const LANGUAGES = Object.keys(WRITERS);

/**
 * Returns the code that asks what a turn asked.
 *
 * @param {"Python" | "curl" | "openai"} language
 * @param {import("./chats.js").Turn[]} turns The chat up to the turn.
 * @param {number} column Which of its answers.
 * @param {boolean} key Whether the server wants an API key.
 */
export function snippet(language, turns, column, key) {
  const request = requestOf(turns, column, (picture) => picture.id);
  return WRITERS[language]({ request, pictures: picturesOf(turns, column), key });
}
