"""The lines that a started server shows: where it is, and how to ask it."""

from __future__ import annotations

from vlm_tune.serving.run import Started


def welcome(started: Started, host: str) -> str:
    """The text to show; `host` is the address that the server listens at."""
    name, *adapters = started.models
    key = ' -H "Authorization: Bearer $VLM_TUNE_API_KEY"' if started.keyed else ""
    api_key = 'os.environ["VLM_TUNE_API_KEY"]' if started.keyed else '"none"'
    lines = [
        f"serving {name} at {started.url}",
        f"  page      {started.url}/",
        f"  API       {started.url}/v1 (OpenAI's chat completions)",
        f"  metrics   {started.url}/metrics",
    ]
    if adapters:
        lines.append(f"  adapters  {', '.join(adapters)}")
    lines += [
        "ask it:",
        f"  curl {started.url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\",
        f'    -d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'',
        *(["  import os"] if started.keyed else []),
        f'  client = openai.OpenAI(base_url="{started.url}/v1", api_key={api_key})',
        f'  client.chat.completions.create(model="{name}", messages=[...])',
    ]
    if not started.keyed and host not in ("127.0.0.1", "localhost", "::1"):
        lines.append(
            f"note: whoever reaches {host} may use it; --api-key, or the environment variable "
            f"VLM_TUNE_API_KEY, sets a key"
        )
    lines += [
        f"note: requests to {each} are answered one at a time: {reason}"
        for each, reason in started.one_by_one.items()
    ]
    lines.append("stop it with Ctrl-C")
    return "\n".join(lines)
