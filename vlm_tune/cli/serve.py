"""The command `serve`: a model behind HTTP, with OpenAI's API and a page."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_tune.cli.options import (
    MOST_TOKENS,
    AcceptBaseOption,
    BaseOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    bases_by_part,
    check_choice,
    check_dtype,
    print_text,
    quiet_libraries,
    use_device,
)

if TYPE_CHECKING:
    from vlm_tune.serving.limits import Limits

KEY_VARIABLE = "VLM_TUNE_API_KEY"


def _named_folder(name: str) -> Path:
    """The folder of an option. An empty name, of a shell's unset variable, would be this folder."""
    if not name:
        raise typer.BadParameter("expected a folder, got an empty name")
    return Path(name)


HostOption = Annotated[
    str, typer.Option(help="address to listen on; 0.0.0.0 for all of this machine's")
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="port; 0 for a free one")]
NameOption = Annotated[
    str | None, typer.Option(help="name of MODEL in requests; its folder's name by default")
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FOLDER", help="another run over the same base, as NAME=FOLDER (repeatable)"
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        envvar=KEY_VARIABLE,
        help="key that requests must send; prefer the environment variable, because other users "
        "of this machine can see options",
    ),
]
HostnameOption = Annotated[
    list[str] | None, typer.Option(help="another host name of this server (repeatable)")
]
AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(help="a host from which images may be fetched (repeatable); none by default"),
]
ImageRootOption = Annotated[
    Path | None,
    typer.Option(
        parser=_named_folder,
        metavar="PATH",
        help="folder in which requests may name images by path; none by default",
    ),
]
CorsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="ORIGIN", help="an origin whose pages may send requests (repeatable)"),
]
QueueOption = Annotated[
    int, typer.Option(min=1, max=100_000, help="maximum number of waiting requests")
]
BatchOption = Annotated[
    int, typer.Option(min=1, max=4096, help="maximum number of answers generated at a time")
]
ImagesOption = Annotated[
    int,
    typer.Option(min=1, max=10_000, help="maximum number of images or audio clips in a request"),
]
TokensOption = Annotated[
    int,
    typer.Option(
        min=1, max=MOST_TOKENS, help="maximum answer length that a request may set, in tokens"
    ),
]
TimeoutOption = Annotated[float, typer.Option(min=0.001, help="maximum seconds for an answer")]
DrainOption = Annotated[
    float,
    typer.Option(
        min=0.001, help="seconds that running answers have to finish when the server stops"
    ),
]
EngineOption = Annotated[
    str, typer.Option(help="vlm_tune, or vllm to serve an exported MODEL by vLLM")
]


def serve(
    model: ModelArgument,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    name: NameOption = None,
    adapter: AdapterOption = None,
    api_key: KeyOption = None,
    hostname: HostnameOption = None,
    allow_host: AllowHostOption = None,
    image_root: ImageRootOption = None,
    cors: CorsOption = None,
    queue: QueueOption = 256,
    batch: BatchOption = 32,
    max_images: ImagesOption = 16,
    max_tokens: TokensOption = 4096,
    timeout: TimeoutOption = 300.0,
    drain: DrainOption = 30.0,
    engine: EngineOption = "vlm_tune",
    dtype: DtypeOption = None,
    base: BaseOption = None,
    accept_other_base: AcceptBaseOption = False,
    device: DeviceOption = None,
) -> None:
    """Serve MODEL over HTTP: an OpenAI-compatible API, and a page for the browser."""
    check_dtype(dtype)
    check_choice("--engine", engine, ("vlm_tune", "vllm"))
    adapters = _named(adapter or [])
    _prepare(device, api_key)
    from vlm_tune.serving.limits import Limits

    limits = Limits(
        queue=queue,
        batch=batch,
        max_images=max_images,
        max_tokens=max_tokens,
        timeout=timeout,
        drain=drain,
        api_key=api_key,
        hostnames=tuple(hostname or ()),
        allow_hosts=tuple(allow_host or ()),
        image_root=image_root,
        cors=tuple(cors or ()),
    )
    if engine == "vllm":
        _hand_over(model, name, host, port, adapters, dtype, limits)
    from vlm_tune.serving.run import serve as run
    from vlm_tune.serving.welcome import welcome

    run(
        model,
        host=host,
        port=port,
        name=name,
        adapters=adapters,
        limits=limits,
        dtype=dtype,
        base=bases_by_part(base),
        accept_other_base=accept_other_base,
        started=lambda event: print_text(welcome(event, host)),
    )


def _check_key(key: str | None) -> None:
    """Raises `RecipeError` for an empty key in the environment, which click takes for none."""
    if key is None and os.environ.get(KEY_VARIABLE) == "":
        from vlm_tune.errors import Problem, RecipeError

        message = "is empty, so the server would accept requests without a key: set or unset it"
        raise RecipeError([Problem(KEY_VARIABLE, message)])


def _prepare(device: str | None, key: str | None) -> None:
    """Checks the environment's key, chooses the device, and has the requests logged."""
    _check_key(key)
    use_device(device)
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("vlm_tune.serving").setLevel(logging.INFO)


def _named(texts: list[str]) -> dict[str, Path]:
    """The folders of `NAME=FOLDER` by their names."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise typer.BadParameter(f"{text!r} is not NAME=FOLDER", param_hint="--adapter")
        if name in folders:
            raise typer.BadParameter(f"two adapters are named {name!r}", param_hint="--adapter")
        folders[name] = Path(folder)
    return folders


def _hand_over(
    model: Path,
    name: str | None,
    host: str,
    port: int,
    adapters: dict[str, Path],
    dtype: str | None,
    limits: Limits,
) -> None:
    """Becomes the process of `vllm serve`."""
    from vlm_tune.errors import ModelError
    from vlm_tune.serving.handover import vllm_command

    command = vllm_command(
        model, name=name, host=host, port=port, adapters=adapters, dtype=dtype, limits=limits
    )
    if shutil.which("vllm") is None:
        raise ModelError("vLLM is not installed: `pip install vllm`, or leave --engine vllm out")
    if limits.api_key is not None:
        os.environ["VLLM_API_KEY"] = limits.api_key
    # A redirect could lead from a host of --allow-host to any other.
    os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"
    os.execvp("vllm", command)
