"""Brake: who waits for what, in which order, and that nobody waits for ever."""

from __future__ import annotations

from functools import partial

import pytest

from fusemig.core.admission import TURN_S, Brake
from fusemig.core.mirror import Reach
from fusemig.core.tracker import ChunkTracker
from fusemig.core.units import BLOCK_SIZE, CHUNK_SIZE

SIZE = 4 * CHUNK_SIZE


def mirrored(reach: Reach = Reach.ALL) -> tuple[ChunkTracker, Brake]:
    """Return a tracker of which every chunk is mirrored, and its brake with a window of two blocks."""
    tracker = ChunkTracker(SIZE)
    tracker.begin_mirror(reach)
    brake = Brake(tracker, 0.0)
    brake.window_bytes = 2 * BLOCK_SIZE
    return tracker, brake


def write(tracker: ChunkTracker, brake: Brake, block: int) -> bool:
    """Write a block, if it is admitted."""
    if not brake.admit(block * BLOCK_SIZE, BLOCK_SIZE):
        return False
    tracker.mark(block * BLOCK_SIZE, BLOCK_SIZE)
    return True


def send(tracker: ChunkTracker, brake: Brake, chunk: int) -> None:
    """Send a chunk, and have it acknowledged."""
    tracker.take(chunk)
    brake.note_taken(chunk)
    tracker.acknowledge(chunk)
    brake.note_acknowledged(chunk)


def test_a_window_lets_so_much_be_missing_and_no_more() -> None:
    """What is acknowledged makes room."""
    tracker, brake = mirrored()
    assert [write(tracker, brake, block) for block in (0, 1, 300)] == [True, True, False]
    tracker.take(0)
    assert not write(tracker, brake, 300)  # in flight is missing too
    tracker.acknowledge(0)
    assert write(tracker, brake, 300)


def test_chunks_that_are_not_mirrored_are_free() -> None:
    """Cold ones are left alone; so is a disk without a window."""
    tracker, brake = mirrored(Reach.HOT)
    assert all(write(tracker, brake, block) for block in range(10))
    tracker, brake = mirrored()
    brake.window_bytes = None
    assert all(write(tracker, brake, block) for block in range(10))


def test_a_write_larger_than_the_window_has_its_turn_when_nothing_is_missing() -> None:
    """Else it would wait for ever."""
    tracker, brake = mirrored()
    assert write(tracker, brake, 0)
    assert not brake.admit(CHUNK_SIZE, 3 * BLOCK_SIZE)
    send(tracker, brake, 0)
    assert brake.admit(CHUNK_SIZE, 3 * BLOCK_SIZE)


def test_turns_are_given_in_the_order_of_arrival() -> None:
    """A later write neither overtakes those that wait nor takes a turn of theirs."""
    tracker, brake = mirrored()
    resumed: list[int] = []
    assert write(tracker, brake, 0)
    assert write(tracker, brake, 1)
    for block in (2, 3, 4):
        assert not write(tracker, brake, block)
        assert brake.wait(partial(resumed.append, block), block * BLOCK_SIZE, BLOCK_SIZE)
    assert not brake.due()
    send(tracker, brake, 0)
    for call in brake.due():
        call()
    assert resumed == [2, 3]
    assert not write(tracker, brake, 5)  # one waits, and the room is promised
    assert write(tracker, brake, 3)
    assert write(tracker, brake, 2)
    assert not write(tracker, brake, 2)  # a turn counts once
    assert brake.n_waiting == 1


def test_a_small_write_does_not_pass_a_large_one_that_waits_for_room() -> None:
    """Or small ones could keep it waiting until its deadline."""
    tracker, brake = mirrored()
    assert write(tracker, brake, 0)
    assert brake.wait(lambda: None, CHUNK_SIZE, 2 * BLOCK_SIZE)
    assert not write(tracker, brake, 1)  # for which there would be room
    send(tracker, brake, 0)
    assert len(brake.due()) == 1
    assert brake.admit(CHUNK_SIZE, 2 * BLOCK_SIZE)


def test_turns_that_nobody_takes_are_forgotten() -> None:
    """A write whose caller was killed does not keep its room for ever."""
    tracker, brake = mirrored()
    assert write(tracker, brake, 0)
    assert brake.wait(lambda: None, BLOCK_SIZE, 2 * BLOCK_SIZE)
    send(tracker, brake, 0)
    assert len(brake.due()) == 1
    assert not write(tracker, brake, 5)
    brake.advance(TURN_S + 0.1)
    assert write(tracker, brake, 5)


def test_a_given_up_write_is_not_resumed() -> None:
    """Giving up one that does not wait is harmless."""
    tracker, brake = mirrored()
    assert write(tracker, brake, 0)
    one = partial(pytest.fail, "resumed")
    assert brake.wait(one, CHUNK_SIZE, CHUNK_SIZE)
    brake.forget(one)
    brake.forget(one)
    send(tracker, brake, 0)
    assert not brake.due()


def test_a_reply_waits_for_a_read_that_began_after_the_write() -> None:
    """The acknowledgement of what was taken before it, or while it ran, is not enough."""
    tracker, brake = mirrored()
    brake.is_blocking = True
    answered: list[str] = []
    tracker.mark(0, BLOCK_SIZE)
    tracker.take(0)
    brake.note_taken(0)
    tracker.mark(0, BLOCK_SIZE)  # the write, and its second mark: it ended after the read had begun
    assert brake.hold(0, BLOCK_SIZE, lambda: answered.append("0"))
    tracker.acknowledge(0)
    brake.note_acknowledged(0)
    assert not brake.due()
    send(tracker, brake, 0)
    for call in brake.due():
        call()
    assert answered == ["0"]
    assert not brake.n_held


def test_a_reply_whose_blocks_were_taken_before_it_was_held_waits_for_that_acknowledgement_only() -> None:
    """A lane may be slow to ask; nobody may take the chunk again, so the reply would wait for ever."""
    tracker, brake = mirrored()
    brake.is_blocking = True
    tracker.mark(0, BLOCK_SIZE)
    tracker.take(0)
    brake.note_taken(0)
    assert brake.hold(0, BLOCK_SIZE, lambda: None)
    tracker.acknowledge(0)
    brake.note_acknowledged(0)
    assert len(brake.due()) == 1
    assert not brake.hold(0, BLOCK_SIZE, lambda: None)  # both sides have it


def test_a_reply_waits_for_every_chunk_of_its_write() -> None:
    """A write over two chunks is answered with the later one."""
    tracker, brake = mirrored()
    brake.is_blocking = True
    tracker.mark(CHUNK_SIZE - 1, 2)
    assert brake.hold(CHUNK_SIZE - 1, 2, lambda: None)
    send(tracker, brake, 1)
    assert not brake.due()
    send(tracker, brake, 0)
    assert len(brake.due()) == 1


def test_nothing_waits_longer_than_the_deadline() -> None:
    """Writes get their turn and replies are given, room or not."""
    tracker, brake = mirrored()
    brake.is_blocking = True
    assert write(tracker, brake, 0)
    assert brake.hold(0, BLOCK_SIZE, lambda: None)
    brake.advance(1.0)
    assert brake.wait(lambda: None, CHUNK_SIZE, CHUNK_SIZE)
    brake.advance(4.9)
    assert brake.longest_wait_s() == pytest.approx(4.9)
    assert not brake.late(5.0)
    brake.advance(5.1)
    assert len(brake.late(5.0)) == 1
    brake.advance(6.1)
    assert len(brake.late(5.0)) == 1
    assert brake.longest_wait_s() == 0
    assert brake.admit(CHUNK_SIZE, CHUNK_SIZE)


def test_release_lets_everything_go_once() -> None:
    """Whatever the state, and nothing waits afterwards."""
    tracker, brake = mirrored()
    brake.is_blocking = True
    assert write(tracker, brake, 0)
    assert brake.hold(0, BLOCK_SIZE, lambda: None)
    assert brake.wait(lambda: None, CHUNK_SIZE, CHUNK_SIZE)
    assert len(brake.release()) == 2
    assert not brake.release()
    assert (brake.n_waiting, brake.n_held) == (0, 0)
    assert brake.admit(CHUNK_SIZE, CHUNK_SIZE)
    assert not brake.hold(0, BLOCK_SIZE, lambda: None)


def test_a_rate_is_kept_and_a_large_write_pays_its_debt() -> None:
    """Bytes per second, in the order of arrival, with a small burst."""
    brake = Brake(ChunkTracker(SIZE), 0.0)
    brake.set_rate(100 * BLOCK_SIZE)
    n_written = n_waited = 0
    for step in range(1, 1001):
        brake.advance(step * 0.01)
        for call in brake.due():
            call()
            n_written += 1
            assert brake.admit(0, BLOCK_SIZE)
        while not n_waited or brake.n_waiting < 2:
            n_waited += 1
            if brake.admit(0, BLOCK_SIZE):
                n_written += 1
            else:
                assert brake.wait(lambda: None, 0, BLOCK_SIZE)
    assert 990 <= n_written <= 1010
    brake.set_rate(0)
    assert len(brake.due()) == 2


def test_with_a_window_and_a_rate_a_write_waits_for_both() -> None:
    """A throttled guest is not let go because its chunks are mirrored, nor mirrored without bounds."""
    tracker, brake = mirrored()
    brake.set_rate(100 * BLOCK_SIZE)
    assert not write(tracker, brake, 0)  # there is room, and nothing was saved up
    brake.advance(0.02)
    assert write(tracker, brake, 0)
    assert write(tracker, brake, 1)
    brake.advance(0.04)
    assert not write(tracker, brake, 2)  # the rate allows it, and there is no room
    assert brake.wait(lambda: None, 2 * BLOCK_SIZE, BLOCK_SIZE)
    assert not brake.due()
    send(tracker, brake, 0)
    assert len(brake.due()) == 1
    assert write(tracker, brake, 2)
    brake.set_rate(0)
    assert write(tracker, brake, 3)
    assert not write(tracker, brake, 4)  # the window is still there


def half_mirrored() -> tuple[ChunkTracker, Brake, list[str]]:
    """Return a tracker of which the first chunk is mirrored, its throttled brake with a full window, and who resumed.

    A write to that chunk waits for room, and another behind it for its turn.
    """
    tracker, brake = mirrored(Reach.HOT)
    tracker.mark(0, BLOCK_SIZE)
    send(tracker, brake, 0)
    brake.set_rate(100 * BLOCK_SIZE)
    brake.advance(1.0)
    resumed: list[str] = []
    assert write(tracker, brake, 0)
    assert write(tracker, brake, 1)
    assert brake.wait(partial(resumed.append, "mirrored"), 2 * BLOCK_SIZE, BLOCK_SIZE)
    assert brake.wait(partial(resumed.append, "behind it"), 3 * BLOCK_SIZE, BLOCK_SIZE)
    return tracker, brake, resumed


def give_turns(brake: Brake) -> None:
    """Resume those whose turn it is."""
    for call in brake.due():
        call()


def test_beside_a_rate_too_chunks_that_are_not_mirrored_need_no_room() -> None:
    """New writes, and those that wait for their rate, pass the ones that wait for the window, and keep their order."""
    tracker, brake, resumed = half_mirrored()
    assert brake.wait(partial(resumed.append, "1"), CHUNK_SIZE, 2 * BLOCK_SIZE)
    assert brake.wait(partial(resumed.append, "2"), 2 * CHUNK_SIZE, 2 * BLOCK_SIZE)
    brake.advance(1.01)
    assert not brake.admit(3 * CHUNK_SIZE, BLOCK_SIZE)  # those came before it
    give_turns(brake)
    assert resumed == ["1"]
    brake.advance(1.05)
    give_turns(brake)
    assert resumed == ["1", "2"]
    brake.advance(2.0)
    give_turns(brake)
    assert brake.admit(3 * CHUNK_SIZE, BLOCK_SIZE)
    assert brake.n_waiting == 2
    assert not write(tracker, brake, 4)  # of the mirrored chunk


def test_the_end_of_a_rate_lets_go_what_waited_for_it_alone() -> None:
    """Whoever waits for room before it."""
    _, brake, resumed = half_mirrored()
    assert brake.wait(partial(resumed.append, "cold"), CHUNK_SIZE, BLOCK_SIZE)
    brake.set_rate(0)
    give_turns(brake)
    assert resumed == ["cold"]


def test_who_waits_for_room_has_it_first_whoever_passed() -> None:
    """Turns of writes that need none take none, not even from one that waits until nothing is missing."""
    tracker, brake, resumed = half_mirrored()
    brake.release_waiting()
    assert brake.wait(partial(resumed.append, "large"), BLOCK_SIZE, 3 * BLOCK_SIZE)
    assert brake.wait(partial(resumed.append, "small"), CHUNK_SIZE, 2 * BLOCK_SIZE)
    brake.advance(1.1)
    give_turns(brake)
    assert resumed == ["small"]  # which does not take its turn
    assert brake.wait(partial(resumed.append, "another"), 2 * CHUNK_SIZE, 2 * BLOCK_SIZE)
    send(tracker, brake, 0)
    brake.advance(1.2)
    give_turns(brake)
    assert resumed == ["small", "large"]
    brake.advance(1.3)
    give_turns(brake)
    assert resumed == ["small", "large", "another"]


@pytest.mark.parametrize("rate", [0.0, 100.0 * BLOCK_SIZE])
def test_no_write_passes_another_to_the_same_place(rate: float) -> None:
    """One that is mirrored in a part only waits with all of it."""
    tracker, brake, resumed = half_mirrored()
    brake.release_waiting()
    brake.set_rate(rate)
    brake.advance(2.0)
    assert brake.wait(partial(resumed.append, "over both"), CHUNK_SIZE - BLOCK_SIZE, 2 * BLOCK_SIZE)
    assert brake.admit(CHUNK_SIZE + BLOCK_SIZE, BLOCK_SIZE)
    assert not brake.admit(CHUNK_SIZE, BLOCK_SIZE)
    assert brake.wait(partial(resumed.append, "later"), CHUNK_SIZE, BLOCK_SIZE)
    give_turns(brake)
    assert resumed == []
    send(tracker, brake, 0)
    for now in (2.1, 2.2):
        brake.advance(now)
        give_turns(brake)
    assert resumed == ["over both", "later"]


def test_a_write_whose_chunk_is_mirrored_no_more_waits_for_no_room() -> None:
    """As a new one would not."""
    tracker, brake, resumed = half_mirrored()
    tracker.mark_chunks(0, 1)
    brake.advance(1.1)
    give_turns(brake)
    assert resumed == ["mirrored", "behind it"]
