"""Watches processes that train together, so that a lost one is named instead of waited for.

Each process publishes where it is in a common store.
"""

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

from vlm_tune.compat import default_store
from vlm_tune.errors import EXIT_TRAINING, TrainingError
from vlm_tune.quoting import reason_of

GRACE = 30.0
"""Seconds after which a process ends that hangs in a collective with ranks known to be lost."""


_NOTHING: dict[str, Any] = {"place": "the start", "count": -1, "reached": [0, 0, 0]}


@dataclass
class _Peer:
    """The last status of another process.

    `alive` is when the status last changed, `moved` when the process last made progress.
    """

    status: dict[str, Any]
    alive: float
    moved: float


class Watch:
    """Publishes this process's place in a common store, and reads the others' if it waits too long.

    The process is ended after `timeout` seconds without progress of any process, or without a sign
    of life of one.
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
        self._peers: dict[int, _Peer] = {}
        self._looked_at = time.monotonic()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._store: Any = None

    def __enter__(self) -> Watch:
        if self.ranks > 1:
            from torch.distributed.distributed_c10d import PrefixStore

            self._store = PrefixStore("vlm_tune", default_store().clone())
            self._store.set_timeout(timedelta(seconds=max(self.interval, 5.0)))
            # At once, so that even a process which dies in its first second can be named.
            with suppress(RuntimeError):
                self._publish(0)
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
                self._publish(-1)

    def at(self, place: str, reached: tuple[int, int] | None = None) -> None:
        """Sets where this process is.

        `reached` says how far that is: the step, and its phase by the order in which phases are
        done.
        """
        self._place = place
        self._count = self._count + 1
        self._since = time.monotonic()
        self._reached = reached or self._reached

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """A block in which `at` is called often, so that silence means a hang."""
        self._since = time.monotonic()
        self._guarding = True
        self._stage = self._stage + 1
        self._reached = (0, 0)
        try:
            yield
        finally:
            self._guarding = False

    def lost(self, error: BaseException) -> TrainingError | None:
        """The error that names the processes which a failed collective waited for.

        None if `error` is not a collective's.
        """
        # Gloo, and NCCL beneath a compiled graph, raise a plain `RuntimeError`.
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
            if gone := self._failed() or self._silent(3 * self.interval):
                return TrainingError(f"{gone}; {self._resume_hint()}")
            time.sleep(self.interval / 2)
        late = re.search(r"tim(e|ed)[ -]?out", text, re.IGNORECASE)
        reason = self._diagnosis or (
            self._places() if late else "the processes could not exchange tensors"
        )
        return TrainingError(f"{reason}; {self._resume_hint()} ({reason_of(error)})")

    # --- the watching thread ---

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(self.interval):
            number += 1
            # If the store is gone, the collectives will fail with an error.
            with suppress(RuntimeError):
                self._publish(number)
            if self._guarding:
                self._judge(time.monotonic() - self._since)

    def _judge(self, still: float) -> None:
        """Ends this process if others are lost and it has not moved for `still` seconds."""
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
                self._diagnosed_at = time.monotonic()
                print(f"rank {self.rank}: {gone}", file=sys.stderr, flush=True)
        elif time.monotonic() - self._diagnosed_at > GRACE:
            print(
                f"rank {self.rank}: still waiting after that, exiting; {self._resume_hint()}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_TRAINING)

    def _publish(self, beat: int) -> None:
        who = {"pid": os.getpid(), "host": socket.gethostname(), "failure": self._failure}
        with self._lock:
            self._store.set(str(self.rank), json.dumps({**self._status(), "beat": beat, **who}))

    def _status(self) -> dict[str, Any]:
        return {
            "place": self._place,
            "count": self._count,
            "reached": [self._stage, *self._reached],
        }

    def _look(self) -> None:
        """Reads the last published status of all other processes."""
        now = self._looked_at = time.monotonic()
        for rank in range(self.ranks):
            if rank == self.rank:
                continue
            try:
                with self._lock:
                    status = (
                        json.loads(self._store.get(str(rank)))
                        if self._store.check([str(rank)])
                        else _NOTHING
                    )
            except RuntimeError:
                status = self._peers[rank].status if rank in self._peers else _NOTHING
            before = self._peers.get(rank)
            if before is None:
                self._peers[rank] = _Peer(status, now, now)
            elif status != before.status:
                moved = now if status["count"] != before.status["count"] else before.moved
                self._peers[rank] = _Peer(status, now, moved)

    # --- diagnosis ---

    def _failed(self) -> str | None:
        lines = [
            f"rank {rank} ended: {peer.status['failure']}"
            for rank, peer in sorted(self._peers.items())
            if peer.status.get("failure")
        ]
        return "; ".join(lines) or None

    def _silent(self, seconds: float) -> str | None:
        """The processes whose status had not changed for `seconds` at the last look.

        Not until now: this process may have been paused since.
        """
        lines = [
            f"rank {rank} (process {peer.status.get('pid', '?')} on "
            f"{peer.status.get('host', '?')}) is lost: no sign of life since "
            f"{peer.status['place']}"
            for rank, peer in sorted(self._peers.items())
            if self._looked_at - peer.alive > seconds
        ]
        return "; ".join(lines) or None

    def _others_move(self) -> bool:
        return any(
            time.monotonic() - peer.moved < 0.9 * self.timeout for peer in self._peers.values()
        )

    def _places(self) -> str:
        """The place of every rank, the least advanced first: the others wait for those."""
        places: dict[tuple[tuple[int, ...], str], list[int]] = defaultdict(list)
        for rank, status in sorted(
            {
                **{rank: peer.status for rank, peer in self._peers.items()},
                self.rank: self._status(),
            }.items()
        ):
            places[tuple(status["reached"]), status["place"]].append(rank)
        lines = [
            f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} at {place}"
            for (_, place), ranks in sorted(places.items())
        ]
        return (
            f"no progress for {self.timeout:g} s (train.timeout), the least advanced first: "
            f"{'; '.join(lines)}"
        )

    def _resume_hint(self) -> str:
        return "finished checkpoints are kept: --resume"
