"""Which messages go singly and which as a batch: learned from what the server took for either."""

from __future__ import annotations

from holdfast.schemas import limits
from holdfast.streams.pacing import SINGLY_UP_TO, TRY_MESSAGES, Pace


def told(*, single_s: float, batch_s: float, rounds: int = 60) -> Pace:
    """A pace after 64 messages were stored in batches, and some singly whenever it was time to try."""
    pace = Pace()
    for _ in range(rounds):
        if pace.is_due:
            pace.stored_singly(TRY_MESSAGES, TRY_MESSAGES * single_s)
        else:
            pace.stored_in_batch(64, batch_s + 64 * 0.000_01)
    return pace


def test_before_anything_is_known_a_synced_disk_is_assumed() -> None:
    assert Pace().singly_up_to == SINGLY_UP_TO


def test_where_each_message_is_synced_many_go_as_a_batch() -> None:
    assert 8 <= told(single_s=0.000_15, batch_s=0.002_7).singly_up_to <= 32


def test_where_the_server_syncs_now_and_then_they_go_singly() -> None:
    assert told(single_s=0.000_015, batch_s=0.002_7).singly_up_to == limits.BATCH_MESSAGES


def test_a_slow_disk_favours_batches_even_for_a_few() -> None:
    # A batch syncs six times, whatever is in it.
    assert told(single_s=0.005, batch_s=0.030).singly_up_to <= SINGLY_UP_TO


def test_a_server_that_syncs_again_is_noticed_from_what_goes_singly() -> None:
    pace = told(single_s=0.000_015, batch_s=0.002_7)
    for _ in range(12):
        pace.stored_singly(64, 64 * 0.000_2)
    assert pace.singly_up_to < 64


def test_a_batch_that_took_long_once_does_not_have_all_sent_singly() -> None:
    """A disk that stood still for a second says nothing of the next batch."""
    pace = told(single_s=0.000_15, batch_s=0.002_7)
    pace.stored_in_batch(64, 1.0)
    assert pace.singly_up_to < 64


def test_a_time_of_slow_batches_is_forgotten_while_none_is_sent() -> None:
    """What goes singly tells nothing of batches: else one bad minute would decide for ever."""
    pace = told(single_s=0.000_15, batch_s=0.1)
    assert pace.singly_up_to > 64
    for _ in range(200):
        pace.stored_singly(64, 64 * 0.000_15)
    assert pace.singly_up_to < 64


def test_one_slow_message_by_itself_says_nothing() -> None:
    pace = Pace()
    pace.stored_singly(1, 5.0)
    assert pace.singly_up_to == SINGLY_UP_TO


def test_trying_is_rare_and_stops_batches_only_then() -> None:
    pace = Pace()
    tries = 0
    for _ in range(1_000):
        if pace.is_due:
            tries += 1
            pace.stored_singly(TRY_MESSAGES, 0.005)
        else:
            pace.stored_in_batch(64, 0.003)
    assert 1 <= tries <= 10


def test_a_try_that_told_nothing_is_not_repeated_at_once() -> None:
    pace = Pace()
    while not pace.is_due:
        pace.stored_in_batch(64, 0.003)
    pace.stored_singly(0, 0.001)
    assert (pace.is_due, pace.singly_up_to < limits.BATCH_MESSAGES) == (False, True)
