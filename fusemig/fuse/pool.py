"""SleepPool: a few threads for the requests of one disk that may wait for its store; ExportPools: those of a disk.

Threads are started when a job finds none idle, up to a limit; what finds none waits its turn. The kernel bounds how
many requests a mount has, and so the queue. Jobs do not raise: the lane wraps them so that each answers its request.
The threads are daemons: a store that never answers must not keep the process from ending.
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from fusemig.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusemig.fuse.export import Export

IO_THREADS: Final = 8
"""Reads and writes of one disk that may sleep at a time."""
AWAY_THREADS: Final = 32
"""Requests of one disk that may wait for another host at a time, apart from the others: it may be out of reach."""
FLUSH_THREADS: Final = 2
"""Flushes of one disk that may sleep at a time, apart from the others: a flush may take long."""


class SleepPool:
    """A bounded pool of threads that may sleep."""

    def __init__(self, name: str, max_threads: int) -> None:
        """Make a pool without threads; ``name`` is what its threads are called."""
        self._name = name
        self._max_threads = max_threads
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._threads: list[threading.Thread] = []
        self._n_unfinished = 0
        self._is_closed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Have ``job`` run by a thread of the pool; quick, from any thread.

        Raises:
            StateError: the pool is closed.
        """
        with self._lock:
            if self._is_closed:
                raise StateError(f"{self._name} has ended")
            self._n_unfinished += 1
            if self._n_unfinished > len(self._threads) < self._max_threads:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._queue.put(job)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            finally:
                with self._lock:
                    self._n_unfinished -= 1

    def close(self) -> None:
        """Let the threads end when the jobs that were submitted are done; idempotent."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                for _ in self._threads:
                    self._queue.put(None)

    def join(self, deadline: float) -> bool:
        """Wait for the threads of a closed pool until ``deadline`` (`time.monotonic`); False if one is still busy."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


class ExportPools:
    """The threads of one export."""

    def __init__(self, export: Export) -> None:
        """Make its pools, without threads."""
        self._export = export
        self.io = SleepPool(f"lane-{export.name}-io", IO_THREADS)
        self.away = SleepPool(f"lane-{export.name}-away", AWAY_THREADS)
        self.flush = SleepPool(f"lane-{export.name}-flush", FLUSH_THREADS)
        # A file can be looked at though its reads all wait.
        self.stat = SleepPool(f"lane-{export.name}-stat", 1)

    def of_data(self, offset: int, length: int, *, is_write: bool) -> SleepPool:
        """Return the pool for a request about a range."""
        disk = self._export.disk
        return self.away if disk is not None and disk.waits_for_peer(offset, length, is_write=is_write) else self.io

    def close(self, deadline: float) -> bool:
        """End the threads; False if one is still busy at ``deadline`` (`time.monotonic`)."""
        self.io.close()  # first these two: their jobs submit flushes
        self.away.close()
        is_idle = self.io.join(deadline) and self.away.join(deadline)
        self.flush.close()
        self.stat.close()
        return self.flush.join(deadline) and self.stat.join(deadline) and is_idle
