"""Turns of a pipeline, and work in a thread of its own as an iterator."""

import gc
import threading
import time

import pytest

from lbdt.app.streaming import CancelledError, Turns, Waiting, check_wanted, stream, turns_of

PATIENCE = 10  # seconds that nothing here should need


def never() -> bool:
    return False


def test_events_come_in_order_and_the_end_ends_it():
    assert list(stream(lambda emit, stop: [emit(i) for i in range(5)], never)) == [0, 1, 2, 3, 4]


def test_an_error_of_the_work_is_raised_after_its_events():
    def work(emit, stop):
        emit("first")
        raise KeyError("why")

    events = stream(work, never)
    assert next(events) == "first"
    with pytest.raises(KeyError, match="why"):
        next(events)


def test_cancelled_work_ends_without_an_error():
    asked = iter([False, False, True])

    def work(emit, stop):
        for number in range(9):
            check_wanted(stop)
            emit(number)

    assert list(stream(work, lambda: next(asked))) == [0, 1]


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_an_iterator_that_is_left_cancels_and_waits_for_the_thread(how):
    ended = threading.Event()

    def work(emit, stop):
        emit(1)
        while not stop():
            time.sleep(0.001)
        ended.set()

    events = stream(work, never)
    assert next(events) == 1
    if how == "closed":
        events.close()
    else:
        del events
        gc.collect()
    assert ended.is_set()


def test_visitors_come_in_their_order_and_are_told_how_many_are_ahead():
    turns, order, told = Turns(), [], {name: [] for name in "abc"}
    may_leave, first_in = threading.Event(), threading.Event()

    def visit(name):
        with turns.turn(never, told[name].append):
            order.append(name)
            if name == "a":
                first_in.set()
                may_leave.wait(PATIENCE)

    threads = []
    for ahead, name in enumerate("abc"):
        threads.append(threading.Thread(target=visit, args=(name,)))
        threads[-1].start()
        first_in.wait(PATIENCE)
        until(lambda name=name, ahead=ahead: len(told[name]) == min(ahead, 1))
    may_leave.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert order == ["a", "b", "c"]
    assert (told["a"], told["b"]) == ([], [Waiting(1)])
    # The turn of b may be over before c looks.
    assert told["c"] in ([Waiting(2)], [Waiting(2), Waiting(1)])


def until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_one_who_waits_may_give_up_and_holds_nobody_up():
    turns = Turns()
    with turns.turn(never):
        with pytest.raises(CancelledError), turns.turn(lambda: True):
            pytest.fail("it was another's turn")
    with turns.turn(never):
        pass


def test_a_turn_ends_by_an_error_too():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn(never):
        1 / 0  # noqa: B018
    with turns.turn(never):
        pass


def test_a_pipeline_has_one_queue_while_it_lives():
    class Pipe:
        pass

    pipe = Pipe()
    assert turns_of(pipe) is turns_of(pipe) is not turns_of(Pipe())
