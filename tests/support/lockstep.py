"""Calls that stop in the middle: what threads do to each other, one step at a time and the same in every run."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 30.0


class Lockstep:
    """A call in a thread of its own that runs only while the test waits for it.

    The call reaches `pause` where the test wants it to stop. At any moment either the test runs or one call does, so
    nothing depends on the scheduler.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        """Start ``call`` and return when it pauses or ends."""
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_over = False
        self._call = call
        self._test = threading.Semaphore(0)
        self._thread_may_run = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def _run(self) -> None:
        _current.step = self
        try:
            self.result = self._call()
        except BaseException as exc:
            self.error = exc
        self.is_over = True
        self._test.release()

    def _wait(self) -> None:
        if not self._test.acquire(timeout=DEADLINE_S):
            raise TimeoutError("a call neither paused nor ended")
        if self.is_over:
            self._thread.join(DEADLINE_S)

    def resume(self) -> bool:
        """Let the call go on; return when it pauses again or ends, and whether it has ended."""
        assert not self.is_over
        self._thread_may_run.release()
        self._wait()
        return self.is_over

    def finish(self) -> Any:
        """Let the call go on to its end; return its result or raise its error."""
        while not self.is_over:
            self.resume()
        if self.error is not None:
            raise self.error
        return self.result

    def pause_here(self) -> None:
        """Hand over to the test (called by the call)."""
        self._test.release()
        if not self._thread_may_run.acquire(timeout=DEADLINE_S):
            raise TimeoutError("the test never resumed this call")


class _Current(threading.local):
    step: Lockstep | None = None


_current = _Current()


def pause() -> None:
    """Stop the lockstep call that this is part of; nothing happens outside of one."""
    if _current.step is not None:
        _current.step.pause_here()
