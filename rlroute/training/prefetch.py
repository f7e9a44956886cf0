"""Batches cut ahead of the steps that take them, on another thread: reading shards from a disk then keeps no step
waiting.

Which batch a step sees is a function of the step alone, so that nothing depends on how far ahead they are cut. Copies
to a device are not this module's: :func:`rlroute.transfer.put` makes them from pinned memory, without waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from rlroute.errors import DataError
from rlroute.training.batches import Batch


class Batches:
    """The batches of a run.

    Args:
        cut: returns the batch of a step.
        ahead: how many are cut before they are wanted; 0: none, and there is no other thread.
    """

    def __init__(self, cut: Callable[[int], Batch], ahead: int) -> None:
        self._cut, self._ahead = cut, ahead
        self._pool: ThreadPoolExecutor | None = None
        self._begun: deque[tuple[int, Future[Batch]]] = deque()

    def take(self, step: int, steps: int) -> Batch:
        """Return the batch of a step, and have the next ones cut.

        Args:
            step: the step.
            steps: how many there are: none is cut beyond.

        Raises:
            DataError: it could not be read.
        """
        if not self._ahead:
            return self._cut(step)
        if not self._begun or self._begun[0][0] != step:
            self._forget()
        self._begin(step, min(steps, step + 1 + self._ahead))
        _, batch = self._begun.popleft()
        try:
            return batch.result()
        except OSError as error:
            raise DataError(f"the batch of step {step} cannot be read: {error.strerror or error}") from error

    def _begin(self, step: int, until: int) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "rlroute-batches")
        following = self._begun[-1][0] + 1 if self._begun else step
        for number in range(following, max(until, step + 1)):
            self._begun.append((number, self._pool.submit(self._cut, number)))

    def _forget(self) -> None:
        for _, batch in self._begun:
            batch.cancel()
        self._begun.clear()

    def close(self) -> None:
        """Let what is being cut end, and with it the thread."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
