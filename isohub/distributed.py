"""The same evaluations, comparisons and bisections on a Ray cluster: lanes on its nodes.

Rules:

1. A lane is an actor that holds a `Session` of its node: code and weights are in the node's own store, where a lock
   lets one process bring a commit, and environments are built once a node.
2. Ray places lanes by resources. A lane whose node or process is lost is placed again, and what it did is done again:
   results do not depend on where they come from.
3. What crosses between caller and nodes is pickled: the cluster is the caller's own, and trusted. What crosses between
   a worker and its node is what crosses everywhere in isohub: checked plain values. A repo's code runs confined on the
   node as it does here, and nothing that it says is unpickled on the way.

Side: caller, and the caller's own actors on other machines. Needs ``isohub[ray]``. Source: Ray's pages on actors' fault
tolerance, scheduling and resources (2.60).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from isohub.checking import checked_count
from isohub.errors import IsohubError, MissingExtraError, SessionClosedError
from isohub.execution.executor import LaneLostError, Place
from isohub.hub import Session, default_session

__all__ = ["RayExecutor"]

_T = TypeVar("_T")
_START_S = 60.0
_GRACE_S = 5.0
_CLOSE_S = 10.0
_LOOK_S = 1.0


class RayExecutor:
    """Lanes on the nodes of a Ray cluster.

    Args:
        address: Of the cluster, as ``ray.init`` takes it: ``auto``, ``host:port``, ``ray://host:port``. None: the one
            that this process is connected to already, or ``RAY_ADDRESS``.
        workers: How many lanes at most; None: as many as the cluster has room for.
        cpus: Cores of each lane: what its worker may use as threads, rounded down and at least one.
        gpus: GPUs of each lane; a fraction shares one.
        memory_bytes: Memory that each lane is placed by; None places by cores alone.
        resources: Custom resources that each lane needs.
        runtime_env: As Ray takes it, for nodes that lack isohub or a package.
        settings: Keywords of the `Session` that each lane opens on its node, such as ``offline`` or ``cache_dir``; a
            path is one of the node's.
        start_s: How long a lane may take to be placed and to start.
        session: Resolves references in this process; the default session unless given.

    Raises:
        MissingExtraError: Ray is not installed.
        IsohubError: There is no such cluster.
    """

    here = False

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        cpus: float = 1,
        gpus: float = 0,
        memory_bytes: int | None = None,
        resources: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        start_s: float = _START_S,
        session: Session | None = None,
    ) -> None:
        try:
            import ray  # noqa: PLC0415 - for who asks for it
        except ImportError as error:
            raise MissingExtraError(
                "ray is not installed", hint="python -m pip install 'isohub[ray]'", extra="ray"
            ) from error
        self._ray = ray
        self._workers = checked_count("workers", workers)
        if not cpus > 0 or gpus < 0:
            raise ValueError(f"cpus={cpus!r}, gpus={gpus!r}; expected cores above zero and no GPUs below")
        self._needs: dict[str, float] = {"CPU": cpus, "GPU": gpus, "memory": float(memory_bytes or 0)}
        self._needs.update(resources or {})
        self._threads = max(1, int(cpus))
        self._options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(resources or {})}
        if memory_bytes is not None:
            self._options["memory"] = memory_bytes
        if runtime_env is not None:
            self._options["runtime_env"] = dict(runtime_env)
        self._settings = dict(settings or {})
        self._start_s = start_s
        self.session = default_session() if session is None else session
        if not ray.is_initialized():
            # Workers' output is in isohub's own logs; the dashboard is the cluster's business.
            wanted = os.environ.get("RAY_ADDRESS", "auto") if address is None else address
            try:
                ray.init(address=wanted, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise IsohubError(
                    f"there is no Ray cluster at {wanted!r}: {error}",
                    hint="ray start --head makes one of this machine; RAY_ADDRESS or address= names another",
                ) from error

    def open(self, most: int | None) -> Sequence[_RayLane]:
        """As many lanes as there is room for now, each placed and started.

        Raises:
            IsohubError: There is room for none.
        """
        wanted = max(1, min(limit for limit in (most, self._workers, self._room()) if limit is not None))
        lanes = [
            _RayLane(self._ray, self._options, self._threads, self._settings, self._start_s) for _ in range(wanted)
        ]
        began = time.monotonic()
        self._ray.wait([lane.started for lane in lanes], num_returns=1, timeout=self._start_s)
        # Others use the cluster too: what is not placed about as soon as the first has no room.
        grace_s = max(_GRACE_S, time.monotonic() - began)
        done, _ = self._ray.wait([lane.started for lane in lanes], num_returns=len(lanes), timeout=grace_s)
        started = [lane for lane in lanes if lane.started in done and lane.ready()]
        for lane in lanes:
            if lane not in started:
                lane.stop()
        if not started:
            needs = ", ".join(f"{name} {count:g}" for name, count in self._needs.items() if count)
            raise IsohubError(
                f"the cluster placed no lane within {self._start_s:g} s; each needs {needs}",
                hint="ray status shows what is free",
            )
        return started

    def _room(self) -> int:
        """How many lanes the nodes hold, each on one of them, if nobody else used the cluster."""
        total = 0
        listing: Any = self._ray.nodes
        nodes: list[dict[str, Any]] = listing()
        for node in nodes:
            if node["Alive"]:
                has = node["Resources"]
                total += min(int(has.get(name, 0) // need) for name, need in self._needs.items() if need > 0)
        return total

    def share(self, value: Any) -> Any:
        """A reference to one copy of the value, which nodes fetch when they need it."""
        return _Shared(self._ray.put(value))

    def fits(self, size_bytes: int) -> bool:  # noqa: ARG002 - the protocol's
        """What has room was Ray's to say."""
        return True


class _Shared:
    """A value in Ray's object store, to be given to an actor in its place."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference


class _Slot:
    """Where a shared value goes among the arguments."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Host:
    """The actor: a session of this node, and the place of a lane."""

    def __init__(self, threads: int, settings: Mapping[str, Any]) -> None:
        self._session = Session(**settings)
        self._place = Place(self._session, threads)

    def ready(self) -> str:
        """Which node this is."""
        import ray  # noqa: PLC0415 - it has started this process

        return str(ray.get_runtime_context().get_node_id())

    def do(self, shipped: bytes, *shared: Any) -> Any:
        """Do a piece of work. Trust: the caller, whose own process this is."""
        import cloudpickle  # noqa: PLC0415 - as above

        work, args = cloudpickle.loads(shipped)
        return work(self._place, *(shared[each.number] if isinstance(each, _Slot) else each for each in args))

    def close(self) -> None:
        """End every worker."""
        self._session.close()


class _RayLane:
    """One actor at a time; another one after it was lost."""

    def __init__(
        self, ray: Any, options: Mapping[str, Any], threads: int, settings: Mapping[str, Any], start_s: float
    ) -> None:
        self._ray = ray
        self._options = options
        self.threads: int | None = threads
        self._settings = settings
        self._start_s = start_s
        self._lock = threading.Lock()
        self._stopped = False
        self._actor: Any = None
        #: Answers once the actor has started.
        self.started: Any = None
        self._place()

    def _place(self) -> None:
        # Neither Ray restarts it nor a task of it: what is lost is this lane's to know.
        actor = self._ray.remote(_Host).options(max_restarts=0, max_task_retries=0, **self._options)
        with self._lock:
            if not self._stopped:
                self._actor = actor.remote(self.threads, self._settings)
                self.started = self._actor.ready.remote()

    def ready(self) -> bool:
        """Whether there is an actor, placed again if need be; False if there is no room for it in time."""
        errors = self._ray.exceptions
        deadline = time.monotonic() + self._start_s
        while not self._stopped:
            if self._actor is None:
                self._place()
            try:
                self._ray.get(self.started, timeout=_LOOK_S)
            except errors.GetTimeoutError:
                if time.monotonic() > deadline:
                    self._end()
                    return False
            except (errors.RayActorError, errors.RuntimeEnvSetupError, errors.ObjectLostError):
                self._end()
                if time.monotonic() > deadline:
                    return False
                time.sleep(_LOOK_S)  # it ended as it began: a node that is going down
            else:
                return not self._stopped
        return False

    def do(self, work: Callable[..., _T], *args: Any) -> _T:
        """Do it there.

        Raises:
            LaneLostError: The actor or its node is gone; `ready` asks for another.
        """
        from isohub.session.arguments import pickled  # noqa: PLC0415 - torch comes with it

        actor = self._actor
        if self._stopped or actor is None:
            raise SessionClosedError("the lane was stopped")
        shared = [each.reference for each in args if isinstance(each, _Shared)]
        places = iter(range(len(shared)))
        plain = [_Slot(next(places)) if isinstance(each, _Shared) else each for each in args]
        errors = self._ray.exceptions
        try:
            given: _T = self._ray.get(actor.do.remote(pickled((work, plain)), *shared))
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Exception):
                raise cause from None
            raise
        except (errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError, errors.NodeDiedError) as error:
            if self._stopped:
                raise SessionClosedError("the lane was stopped") from None
            self._end()
            raise LaneLostError(f"a lane was lost: {str(error).partition(chr(10))[0]}") from None
        return given

    def stop(self) -> None:
        """End the actor, and with it its workers."""
        self._stopped = True
        self._end()

    def _end(self) -> None:
        with self._lock:
            actor, self._actor = self._actor, None
        if actor is not None:
            self._ray.kill(actor)  # its zygote sees that it is gone, and ends what is below

    def close(self) -> None:
        """End workers and actor."""
        actor = self._actor
        if not self._stopped and actor is not None:
            try:
                self._ray.get(actor.close.remote(), timeout=_CLOSE_S)
            except self._ray.exceptions.RayError:
                pass  # lost, or in the middle of something
        self.stop()
