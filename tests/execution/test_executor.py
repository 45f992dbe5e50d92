import threading
import time

import pytest
import torch

import isohub
from isohub.errors import SessionClosedError
from isohub.execution.executor import LocalExecutor, cores
from isohub.execution.seats import seat_of, take_seat


def pid_of(place, seat):
    return next(take_seat(place, seat).remotes()).worker.pid


def call(place, seat):
    return take_seat(place, seat).built(torch.ones(1))


def test_lanes_share_the_cores():
    assert [lane.threads for lane in LocalExecutor().open(None)] == [1] * cores()
    assert [lane.threads for lane in LocalExecutor(1).open(None)] == [cores()]
    assert len(LocalExecutor(8).open(3)) == 3
    with isohub.Session(max_workers=2) as small:
        assert len(LocalExecutor(8, small).open(None)) == 2
    with pytest.raises(ValueError, match="workers"):
        LocalExecutor(0)


def test_each_lane_has_a_worker_of_its_own_which_ends_with_it(session, hub):
    executor = LocalExecutor(2, session)
    with session.load(hub("good"), "mlp") as mine:
        seat = seat_of(executor, session.fetch(hub("good")), 0, "mlp")
        lanes = executor.open(None)
        pids = [lane.do(pid_of, seat) for lane in lanes]
        assert [lane.do(pid_of, seat) for lane in lanes] == pids
        assert len({*pids, mine._isohub.worker.pid}) == 3
        for lane in lanes:
            lane.close()
        assert [each.pid for each in session.workers()] == [mine._isohub.worker.pid]


def test_a_replica_is_the_session_and_closes_nothing(session, hub):
    one, other = session.replica(1), session.replica(2)
    with one.load(hub("good"), "mlp") as a, other.load(hub("good"), "mlp") as b, one.load(hub("good"), "mlp") as c:
        assert a._isohub.worker is c._isohub.worker is not b._isohub.worker
        one.close()
        assert {each.pid for each in session.workers()} >= {a._isohub.worker.pid, b._isohub.worker.pid}
    with pytest.raises(ValueError, match="number"):
        session.replica(-1)
    closed = isohub.Session()
    replica = closed.replica(1)
    closed.close()
    with pytest.raises(SessionClosedError):
        replica.load(hub("good"), "mlp")


def test_a_lane_that_waits_for_its_worker_can_be_stopped(session, hub):
    executor = LocalExecutor(1, session)
    (lane,) = executor.open(None)
    seat = seat_of(executor, session.fetch(hub("sleeps_in_call")), 0, "model")
    lane.do(pid_of, seat)
    threading.Timer(0.2, lane.stop).start()
    began = time.monotonic()
    with pytest.raises(SessionClosedError, match="stopped"):
        lane.do(call, seat)
    assert time.monotonic() - began < 20
    with pytest.raises(SessionClosedError):
        lane.do(call, seat)
    assert not lane.ready()
    lane.close()
    assert seat.commit not in {each.commit for each in session.workers()}
