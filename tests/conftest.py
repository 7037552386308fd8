"""Fixtures of every test: its own caches, kernels, tiny recipes, and skips allowed by name."""

from __future__ import annotations

import gc
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_recipes import COMPILED, tiny_text, write_color_rows

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A progress bar has a thread, which a fork of the test's process would not have and might wait for.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Tiny models on many threads wait for each other: one thread is ten times faster on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where there is no GPU, torch looks for NVIDIA's library at each of a plan's operators: a fifth of
# its time.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

FROZEN_AFTER = (5, 20, 50, 100, 200, 400, 800)
"""After so many tests of a process more and more of the libraries are imported."""

# As the command line does: by Python's own thresholds the collector goes through the libraries'
# objects again and again while they are imported.
gc.set_threshold(50_000, 20, 50)

LONGEST = (
    "test_engines.py",
    "test_launchers.py",
    "test_fuzz.py",
    "test_compiling.py",
    "test_command_line_runs.py",
    "test_connectors_learn.py",
)
"""Files of the longest tests.

They come first, so that at the end no process of pytest-xdist is waited for that began one late.
"""

_begun, _ended = itertools.count(1), itertools.count(1)


# --- skips and kernels -------------------------------------------------------------------------

SKIPS = Path(__file__).with_name("skips.txt")
KERNEL_TESTS = "[kernels]"
"""What stands in skips.txt for all tests that use the fixture of that name."""
GPU_TESTS = "[gpu]"
"""What stands in skips.txt for all tests with the marker of that name."""

_unused: set[str] = set()
_kernel_tests: set[str] = set()
_gpu_tests: set[str] = set()


def allowed_skips() -> dict[str, str]:
    """The patterns of skips.txt, each with its reason."""
    lines = [line.strip() for line in SKIPS.read_text().splitlines()]
    entries = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    missing = [pattern for pattern, _, reason in entries if not reason.strip()]
    if missing:
        raise pytest.UsageError(f"{SKIPS.name}: no reason is given for {', '.join(missing)}")
    return {pattern: reason.strip() for pattern, _, reason in entries}


def matches(pattern: str, test: str) -> bool:
    """Whether an entry of skips.txt is about a test."""
    groups: dict[str, Collection[str]] = {KERNEL_TESTS: _kernel_tests, GPU_TESTS: _gpu_tests}
    if pattern in groups:
        return test in groups[pattern]
    # In fnmatch's own patterns the brackets of a test's parameters would be a set of characters.
    return fnmatchcase(test, pattern.replace("[", "[[]"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notes which tests use the kernels or a GPU and which entries of skips.txt are about none.

    It does so before any test is left out. The longest tests come first.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)
    _kernel_tests.update(item.nodeid for item in items if _uses_kernels(item))
    _gpu_tests.update(item.nodeid for item in items if item.get_closest_marker("gpu"))
    _unused.update(
        pattern
        for pattern in allowed_skips()
        if not any(matches(pattern, item.nodeid) for item in items)
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` where there is no GPU."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


def _uses_kernels(item: pytest.Item) -> bool:
    path = getattr(item, "callspec", None)
    return "kernels" in getattr(item, "fixturenames", ()) or (
        path is not None and path.params.get("either_path") == "kernels"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session that skipped what skips.txt does not list.

    Also one that saw all tests and found an entry about none.
    """
    config = session.config
    if (output := getattr(config, "workeroutput", None)) is not None:  # a worker of pytest-xdist
        output.update(
            unused=sorted(_unused),
            kernel_tests=sorted(_kernel_tests),
            gpu_tests=sorted(_gpu_tests),
        )
        return
    faults = skip_faults(config)
    if faults and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes what a worker of pytest-xdist noted."""
    noted = getattr(node, "workeroutput", {})
    _unused.update(noted.get("unused", ()))
    _kernel_tests.update(noted.get("kernel_tests", ()))
    _gpu_tests.update(noted.get("gpu_tests", ()))


def skip_faults(config: pytest.Config) -> list[str]:
    """Faults of the session's skips, a line each."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    patterns = allowed_skips()
    faults = [
        f"{report.nodeid} was skipped and is not in tests/{SKIPS.name}: "
        f"{report.longrepr[2] if report.longrepr else ''}"
        for report in skipped
        if not any(matches(pattern, report.nodeid) for pattern in patterns)
    ]
    if _sees_all(config):
        faults += [
            f"tests/{SKIPS.name} lists {pattern}, which is no test" for pattern in sorted(_unused)
        ]
    return faults


def _sees_all(config: pytest.Config) -> bool:
    """Whether all tests were collected: nothing narrower than the folder was asked for."""
    here = Path(__file__).parent
    paths = [Path(config.invocation_params.dir, argument).resolve() for argument in config.args]
    return (
        all(path in (here, here.parent) for path in paths)
        and not config.getoption("ignore")
        and not config.getoption("deselect")
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Counts the kernel tests that were collected and ran, by kernels.

    Says what is wrong with skips.
    """
    ran = Counter(
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "kernels"
    )
    if _kernel_tests:
        modes = ", ".join(f"{count} {mode}" for mode, count in sorted(ran.items())) or "none"
        terminalreporter.write_line(f"kernel tests: {len(_kernel_tests)} collected, ran: {modes}")
    for fault in skip_faults(config):
        terminalreporter.write_line(f"FAULT {fault}", red=True)


# --- fixtures ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all tests' caches: pytest looks through all of its own for a free number."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def private_cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of tests are their own, but for the parts in C++ and what inductor compiled.

    Either is named by what it was made of.
    """
    cache = caches / str(next(_begun))
    cache.mkdir(mode=0o700)
    COMPILED.mkdir(mode=0o700, exist_ok=True)
    (COMPILED / "inductor").mkdir(mode=0o700, exist_ok=True)
    (cache / "kernels").symlink_to(COMPILED)
    (cache / "compiled").symlink_to(COMPILED / "inductor")
    monkeypatch.setenv("VLM_TUNE_CACHE", str(cache))


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Excludes the libraries' objects, which stay, from garbage collection.

    Each end of training collects garbage.
    """
    yield
    if next(_ended) in FROZEN_AFTER:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """Restores the root logger's level: a command that a test calls sets its process's."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> str:
    """Lets a test run with the kernels, emulated where the CPU has no AMX; it is their mode."""
    from vlm_tune.kernels.cpu import native

    if native.compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("VLM_TUNE_KERNELS", "auto" if native.has_amx() else "emulate")
    mode = native.kernel_status().mode
    assert native.library(native.KERNELS) is not None
    record_property("kernels", mode)
    return mode


@pytest.fixture(params=["kernels", "reference"])
def either_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test run twice: with the kernels, and with plain torch."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")
    else:
        monkeypatch.setenv("VLM_TUNE_KERNELS", "reference")


@pytest.fixture
def color_rows(tmp_path: Path) -> Path:
    """The rows of `write_color_rows`."""
    return write_color_rows(tmp_path)


@pytest.fixture
def tiny_recipe(color_rows: Path, tmp_path: Path) -> Callable[..., str]:
    """Texts of `tiny_text` on `color_rows`."""

    def make(kind: str = "seq2seq", *, output: str = "run", precision: str = "fp32") -> str:
        return tiny_text(kind, color_rows, tmp_path / output, precision)

    return make
