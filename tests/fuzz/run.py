"""Fuzzes the command line and the Python API:
python tests/fuzz/run.py --cases 20000 [--kind row] [--json FILE]

Cases are drawn by Hypothesis's strategies, each from a seed of its own, in batches, each batch in a
fork of this process, so that a crash ends one batch and is counted. `--case NUMBER` runs one again.
Prints how cases ended, by kind, where errors were raised, how many reached a training step,
and every fault. Ends with 1 if there is a fault: an exception that is not ours, a hang, a crash, an
error without a place, a control character in the output, or a user's file changed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

BATCH = 500
"""Cases of one process."""


def planned(number: int, kind: str | None, count: int) -> list[tuple[str, str | None]]:
    """The seed and kind of each case of a batch.

    The batch is of one kind, of any (None), or of several as `recipe:60,row:20` says.

    Seeds are counted within a kind: `--case SEED --kind KIND` gives the same case.
    """
    counts = [(kind, count)]
    if kind is not None and ":" in kind:
        counts = [
            (name, int(cases)) for name, cases in (part.split(":") for part in kind.split(","))
        ]
    return [(f"{number}-{place}", name) for name, cases in counts for place in range(cases)]


def forked(act: Callable[[], None], output: Path) -> int:
    """Calls `act` in a fork that prints to a file; its exit code, negative where a signal ended it.

    The fork has imported what its parent has, so that in a test it starts at once.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for place in (1, 2):
                os.dup2(descriptor, place)
            sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = os.fdopen(
                2, "w", buffering=1, errors="backslashreplace", closefd=False
            )
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def prepared(start: Path) -> None:
    """Makes the folder that every batch begins with."""
    from tests.fuzz.harness import Workplace

    Workplace(start).prepare()


def batch(number: int, count: int, kind: str | None, start: Path, log: Path) -> None:
    """Draws and runs `count` cases.

    Each is written to the log before it runs, and its outcome after.

    `start` is a workplace's folder that was prepared before.
    """
    from tests.fuzz.harness import Workplace, limits
    from tests.fuzz.strategies import drawn

    with tempfile.TemporaryDirectory() as folder, limits():
        shutil.copytree(start, folder, symlinks=True, dirs_exist_ok=True)
        workplace = Workplace(Path(folder))
        with log.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for place, (seed, one_kind) in enumerate(planned(number, kind, count)):
                case = drawn(seed, one_kind)
                file.write(json.dumps({"case": f"{seed}: {case!r}"}) + "\n")
                file.flush()
                began = time.perf_counter()
                outcome = workplace.run(case)
                line = asdict(outcome) | {"seconds": time.perf_counter() - began}
                file.write(json.dumps(line) + "\n")
                file.flush()
                if place in (10, 50):
                    # The libraries' objects stay: every run's own collection would go through
                    # millions of them.
                    gc.collect()
                    gc.freeze()


def outcomes(log: Path, code: int) -> list[dict[str, Any]]:
    """The outcomes of a batch's log; a case without one crashed its process."""
    results: list[dict[str, Any]] = []
    case = None
    for line in log.read_text(errors="replace").splitlines():
        entry = json.loads(line)
        if "case" in entry:
            case = entry["case"]
        else:
            results.append(entry | {"case": case})
            case = None
    if case is not None:
        kind = case.partition("kind='")[2].partition("'")[0]
        fault = f"the process ended with {code} in this case"
        results.append(
            {
                "kind": kind,
                "ended": "crash",
                "site": "",
                "message": "",
                "steps": 0,
                "fault": fault,
                "case": case,
                "seconds": 0,
            }
        )
    return results


def report(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of all outcomes, which is printed and saved."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    sites: Counter[str] = Counter()
    examples: dict[str, str] = {}
    seconds: Counter[str] = Counter()
    faults: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_kind[result["kind"]]["cases"] += 1
        seconds[result["kind"]] += result["seconds"]
        by_kind[result["kind"]][result["ended"]] += 1
        by_kind[result["kind"]]["reached a training step"] += result["steps"] > 0
        if result["site"] and result["ended"] not in ("traceback", "hangs"):
            sites[f"{result['ended']} {result['site']}"] += 1
            examples[f"{result['ended']} {result['site']}"] = result["message"][:200]
        if result["fault"]:
            last = (
                result["fault"].strip().splitlines()[-1]
                if result["ended"] == "traceback"
                else result["fault"]
            )
            faults[f"{result['ended']} {result['site']}: {last[:120]}"].append(result)
    total = Counter[str]()
    for counts in by_kind.values():
        total.update(counts)
    return {
        "total": dict(total),
        "by_kind": {kind: dict(counts) for kind, counts in sorted(by_kind.items())},
        "seconds": {kind: round(value, 1) for kind, value in seconds.items()},
        "raised_at": {name: [count, examples[name]] for name, count in sites.most_common()},
        "faults": {
            name: {
                "count": len(each),
                "case": min((one["case"] for one in each), key=len)[:3000],
                "fault": each[0]["fault"],
            }
            for name, each in sorted(faults.items(), key=lambda item: -len(item[1]))
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all batches; 1 if a case found a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kind",
        help="cases of one kind only, or so many of each, as recipe:60,row:20, in one batch",
    )
    parser.add_argument("--case", help="run one case again and print how it ended")
    parser.add_argument("--json", type=Path, help="save the report")
    options = parser.parse_args(arguments)
    if options.case:
        from tests.fuzz.harness import Workplace
        from tests.fuzz.strategies import drawn

        with tempfile.TemporaryDirectory() as folder:
            workplace = Workplace(Path(folder))
            workplace.prepare()
            case = drawn(options.case, options.kind)
            print(case)
            print(json.dumps(asdict(workplace.run(case)), indent=1).replace("\\n", "\n"))
        return 0
    results: list[dict[str, Any]] = []

    def one(number: int) -> list[dict[str, Any]]:
        log = Path(folder) / f"{number}.jsonl"
        count = min(BATCH, options.cases - number * BATCH)
        seed = options.seed * 100_000 + number
        code = forked(
            lambda: batch(seed, count, options.kind, Path(folder) / "start", log),
            log.with_suffix(".out"),
        )
        results = outcomes(log, code) if log.is_file() else []
        if code and not any(each["ended"] == "crash" for each in results):
            print(log.with_suffix(".out").read_text()[-3000:], file=sys.stderr)
            raise SystemExit(f"batch {number} ended with {code}: a fault of the fuzzer's")
        return results

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        output = Path(folder) / "prepared.out"
        if forked(lambda: prepared(Path(folder) / "start"), output):
            raise SystemExit(f"the workplace could not be made: {output.read_text()[-3000:]}")
        for number, each in enumerate(pool.map(one, range(-(-options.cases // BATCH)))):
            results += each
            reached, wrong = (
                sum(r["steps"] > 0 for r in results),
                sum(bool(r["fault"]) for r in results),
            )
            print(
                f"batch {number}: {len(results)} cases, {reached} trained, {wrong} faults",
                file=sys.stderr,
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(report(results), indent=1))
    summary = report(results)
    print(json.dumps(summary, indent=1))
    return int(bool(summary["faults"]))


if __name__ == "__main__":
    sys.exit(main())
