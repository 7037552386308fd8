"""Keeps processes that train together from waiting for ever: each says where it is, so that a lost one can be named."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator

from vlm_tune.errors import EXIT_TRAINING, TrainingError
from vlm_tune.quoting import reason_of

GRACE = 30.0
"""Seconds after which a process ends that its collective still holds although the others are known to be lost."""


_NOTHING: dict[str, Any] = {"place": "the start", "count": -1, "reached": [0, 0, 0]}


@dataclass
class _Seen:
    """What was last heard of a process, and when it was new."""

    said: dict[str, Any]
    alive: float
    moved: float


class Watch:
    """Says in the processes' common store where this one is, and looks where the others are when it waits too long.

    `timeout` seconds without any progress of any process, or without a sign of life of one, end this process.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        self.rank = accelerator.process_index
        self.ranks = accelerator.num_processes
        self.timeout = timeout
        self.interval = min(2.0, timeout / 20)
        self._place = "the start"
        self._count = 0
        self._since = time.monotonic()
        self._guarding = False
        self._stage = 0
        self._reached = (0, 0)
        self._failure: str | None = None
        self._diagnosis: str | None = None
        self._seen: dict[int, _Seen] = {}
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._store: Any = None

    def __enter__(self) -> Watch:
        if self.ranks > 1:
            from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

            self._store = PrefixStore("vlm_tune", _get_default_store().clone())
            self._store.set_timeout(timedelta(seconds=max(self.interval, 5.0)))
            # At once, so that even a process which dies in its first second can be named.
            with suppress(RuntimeError):
                self._say(0)
            threading.Thread(target=self._beat, name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        self._ended.set()
        if self._store is not None:
            self._failure = (
                f"{type(error).__name__}: {reason_of(error)}" if error is not None else None
            )
            with suppress(RuntimeError):
                self._say(-1)

    def at(self, place: str, reached: tuple[int, int] | None = None) -> None:
        """Notes where this process is; `reached` is how far that is: the step, and the phase of it in the order they are done."""
        self._place = place
        self._count = self._count + 1
        self._since = time.monotonic()
        self._reached = reached or self._reached

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Meanwhile `at` is called often, so that its silence means that something is stuck."""
        self._since = time.monotonic()
        self._guarding = True
        self._stage = self._stage + 1
        self._reached = (0, 0)
        try:
            yield
        finally:
            self._guarding = False

    def lost(self, error: BaseException) -> TrainingError | None:
        """The error that names the processes which a failed collective waited for; None if it was none."""
        text = str(error)
        if self._store is None or not (
            isinstance(error, torch.distributed.DistError)
            or "gloo" in text.lower()
            or "NCCL" in text
        ):
            return None
        for _ in range(12):
            if self._diagnosis is not None:
                break
            self._look()
            if found := self._failed() or self._silent(3 * self.interval):
                return TrainingError(f"{found}; {self._kept()}")
            time.sleep(self.interval / 2)
        late = re.search(r"tim(e|ed)[ -]?out", text, re.IGNORECASE)
        reason = self._diagnosis or (
            self._places() if late else "the processes could not exchange tensors"
        )
        return TrainingError(f"{reason}; {self._kept()} ({reason_of(error)})")

    # --- the thread that looks ---

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(self.interval):
            number += 1
            # Where the store is gone the collectives will fail, and tell.
            with suppress(RuntimeError):
                self._say(number)
            if self._guarding:
                self._judge(time.monotonic() - self._since)

    def _judge(self, still: float) -> None:
        """Ends this process where others are lost and it did not move for `still` seconds."""
        if still <= 2 * self.interval:
            self._diagnosis = None  # it was slow, and not stuck
            return
        with suppress(RuntimeError):
            self._look()
        if self._diagnosis is None:
            gone = self._failed() or (self._silent(self.timeout) if still > self.timeout else None)
            if gone is None and still > 0.95 * self.timeout and not self._others_move():
                gone = self._places()
            if gone is not None:
                self._diagnosis = gone
                self._told_at = time.monotonic()
                print(f"rank {self.rank}: {gone}", file=sys.stderr, flush=True)
        elif time.monotonic() - self._told_at > GRACE:
            print(
                f"rank {self.rank}: still waiting after that, leaving; {self._kept()}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_TRAINING)

    def _say(self, beat: int) -> None:
        who = {"pid": os.getpid(), "host": socket.gethostname(), "failure": self._failure}
        with self._lock:
            self._store.set(str(self.rank), json.dumps({**self._own(), "beat": beat, **who}))

    def _own(self) -> dict[str, Any]:
        return {
            "place": self._place,
            "count": self._count,
            "reached": [self._stage, *self._reached],
        }

    def _look(self) -> None:
        """Reads what all others said last."""
        now = time.monotonic()
        for rank in range(self.ranks):
            if rank == self.rank:
                continue
            try:
                with self._lock:
                    said = (
                        json.loads(self._store.get(str(rank)))
                        if self._store.check([str(rank)])
                        else _NOTHING
                    )
            except RuntimeError:
                said = self._seen[rank].said if rank in self._seen else _NOTHING
            before = self._seen.get(rank)
            if before is None:
                self._seen[rank] = _Seen(said, now, now)
            elif said != before.said:
                moved = now if said["count"] != before.said["count"] else before.moved
                self._seen[rank] = _Seen(said, now, moved)

    # --- what is known ---

    def _failed(self) -> str | None:
        told = [
            f"rank {rank} ended: {seen.said['failure']}"
            for rank, seen in sorted(self._seen.items())
            if seen.said.get("failure")
        ]
        return "; ".join(told) or None

    def _silent(self, seconds: float) -> str | None:
        now = time.monotonic()
        told = [
            f"rank {rank} (process {seen.said.get('pid', '?')} on {seen.said.get('host', '?')}) is lost: it gives no sign of life, "
            f"last at {seen.said['place']}"
            for rank, seen in sorted(self._seen.items())
            if now - seen.alive > seconds
        ]
        return "; ".join(told) or None

    def _others_move(self) -> bool:
        return any(
            time.monotonic() - seen.moved < 0.9 * self.timeout for seen in self._seen.values()
        )

    def _places(self) -> str:
        """Who is where, the least advanced first: the others wait for those."""
        places: dict[tuple[tuple[int, ...], str], list[int]] = defaultdict(list)
        for rank, said in sorted(
            {
                **{rank: seen.said for rank, seen in self._seen.items()},
                self.rank: self._own(),
            }.items()
        ):
            places[tuple(said["reached"]), said["place"]].append(rank)
        told = [
            f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} at {place}"
            for (_, place), ranks in sorted(places.items())
        ]
        return f"no progress for {self.timeout:g} s (train.timeout), the least advanced first: {'; '.join(told)}"

    def _kept(self) -> str:
        return "finished checkpoints are kept: --resume"
