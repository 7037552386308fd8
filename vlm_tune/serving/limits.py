"""Settings of the server: what it accepts from clients, and how much of it at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_tune.errors import Problem, RecipeError, check_counts, number_problems
from vlm_tune.paths import is_folder, shown_path
from vlm_tune.quoting import quoted

MOST_ANSWERS = 16
"""Largest `n` and `num_beams` of a request."""
MOST_CHOICES = 256
"""Largest number of `choices` of a request."""
MOST_INPUTS = 2048
"""Largest number of inputs of a request for vectors; OpenAI's."""
MOST_MESSAGES = 1000
"""Largest number of messages of a request."""
MOST_FIELDS = 100
"""Largest number of fields of an object in a request."""
MOST_STOPS = 4
"""Largest number of stop strings of a request."""
LONGEST_STOP = 100
"""Most characters of a stop string, which is looked for after each token."""
MOST_TOP = 20
"""Largest `top_logprobs` of a request."""
MOST_SCHEMA = 50_000
"""Most characters of a request's JSON schema, which is read before the request waits."""
KEY = re.compile(r"[\x21-\x7e]{1,1024}")
"""An API key: a header can carry no other characters safely."""
HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.ASCII)
"""A host's name in lower case, without a port."""
ORIGIN = re.compile(r"https?://[^/\s]+")


@dataclass(frozen=True)
class Limits:
    """Settings of the server that clients meet.

    Attributes:
        queue: The maximum number of waiting requests for the engine.
        batch: The maximum number of answers generated at a time.
        max_images: The maximum number of images in a request.
        max_tokens: The largest `max_tokens` of a request.
        timeout: Seconds from a request's arrival to the end of its answer.
        drain: Seconds that running requests get when the server is stopped.
        api_key: The key that requests need; None for none.
        hostnames: Further names of this server, which the header `Host` of requests may have.
        allow_hosts: Hosts from which images are fetched; none by default.
        image_root: The folder that paths of images are read from; none are by default.
        cors: Origins of other sites whose pages may use this server.
        body_bytes: The largest body of a request.
        body_seconds: Seconds in which a request's body must have come.
        bodies_bytes: The most bytes of all bodies of requests in progress, and of images that they
            name.
        text_characters: The most characters of a request's texts together.
        image_bytes: The largest encoded image.
        image_pixels: The most pixels of an image.
        fetch_seconds: Seconds that fetching one image may take, redirects included.
        send_seconds: Seconds in which a client must take a piece of a stream.

    Raises:
        RecipeError: A setting is of the wrong type or out of range; each problem names its option.
    """

    queue: int = 256
    batch: int = 32
    max_images: int = 16
    max_tokens: int = 4096
    timeout: float = 300.0
    drain: float = 30.0
    api_key: str | None = None
    hostnames: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    image_root: Path | None = None
    cors: tuple[str, ...] = ()
    body_bytes: int = 32 * 1024 * 1024
    body_seconds: float = 60.0
    bodies_bytes: int = 512 * 1024 * 1024
    text_characters: int = 1_000_000
    image_bytes: int = 20 * 1024 * 1024
    image_pixels: int = 64_000_000
    fetch_seconds: float = 10.0
    send_seconds: float = 30.0

    def __post_init__(self) -> None:
        check_counts(
            queue=self.queue,
            batch=self.batch,
            max_images=self.max_images,
            max_tokens=self.max_tokens,
        )
        problems = number_problems("--timeout", self.timeout)
        problems += number_problems("--drain", self.drain)
        if self.api_key is not None and not KEY.fullmatch(self.api_key):
            problem = "expected 1 to 1,024 printable ASCII characters without spaces"
            problems.append(Problem("--api-key", problem))
        problems += _host_problems("--hostname", self.hostnames)
        problems += _host_problems("--allow-host", self.allow_hosts)
        problems += [
            Problem("--cors", f"expected an origin such as https://example.org, got {quoted(each)}")
            for each in self.cors
            if not ORIGIN.fullmatch(each)
        ]
        if self.image_root is not None and not is_folder(self.image_root):
            problems.append(Problem("--image-root", f"no folder {shown_path(self.image_root)}"))
        if problems:
            raise RecipeError(problems)

    @property
    def requests(self) -> int:
        """The most requests with a body that are in progress at a time."""
        return self.queue + self.batch


def _host_problems(option: str, names: Sequence[str]) -> list[Problem]:
    return [
        Problem(option, f"expected a host's name such as example.org, got {quoted(name)}")
        for name in names
        if not HOST.fullmatch(name)
    ]
