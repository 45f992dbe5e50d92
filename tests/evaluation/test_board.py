"""The board alone, with lanes that do nothing but take and answer."""

import random
import threading

import pytest

from isohub.evaluation.board import Board, Task


def board(refs=2, lanes=1, retries=1, window=4, fits=lambda size: True):
    return Board(refs, lanes, retries, window, fits)


def done(it, task, load_s=None, size=100):
    it.done(task, 0.01, load_s, size)


def test_one_lane_takes_ref_after_ref_and_lets_go_of_what_is_over():
    it = board()
    for number in range(3):
        it.offer(number, [0, 1], wait=False)
    it.complete()
    taken = []
    while (task := it.next(0)) is not None:
        taken.append(task)
        done(it, task, 0.1 if task.batch == 0 else None)
    assert taken == [Task(0, 0), Task(0, 1), Task(0, 2), Task(1, 0, (0,)), Task(1, 1), Task(1, 2)]
    assert it.finished


def test_a_stream_is_taken_batch_by_batch_by_refs_that_stay_loaded():
    it = board(window=2)
    it.offer(0, [0, 1], wait=True)
    it.offer(1, [0, 1], wait=True)
    taken = []
    for number in range(2, 6):
        for _ in range(2):
            task = it.next(0)
            taken.append(task)
            done(it, task, 0.1)
        if number == 2:
            continue
        it.offer(number - 1, [0, 1], wait=True)
    assert all(task.drop == () for task in taken)
    assert {task.ref for task in taken} == {0, 1}


def test_a_reader_waits_for_room():
    it = board(refs=1, window=2)
    offered = []

    def read():
        for number in range(4):
            it.offer(number, [0], wait=True)
            offered.append(number)

    thread = threading.Thread(target=read)
    thread.start()
    task = it.next(0)
    assert len(offered) <= 2
    done(it, task)
    while len(offered) < 4:
        done(it, it.next(0))
    thread.join()


def test_a_second_lane_helps_where_that_is_worth_a_load():
    it = board(refs=1, lanes=2)
    for number in range(1000):
        it.offer(number, [0], wait=False)
    it.complete()
    first = it.next(0)
    done(it, first, load_s=0.5)  # 999 * 0.01 s are left, which is more than the load
    assert it.next(1).ref == 0
    it = board(refs=1, lanes=2)
    for number in range(3):
        it.offer(number, [0], wait=False)
    it.complete()
    done(it, it.next(0), load_s=0.5)
    finished = threading.Thread(target=lambda: [done(it, it.next(0)), done(it, it.next(0))])
    finished.start()
    assert it.next(1) is None
    finished.join()


def test_a_ref_without_room_waits_for_those_that_run():
    it = board(refs=2, lanes=2, fits=lambda size: size < 50)
    it.offer(0, [0, 1], wait=False)
    it.complete()
    first = it.next(0)
    got = []
    waits = threading.Thread(target=lambda: got.append(it.next(1)))
    # Nothing is known of sizes before the first: the second lane may load.
    waits.start()
    waits.join(5)
    assert got[0].ref == 1
    it = board(refs=3, lanes=2, fits=lambda size: size < 50)
    it.offer(0, [0, 1, 2], wait=False)
    it.complete()
    done(it, it.next(0), 0.1, size=100)
    task = it.next(0)
    assert task == Task(1, 0, (0,))  # what it had was let go of
    assert first == Task(0, 0)


def test_failures_are_tried_again_and_refs_are_given_up():
    it = board(retries=2)
    it.offer(0, [0], wait=False)
    it.complete()
    tries = []
    while (task := it.next(0)) is not None:
        tries.append(it.failed(0, task, "batch", "Died", again=True, own=False))
    assert tries == [None, None, 3]

    it = board(refs=1, retries=1)
    for number in range(5):
        it.offer(number, [0], wait=False)
    it.complete()
    assert it.failed(0, it.next(0), "load", "E", again=True, own=False) is None
    assert it.failed(0, it.next(0), "load", "E", again=True, own=False) == 2
    assert it.next(0) is None
    assert it.offer(9, [0], wait=True) is False


def test_a_lane_that_cannot_load_what_others_have_leaves_it_to_them():
    it = board(refs=1, lanes=2, retries=0)
    for number in range(1000):
        it.offer(number, [0], wait=False)
    it.complete()
    done(it, it.next(0), load_s=0.1)
    held = it.next(0)
    other = it.next(1)
    assert it.failed(1, other, "load", "MemoryError", again=True, own=False) is None
    done(it, held)
    assert it.next(0).batch == other.batch


def test_a_lost_lane_s_task_goes_on_elsewhere():
    it = board(refs=1, lanes=2)
    it.offer(0, [0], wait=False)
    it.complete()
    assert it.lost(0, it.next(0))
    task = it.next(1)
    assert task == Task(0, 0)
    done(it, task)
    assert it.gone() == 1
    assert it.finished


@pytest.mark.parametrize("seed", range(20))
def test_every_task_is_done_once_whatever_fails(seed):
    draw = random.Random(seed)
    refs, lanes, count = draw.randint(1, 4), draw.randint(1, 4), draw.randint(0, 12)
    stream = draw.random() < 0.5
    it = board(refs, lanes, retries=3, window=2, fits=lambda size: draw.random() < 0.7)
    results, lock = [], threading.Lock()

    def serve(lane):
        while (task := it.next(lane)) is not None:
            roll = draw.random()
            if roll < 0.1:
                if not it.lost(lane, task):
                    results.append(task)
            elif roll < 0.2:
                if it.failed(lane, task, "batch", "E", again=True, own=draw.random() < 0.5) is not None:
                    results.append((task.ref, task.batch))
            else:
                done(it, task, 0.0)
                with lock:
                    results.append((task.ref, task.batch))

    threads = [threading.Thread(target=serve, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for number in range(count):
        assert it.offer(number, range(refs), wait=stream)
    it.complete()
    it.join()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert sorted(results) == sorted((ref, batch) for ref in range(refs) for batch in range(count))
