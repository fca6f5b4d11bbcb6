"""Which is faster for messages that are to be stored together: each by itself, all under way, or one atomic batch.

It depends on the server's disk and mode.  Where every message is synced, one costs 0.15 ms and a batch 2.7 ms, however
many it has; where the server syncs now and then, a message costs some 15 us and a batch as much as before.  Nothing
tells a client which it is, so it is learned from what was sent, and now and then something is sent singly to see.
"""

from __future__ import annotations

from typing import Final

from holdfast.schemas import limits

SINGLY_UP_TO: Final = 16
"""What is believed before anything was measured: so many messages singly take as long as a batch."""

_SINGLE_S: Final = 0.000_17
_BATCH_S: Final = 0.002_7
"""The same, of a disk that syncs in 0.1 ms."""

_IN_BATCH_S: Final = 0.000_01
"""What one more message costs a batch: the server's work, and ours."""

_LEAST: Final = 8
"""Fewer messages say more about the way to the server than about storing."""

_WEIGHT: Final = 0.2
_SINGLE_WEIGHT: Final = 0.5
"""Of the newest measurement; more of what is tried seldom."""

_SURPRISE: Final = 4.0
"""A measurement counts for so many times what was believed at most: what took long may have waited for something else,
and a disk that really is so slow shows it again."""

_FORGOTTEN: Final = 0.05
"""How much of what was learned of batches is forgotten with each lot that goes singly where a batch could have gone:
no batch is measured meanwhile, and one slow minute would decide for ever."""

TRY_MESSAGES: Final = 32
"""Most messages sent singly to learn what that costs: 5 ms where it is the slower way."""

_TRY_FIRST: Final = 4
_TRY_EVERY: Final = 128
"""Batches between two tries: they cost less than a hundredth."""


class Pace:
    """What was learned of one stream.  Its decisions are a function of what it was told.

    ``learns``: without it, what was believed first holds for good.  For messages that are to be stored in order: sent
    singly, one that is lost on its way would be stored behind those that followed it.
    """

    def __init__(self, *, learns: bool = True) -> None:
        self._learns = learns
        self._single_s = _SINGLE_S
        self._batch_s = _BATCH_S
        self._batches_left = _TRY_FIRST
        self._is_measured = False

    @property
    def singly_up_to(self) -> int:
        """How many messages at most are stored sooner singly than as a batch."""
        over_s = self._single_s - _IN_BATCH_S
        if over_s * limits.BATCH_MESSAGES <= self._batch_s:
            return limits.BATCH_MESSAGES
        return max(1, int(self._batch_s / over_s))

    @property
    def is_due(self) -> bool:
        """Whether it is time to send some messages singly that would make a batch."""
        return self._batches_left <= 0

    def together(self, waiting: int) -> int:
        """Returns how many of the messages that wait are to be sent together."""
        is_try = self.is_due and waiting > self.singly_up_to
        return min(waiting, TRY_MESSAGES if is_try else limits.BATCH_MESSAGES)

    def goes_singly(self, count: int) -> bool:
        """Whether so many messages are to be sent singly, not as a batch."""
        return count <= max(self.singly_up_to, TRY_MESSAGES if self.is_due else 0)

    def stored_singly(self, count: int, seconds: float) -> None:
        """Takes note of messages that were sent singly, all at once, and of how many were stored so."""
        if not self._learns:
            return
        self._batches_left = _TRY_EVERY if self.is_due else self._batches_left
        if count > SINGLY_UP_TO:
            self._batch_s += _FORGOTTEN * (_BATCH_S - self._batch_s)
        if count >= _LEAST:
            measured_s = seconds / count
            if self._is_measured:
                self._single_s += _SINGLE_WEIGHT * (_believable(measured_s, self._single_s, _SINGLE_S) - self._single_s)
            else:
                self._single_s, self._is_measured = measured_s, True  # what was believed is no measurement

    def stored_in_batch(self, count: int, seconds: float) -> None:
        """Takes note of a batch that was stored."""
        if not self._learns:
            return
        self._batches_left -= 1
        measured_s = max(0.0, seconds - count * _IN_BATCH_S)
        self._batch_s += _WEIGHT * (_believable(measured_s, self._batch_s, _BATCH_S) - self._batch_s)


def _believable(measured_s: float, believed_s: float, usual_s: float) -> float:
    return min(measured_s, _SURPRISE * max(believed_s, usual_s))
