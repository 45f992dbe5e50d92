"""Ray actors: the same model in an actor of a local cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import Absent, load_here

__all__ = ["RAY", "Actor", "Actors"]

RAY = "cloudpickle in both directions, so the caller unpickles; no confinement; a cluster's processes"

#: Of the object store: an argument and an answer of 38 MB, and those that wait to be thrown away.
_STORE_BYTES = 1 << 30


class Actors:
    """A cluster of one node on this machine, without a dashboard, ended with `close`.

    Args:
        directory: For its files. Its sockets are below, whose paths may have 107 bytes (unix(7)).
    """

    def __init__(self, directory: Path) -> None:
        try:
            import ray
        except ImportError as error:
            raise Absent(f"not installed: {error}") from error
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of what a later version does
        self._ray = ray
        try:
            ray.init(
                address="local",
                num_cpus=1,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_STORE_BYTES,
                _temp_dir=str(directory),
            )
        except Exception as error:
            raise Absent(f"no local cluster could be started: {type(error).__name__}: {error}") from error
        self._known = {process.pid for process in psutil.Process().children(recursive=True)} - before

    def rest(self) -> None:
        """Stop the cluster's processes (SIGSTOP): they are never quite idle, and would be in the way of others."""
        self._signal(signal.SIGSTOP)

    def begin(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.pid in self._known or process.ppid() in self._known:
                    self._known.add(process.pid)
                    process.send_signal(number)

    def close(self) -> None:
        """End the cluster and all of its processes."""
        self.begin()
        self._ray.shutdown()


class Actor:
    """One actor with one model."""

    def __init__(self, actors: Actors, hub: Path) -> None:
        ray = self._ray = actors._ray

        @ray.remote(num_cpus=0)
        class Holder:
            def load(self, hub: str, *args: Any) -> None:
                self.model = load_here(hub, *args)

            def call(self, x: Any) -> Any:
                import torch

                with torch.no_grad():
                    return self.model(x)

            def call_array(self, x: Any) -> Any:
                import torch

                # An array of Ray's is read-only, of which torch warns; `x * 2` does not write to it.
                return self.model(torch.frombuffer(x, dtype=torch.float32)).numpy()

        self._hub = str(hub)
        self._holder: Any = Holder.remote()

    def load(self, model: str, *args: Any) -> None:
        """``torch.hub.load`` there."""
        self._ray.get(self._holder.load.remote(self._hub, model, *args))

    def call(self, x: Any) -> Any:
        """One call with a tensor."""
        return self._ray.get(self._holder.call.remote(x))

    def call_array(self, x: Any) -> Any:
        """One call with an array: what Ray puts into shared memory without a copy of its own."""
        return self._ray.get(self._holder.call_array.remote(x))

    def close(self) -> None:
        """End its process."""
        self._ray.kill(self._holder)
        time.sleep(0.1)  # the kill is a message
