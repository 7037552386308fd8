"""The choice of kernels, and that no other user's compiled code is run."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import LORA_TUNE, built, parsed, with_tune
from tests.helpers.tiny_recipes import COMPILED
from vlm_tune import cli
from vlm_tune.api import sft
from vlm_tune.errors import RecipeError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.lora import by_kernel
from vlm_tune.model.acceleration import decoder_layers, interval_attention
from vlm_tune.resources import cache_folder, chosen_kernels, kernel_choice, kernel_setting

NOBODY = 65534
WIDE = "hidden_size: 64, head_dim: 32"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache with nothing compiled, as a process that has loaded nothing finds it."""
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_failures", {})
    native.load.cache_clear()
    yield tmp_path / "cache" / "kernels"
    native.load.cache_clear()


# --- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "eval", "chat", "merge", "verify-run", "plan", "check"])
def test_another_value_ends_every_command_with_2(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLM_TUNE_KERNELS", "fast")
    monkeypatch.setattr(sys, "argv", ["vlm-tune", command, "nothing", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems == [
        {"where": "VLM_TUNE_KERNELS", "message": "'fast' is not one of auto, reference, emulate"}
    ]


def test_another_value_is_an_error_from_python(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    built(recipe).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("VLM_TUNE_KERNELS", "fast")
    for call in (
        lambda: sft(recipe),
        lambda: VisionLanguageModel.from_pretrained(tmp_path / "model"),
        native.has_kernels,
    ):
        with pytest.raises(
            RecipeError, match="VLM_TUNE_KERNELS: 'fast' is not one of auto, reference, emulate"
        ):
            call()
    assert not (tmp_path / "run").exists()


def test_a_run_by_the_kernels_and_one_by_plain_torch_learn_alike_and_say_which(
    kernels: str, tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> None:
        raise AssertionError("the kernels are called")

    losses, calls = {}, {}

    def counting(module: Any, name: str) -> None:
        real = getattr(module, name)

        def count(*given: Any) -> Any:
            calls[mode] += 1
            return real(*given)

        monkeypatch.setattr(module, name, count)

    counting(interval_attention, "interval_attention")
    counting(decoder_layers, "decoder_layer")
    for mode in (kernels, "reference"):
        if mode == "reference":
            monkeypatch.setenv("VLM_TUNE_KERNELS", mode)
            monkeypatch.setattr(native, "kernels", never)
        text = with_tune(tiny_recipe("causal", precision="bf16", output=mode), LORA_TUNE).replace(
            "hidden_size: 32", WIDE
        )
        calls[mode] = 0
        sft(parsed(text))
        events = [
            json.loads(line) for line in (tmp_path / mode / "log.jsonl").read_text().splitlines()
        ]
        (environment,) = [event for event in events if event["event"] == "environment"]
        assert environment["kernels"] == mode and environment["kernels_reason"] == str(
            native.kernel_status()
        )
        losses[mode] = [event["loss"] for event in events if event["event"] == "train"][-1]
    assert calls[kernels] == calls["reference"] > 0
    assert losses[kernels] == pytest.approx(losses["reference"], rel=0.02)


def test_the_recipe_chooses_for_its_run_and_the_variable_overrides_it(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLM_TUNE_KERNELS", raising=False)
    recipe = parsed(tiny_recipe("causal"), train__kernels="reference", train__steps=1)
    sft(recipe)
    events = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    (environment,) = [event for event in events if event["event"] == "environment"]
    assert environment["kernels"] == "reference"
    assert environment["kernels_reason"] == "plain torch: train.kernels: reference"
    # The setting ends with the run.
    assert kernel_choice() == "auto"
    with kernel_setting("reference"):
        assert kernel_choice() == "reference" and not native.has_kernels()
        monkeypatch.setenv("VLM_TUNE_KERNELS", "emulate")
        assert (kernel_choice(), chosen_kernels()) == ("emulate", "VLM_TUNE_KERNELS=emulate")
    with pytest.raises(RecipeError, match="'fast' is not one of auto, reference, emulate"):
        parsed(tiny_recipe("causal"), train__kernels="fast")


def test_what_computes_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_TUNE_KERNELS", raising=False)
    monkeypatch.setattr(native, "_failures", {})
    monkeypatch.setattr(native, "compiler", lambda: "/usr/bin/c++")
    rows = torch.zeros(4, 64, dtype=torch.bfloat16)
    for amx in (True, False):
        monkeypatch.setattr(native, "has_amx", lambda amx=amx: amx)
        monkeypatch.setenv("VLM_TUNE_KERNELS", "reference")
        assert native.kernel_status().mode == "reference" and not by_kernel(rows, [64])
        monkeypatch.setenv("VLM_TUNE_KERNELS", "emulate")
        assert native.kernel_status().mode in ("avx512", "portable")
        monkeypatch.setenv("VLM_TUNE_KERNELS", "auto")
        for portable in (True, False):
            monkeypatch.setattr(native, "prefers_portable", lambda portable=portable: portable)
            assert native.kernel_status().mode == (
                "amx" if amx else "portable" if portable else "reference"
            )
    monkeypatch.setattr(native, "has_amx", lambda: True)
    assert native.kernel_status().mode == "amx"
    for name, value, reason in (
        (f"{native.__name__}.compiler", None, "none was found"),
        ("platform.machine", "aarch64", "for x86-64, and this is aarch64"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda value=value: value)
            patch.setenv("VLM_TUNE_KERNELS", "auto")
            status = native.kernel_status()
            assert status.mode == "reference" and reason in str(status)
            patch.setenv("VLM_TUNE_KERNELS", "emulate")
            with pytest.raises(RecipeError, match=reason):
                native.kernel_status()


def test_each_way_of_compiling_has_a_name_of_its_own() -> None:
    ways = [tuple(native.options(native.KERNELS, mode)) for mode in ("amx", "avx512", "portable")]
    assert len(set(ways)) == 3
    assert ["emulation.h" in " ".join(way) for way in ways] == [False, True, True]


def test_a_compiler_that_fails_is_one_line_and_plain_torch(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(
        "#!/bin/sh\necho 'In file included from here:' >&2\necho 'gated.cpp:3:1: error: "
        "no such thing' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(native, "has_amx", lambda: True)
    monkeypatch.setenv("VLM_TUNE_KERNELS", "auto")
    with caplog.at_level(logging.WARNING):
        assert native.library(native.KERNELS) is None and native.library(native.KERNELS) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        line == "the kernels can't be compiled or loaded: gated.cpp:3:1: error: no such thing; "
        "the run goes on without"
    )
    assert (
        native.kernel_status().mode == "reference"
        and "no such thing" in native.kernel_status().reason
    )
    monkeypatch.setenv("VLM_TUNE_KERNELS", "emulate")
    with pytest.raises(RecipeError, match="no such thing"):
        native.library(native.KERNELS)


# --- files -------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")


def part() -> Path:
    """The small part, compiled or loaded anew, in the cache folder."""
    native.load.cache_clear()
    assert native.library("allocator") is not None
    (library_path,) = cache_folder("kernels").glob("allocator-*.so")
    return library_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@needs_compiler
def test_what_is_compiled_is_its_user_s_alone_whatever_the_umask(fresh: Path) -> None:
    before = os.umask(0)
    try:
        library_path = part()
    finally:
        os.umask(before)
    assert (mode(fresh), mode(library_path)) == (0o700, 0o755)
    fresh.chmod(0o777)
    part()
    assert mode(fresh) == 0o700


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a file or folder belong to another user, really where that is allowed."""
    if os.getuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    else:
        monkeypatch.setattr(os, "getuid", lambda: NOBODY)


def test_parts_are_told_apart(kernels: str, fresh: Path) -> None:
    """The loader knows a library by its name: two that were opened one after the other have two."""
    fresh.parent.mkdir()
    fresh.symlink_to(COMPILED)
    for name, function in ((native.KERNELS, "low_rank"), ("allocator", "vlm_tune_open")):
        part = native.library(name)
        assert part is not None and getattr(part, function)


@needs_compiler
@pytest.mark.parametrize("fault", ["another user's", "others may write", "a link"])
def test_a_library_that_may_be_another_user_s_is_compiled_anew(
    fault: str,
    fresh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    library_path = part()
    before = library_path.stat().st_ino
    with monkeypatch.context() as patch:
        if fault == "another user's":
            give_away(library_path, patch)
        elif fault == "others may write":
            library_path.chmod(0o777)
        else:
            library_path.rename(tmp_path / "elsewhere.so")
            library_path.symlink_to(tmp_path / "elsewhere.so")
        native.load.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert native.library("allocator") is not None
    reasons = {
        "another user's": "belongs to user",
        "others may write": "others may write",
        "a link": "symbolic links",
    }
    assert any(
        "allocator-" in record.getMessage() and reasons[fault] in record.getMessage()
        for record in caplog.records
    )
    if os.getuid() == 0 or fault != "another user's":
        assert (
            not library_path.is_symlink()
            and library_path.stat().st_ino != before
            and mode(library_path) == 0o755
        )


@needs_compiler
def test_a_folder_of_another_user_is_left_alone(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = part()
    give_away(fresh, monkeypatch)
    native.load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert native.library("allocator") is not None
    assert any("belongs to user" in record.getMessage() for record in caplog.records)
    private = fresh.with_name(f"kernels-{os.getuid()}")
    assert [path.name for path in private.glob("*.so")] == [module.name] and mode(private) == 0o700
    if os.getuid() == 0:
        # Nor by a link of one's own to such a folder.
        link = fresh.with_name("link")
        fresh.rename(fresh.with_name("theirs"))
        link.symlink_to(fresh.with_name("theirs"))
        link.rename(fresh)
        caplog.clear()
        native.load.cache_clear()
        assert native.library("allocator") is not None
        assert any("belongs to user" in record.getMessage() for record in caplog.records)
