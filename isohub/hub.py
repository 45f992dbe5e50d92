"""The one place where the parts are put together: which code, on what, confined how, asked what.

`Session` holds a caller's workers; the module's functions are those of a default session and carry
torch.hub's names and meanings. Side: caller.
"""

from __future__ import annotations

import builtins
import copy
import functools
import inspect as inspect_module
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, cast

from isohub.checking import (
    check_choice,
    check_name,
    check_path,
    checked_bytes,
    checked_count,
    checked_options,
    checked_seconds,
    checked_seed,
    checked_timeout,
    checked_trust,
    merged,
)
from isohub.environments.environment import Environment, checked_environment
from isohub.errors import ConfinementError, OfflineError, PolicyError, SessionClosedError, printable
from isohub.repos.catalog import Catalog, Wanted, is_offline
from isohub.repos.layout import get_dir, set_dir, weights_dir
from isohub.repos.pins import Checkout
from isohub.repos.reference import Reference, SourceName, parse
from isohub.sandbox.policy import DEFAULT_REQUIRED, NONE, Sandbox, checked_sandbox

if TYPE_CHECKING:
    from isohub.environments.prepare import Prepared
    from isohub.environments.store import InUse
    from isohub.repos.lockfile import Lockfile
    from isohub.repos.outline import Outline
    from isohub.repos.pins import Pin
    from isohub.repos.sources.commits import Commit
    from isohub.repos.trust import Trust
    from isohub.sandbox.hosts import HostPolicy
    from isohub.session.examination import Diagnosis
    from isohub.session.gate import ProgramGate
    from isohub.session.link import Link
    from isohub.session.pool import Pool, WhenFull
    from isohub.session.recipe import Recipe
    from isohub.session.supervisor import Worker
    from isohub.session.worker_info import WorkerInfo

__all__ = [
    "Session",
    "default_session",
    "doctor",
    "fetch",
    "get_dir",
    "help",
    "inspect",
    "list",
    "load",
    "set_dir",
    "trust",
    "trusted",
    "untrust",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

Returns = Literal["handle", "state_dict", "torchscript", "exported_program"]
RepoOrDir = str | os.PathLike[str] | Checkout
On = Environment | Literal["host", "auto"]

_WHEN_FULL = ("wait", "evict", "error")
_RETURNS = ("handle", "state_dict", "torchscript", "exported_program")
#: Of the user's: hosts of weights beside the well-known ones, such as a mirror.
_HOSTS_VARIABLE = "ISOHUB_DOWNLOAD_HOSTS"
#: torch.hub.load's own sources, and git for what is on another host.
_SOURCES = (None, "github", "git", "local")
#: The largest answer to a call. A model that returns more than this at once would not fit beside itself
#: and its copy in the 16 GiB that a common workstation has.
_MAX_REPLY_BYTES = 4 << 30


_log = logging.getLogger("isohub.hub")


def _also_called_github(method: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R]:
    """Take ``github=`` for ``repo=``, as torch.hub's `list` and `help` call it."""

    @functools.wraps(method)
    def function(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if "github" in kwargs:
            if args or "repo" in kwargs:
                raise TypeError(f"{method.__name__}() was given the repo twice, as repo and as github=")
            kwargs["repo"] = kwargs.pop("github")
        return method(self, *args, **kwargs)

    return cast("Callable[Concatenate[Any, _P], _R]", function)


class Session:
    """A caller's workers, zygotes, policy and directories.

    Handles live as long as their session. Thread-safe. A context manager; closing ends every process that
    the session started, and so does the end of the caller's process, whatever ends it.

    Args:
        cache_dir: Where checkouts and weights are kept; `get_dir()` unless given.
        offline: Use the cache alone: what is not in it is an `OfflineError`, and a ref means what it meant when
            its source was last asked. None: as ``ISOHUB_OFFLINE`` says.
        lockfile: Path of an ``isohub.lock``. What it names must come, bit for bit, else `LockMismatchError`; what
            it does not name yet is added to it.
        frozen: Add nothing to the lockfile: what it does not name is a `LockMismatchError`.
        submodules: Bring the submodules of every repo, at the commits that its tree names.
        lfs: Bring the files behind every repo's Git LFS pointers.
        sandbox: What workers may touch, unless `load` says otherwise; None is `Sandbox()`. "none" gives them the
            caller's own powers, and is for trusted repos alone.
        environment: What repos run on, unless `load` says otherwise: "host" (None), "auto", or an `Environment`.
        timeout_s: Seconds that any one question to a worker may take (an import, a build, a call), unless
            `load` says otherwise. None: no limit.
        max_reply_bytes: The most tensor bytes that the answer to one call may hold. State dicts are bounded by
            the machine's free memory instead.
        max_workers: The most workers at once; None: no limit. A worker is what one commit takes.
        when_full: What a load does that would need one more. "error": it raises. "wait": it waits until handles of
            other threads are closed, for `timeout_s` at most. "evict": it ends the worker that was idle for longest,
            whose handles then say so, or are built again if they were loaded with ``restart="on-death"``.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        offline: bool | None = None,
        lockfile: str | os.PathLike[str] | None = None,
        frozen: bool = False,
        submodules: bool = False,
        lfs: bool = False,
        sandbox: Sandbox | Literal["none"] | None = None,
        environment: On | None = None,
        timeout_s: float | None = None,
        max_reply_bytes: int = _MAX_REPLY_BYTES,
        max_workers: int | None = None,
        when_full: WhenFull = "error",
    ) -> None:
        for name, place in (("cache_dir", cache_dir), ("lockfile", lockfile)):
            check_path(name, place)
        self._cache_dir = None if cache_dir is None else Path(cache_dir).expanduser().absolute()
        check_choice("offline", offline, (None, True, False))
        for name, value in (("frozen", frozen), ("submodules", submodules), ("lfs", lfs)):
            check_choice(name, value, (True, False))
        self._offline = offline
        if frozen and lockfile is None:
            raise ValueError("frozen=True says that a lockfile binds; give lockfile='isohub.lock'")
        self._lockfile: Lockfile | None = None
        if lockfile is not None:
            from isohub.repos.lockfile import Lockfile

            self._lockfile = Lockfile(Path(lockfile).expanduser().absolute(), frozen=frozen)
        self._submodules = submodules
        self._lfs = lfs
        self._sandbox: Sandbox | str = checked_sandbox(sandbox) or Sandbox()
        self._environment = checked_environment(environment) or Environment("host")
        self._in_use: InUse | None = None
        self._prepared_for: dict[tuple[Environment, Path, str], Prepared] = {}
        self._timeout_s = checked_timeout(timeout_s)
        self._max_reply_bytes = checked_bytes(max_reply_bytes)
        self._max_workers = checked_count("max_workers", max_workers)
        check_choice("when_full", when_full, _WHEN_FULL)
        self._when_full: WhenFull = when_full
        self._pool: Pool | None = None
        self._pool_lock = threading.Lock()
        self._closed = False
        self._replica = 0
        self._precompiled: set[tuple[str, str]] = set()
        self._pid = os.getpid()

    # What torch.hub has.

    def load(
        self,
        /,
        repo_or_dir: RepoOrDir,
        model: str,
        *args: Any,
        source: SourceName | None = None,
        trust_repo: bool | Literal["check"] | None = "check",
        force_reload: bool = False,
        verbose: bool = True,
        skip_validation: bool = False,
        returns: Returns = "handle",
        example_inputs: Any = None,
        sandbox: Sandbox | Literal["none"] | None = None,
        environment: On | None = None,
        device: Any = None,
        seed: int | None = None,
        timeout_s: float | None = None,
        restart: Literal["on-death"] | None = None,
        compile: bool | Mapping[str, Any] | None = None,  # noqa: A002 - torch's name
        entry_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build a model in a worker of its repo and commit.

        Args:
            repo_or_dir: ``owner/repo[:ref]``, a URL, ``git+...``, a directory, ``./clone:ref``, or what `fetch`
                gave, for exactly that commit.
            model: Name of an entrypoint in hubconf.
            *args: Passed to the entrypoint.
            source: How `repo_or_dir` is to be read; None decides by its form.
            trust_repo: True trusts the repo, and remembers it once the load has succeeded; "check" asks the
                list of trusted repos; False trusts nobody. Only `returns` of "torchscript" and
                "exported_program" need trust: opening those can run code in *this* process.
            force_reload: Ask the source again and download again.
            verbose: Show progress of downloads, and of an environment's building, on a terminal.
            skip_validation: Accept a commit that is not shown to belong to the repo.
            returns: "handle": a `RemoteModule`, a plain value, a `RemoteObject`, or the structure of them that
                the entrypoint gave. "state_dict": the model's state; the worker ends. "torchscript" and
                "exported_program": the model, opened here; the worker ends.
            example_inputs: A tensor or a tuple of inputs: TorchScript is then traced, else scripted; an exported
                program needs them.
            sandbox: What the worker may touch; None leaves that to the session. "none", and ``network="open"``, are
                for trusted repos alone.
            environment: What it runs on. "host": this interpreter and its packages. "auto": these, and in front of
                them what else the repo asks for. An `Environment`: packages that you name, another Python, another
                torch. Built once and kept. None leaves that to the session.
            device: Where the worker moves the model after it is built, such as "cuda:0"; one that is not the CPU
                lets the worker see the GPUs, as ``Sandbox(gpu=True)`` does.
            seed: Seeds torch, numpy and random in the worker, before hubconf is imported and again before
                the entrypoint runs. Without it each worker draws its own numbers.
            timeout_s: Seconds that each question to the worker may take, this load's and later calls.
            restart: "on-death": a worker that has died, or was ended to make room, is built again at the handle's next
                use: same commit, arguments and seed (one is drawn unless given). What was changed since is done again,
                or named in a RuntimeWarning. None: a dead worker's handles stay dead.
            compile: Compile the model in the worker, by ``torch.compile``: True, or its options by name. The first
                call of each shape takes the time that compiling takes.
            entry_kwargs: Keywords for the entrypoint, for names that this function has too.
            **kwargs: Keywords for the entrypoint.

        Returns:
            What `returns` says.

        Raises:
            InvalidReferenceError, FetchError, UntrustedRepoError, EnvironmentBuildError, PolicyError,
            ConfinementError, HubconfError, EntrypointNotFoundError, RemoteError, WorkerDiedError, WorkerTimeoutError,
            ProtocolError.
        """
        check_choice("returns", returns, _RETURNS)
        check_choice("restart", restart, (None, "on-death"))
        compiled = checked_options("compile", compile)
        for name, value in (("restart", restart), ("compile", compiled)):
            if value is not None and returns != "handle":
                raise ValueError(f"{name}= is for a model that lives in a worker; returns={returns!r} ends its worker")
        trust_repo = checked_trust(trust_repo)
        check_name(model)
        policy = _policy(checked_sandbox(sandbox) or self._sandbox, device)
        on = checked_environment(environment) or self._environment
        if returns == "exported_program" and example_inputs is None:
            raise ValueError("returns='exported_program' needs example_inputs, a tuple of inputs to export with")
        keywords = merged(kwargs, entry_kwargs)
        ours: dict[str, Any] = {
            "returns": returns if returns != "handle" else None,
            "example_inputs": example_inputs,
            "environment": environment,
            "device": device,
            "seed": seed,
            "timeout_s": timeout_s,
            "restart": restart,
            "compile": compiled,
        }
        own = [name for name, value in ours.items() if value is not None]
        seed = checked_seed(seed)
        timeout_s = self._timeout_s if timeout_s is None else checked_timeout(timeout_s)
        wanted = Wanted(repo_or_dir, source, force_reload, skip_validation, verbose)
        with self._lease(wanted, timeout_s, trust_repo, policy, on, returns) as (link, outline):
            from isohub.session.devices import checked_device
            from isohub.session.recipe import Recipe

            if entry_kwargs is None:
                _check_keywords(outline, model, own)
            if seed is None and restart is not None:
                import secrets

                seed = secrets.randbits(63)  # what is drawn from new entropy could not be drawn again
            recipe = Recipe(model, tuple(args), keywords, seed, checked_device(device), compiled)
            built = _built(link, recipe, backed=returns == "state_dict")
            if restart is not None:
                again = replace(wanted, force_reload=False)
                self._make_restartable(link, built, again, timeout_s, trust_repo, policy, on)
            answer = _converted(built, returns, example_inputs)
        if trust_repo is True:
            from isohub.repos.trust import trust_location

            pin, reference = link.checkout.pin, link.checkout.reference
            commit = None if pin.validated else pin.commit
            identity = reference.host, reference.owner, reference.repo
            self._trust().add(*identity, commit, location=trust_location(reference))
        return answer

    @_also_called_github
    def list(
        self,
        repo: RepoOrDir,
        force_reload: bool = False,
        skip_validation: bool = False,
        trust_repo: bool | Literal["check"] | None = "check",
        verbose: bool = True,
        *,
        source: SourceName | None = None,
        environment: On | None = None,
        timeout_s: float | None = None,
    ) -> builtins.list[str]:
        """Names of a repo's entrypoints. hubconf runs in a worker; see `inspect` for what runs nothing.

        `repo` may also be called ``github``, as torch.hub does. Only a worker that is less confined than others needs
        trust, as in `load`; `environment` is as there, too.
        """
        trust_repo = checked_trust(trust_repo)
        wanted = Wanted(repo, source, force_reload, skip_validation, verbose)
        on = checked_environment(environment)
        names: Any = self._look(wanted, timeout_s, trust_repo, on, "entrypoints", "listing the entrypoints")
        return [printable(name, newlines=False) for name in names]

    @_also_called_github
    def help(
        self,
        repo: RepoOrDir,
        model: str,
        force_reload: bool = False,
        skip_validation: bool = False,
        trust_repo: bool | Literal["check"] | None = "check",
        verbose: bool = True,
        *,
        source: SourceName | None = None,
        environment: On | None = None,
        timeout_s: float | None = None,
    ) -> str | None:
        """An entrypoint's docstring, control characters escaped; None if it has none. Parameters as in `list`."""
        check_name(model)
        trust_repo = checked_trust(trust_repo)
        wanted = Wanted(repo, source, force_reload, skip_validation, verbose)
        on = checked_environment(environment)
        text: Any = self._look(wanted, timeout_s, trust_repo, on, "help", "reading the docstring", model)
        return None if text is None else printable(str(text))

    # What torch.hub lacks.

    def inspect(
        self,
        repo: RepoOrDir,
        *,
        source: SourceName | None = None,
        force_reload: bool = False,
        skip_validation: bool = False,
        verbose: bool = True,
    ) -> Outline:
        """What a repo's hubconf declares, read from its source text. Nothing of it runs.

        Returns:
            Entrypoints with signatures and docstrings, and dependencies. The texts are the repo's, as they are.
        """
        from isohub.repos.outline import read_outline

        wanted = Wanted(repo, source, force_reload, skip_validation, verbose)
        return read_outline(self._catalog(wanted.source).checkout(wanted).path)

    def fetch(
        self,
        repo: RepoOrDir,
        *,
        source: SourceName | None = None,
        force_reload: bool = False,
        skip_validation: bool = False,
        verbose: bool = True,
        submodules: bool | None = None,
        lfs: bool | None = None,
    ) -> Checkout:
        """Bring a repo here, and run nothing. The result has ``commit`` and ``path``.

        Args:
            repo: As `load` takes it, and so are `source`, `force_reload`, `skip_validation` and `verbose`.
            source: How to read it.
            force_reload: Ask and download again.
            skip_validation: Accept a commit that is not shown to belong to the repo.
            verbose: Show progress on a terminal.
            submodules: Bring them too; None leaves that to the session.
            lfs: Bring the files behind Git LFS pointers; None leaves that to the session.
        """
        wanted = Wanted(repo, source, force_reload, skip_validation, verbose, submodules, lfs)
        return self._catalog(wanted.source).checkout(wanted)

    def history(self, repo: RepoOrDir, good: str, bad: str) -> Mapping[str, Commit]:
        """Commits between two of a repo's, by id; see `isohub.repos.sources.commits`. Nothing of it runs.

        Args:
            repo: As `load` takes it; its ref does not matter.
            good: A full commit id.
            bad: Another.

        Raises:
            FetchError: The history cannot be brought, or is not all there.
        """
        from isohub.repos.sources.commits import commits_between

        reference = _reference(repo)
        if is_offline(self._offline) and reference.source != "local":
            raise OfflineError(
                f"the history of {reference} is on a server, and the network may not be used",
                hint="bisect a clone of it, which git clone makes: ./clone",
                reference=str(reference),
                url=reference.location,
            )
        return commits_between(reference, good, bad)

    def prepare(
        self,
        repo: RepoOrDir | None,
        environment: On | None = None,
        *,
        source: SourceName | None = None,
        force_reload: bool = False,
        skip_validation: bool = False,
        verbose: bool = True,
    ) -> Prepared:
        """Build what a repo is to run on, unless that is done; nothing of the repo runs.

        Args:
            repo: As `load` takes it, and so are `source`, `force_reload` and `skip_validation`. None where
                `environment` says what to install.
            environment: What; None leaves that to the session.
            source: How to read it.
            force_reload: Also find out again which packages it needs.
            skip_validation: Accept a commit that is not shown to belong to the repo.
            verbose: Show progress on a terminal.

        Returns:
            Its interpreter and packages, kept from being removed as long as this session is open.

        Raises:
            InvalidReferenceError, FetchError, EnvironmentBuildError, LockMismatchError.
        """
        on = checked_environment(environment) or self._environment
        if repo is None:
            if not on.is_host and on.requirements is None:
                raise ValueError("prepare(None): what a repo asks for is asked of a repo; give one, or requirements=")
            return self._prepared(on, None, None, force_reload=force_reload, verbose=verbose)
        from isohub.repos.outline import read_outline

        wanted = Wanted(repo, source, force_reload, skip_validation, verbose)
        checkout = self._catalog(wanted.source).checkout(wanted)
        outline = read_outline(checkout.path)
        return self._prepared(on, checkout, outline, force_reload=force_reload, verbose=verbose)

    def trust(self, repo: RepoOrDir) -> None:
        """Remember a repo as trusted: exactly this host, owner and name, and this commit if a full SHA is given.

        Raises:
            InvalidReferenceError: It names a ref that can move.
        """
        from isohub.repos.trust import trust_location, trust_target

        reference = _reference(repo)
        self._trust().add(*trust_target(reference), location=trust_location(reference))

    def untrust(self, repo: RepoOrDir) -> bool:
        """Forget a trusted repo, or one commit of it; False if it was none. What `trusted` gives is taken too."""
        from isohub.repos.trust import trust_target

        if isinstance(repo, str):
            return self._trust().remove_text(repo)
        return self._trust().remove(*trust_target(_reference(repo)))

    def trusted(self) -> builtins.list[str]:
        """The trusted repos, as ``host/owner/repo[@commit]``."""
        return [entry.name for entry in self._trust().entries()]

    @property
    def environment(self) -> Environment:
        """What repos run on, unless `load` says otherwise."""
        return self._environment

    def workers(self) -> builtins.list[WorkerInfo]:
        """The workers that are alive now, with what they use and do. None of them is asked."""
        return [] if self._pool is None else self._pool.infos()

    def replica(self, number: int) -> Session:
        """The same session, whose loads have workers of their own: several of one commit, to be asked at once.

        Args:
            number: 1 and more; 0 is the session itself.

        Returns:
            A session with the same cache, rules, zygotes and limits. It ends with this one, and has nothing to close.
        """
        if type(number) is not int or number < 0:
            raise ValueError(f"number={number!r}; expected a whole number, 0 for the session itself")
        from isohub.environments.store import InUse

        self._open_pool()  # theirs is the same
        with self._pool_lock:
            if self._in_use is None:
                self._in_use = InUse()
            other = copy.copy(self)
        other._replica = number
        return other

    @property
    def sandbox(self) -> Sandbox | str:
        """What workers may touch, unless `load` says otherwise."""
        return self._sandbox

    @property
    def timeout_s(self) -> float | None:
        """Seconds that any one question to a worker may take, unless `load` says otherwise."""
        return self._timeout_s

    @property
    def max_workers(self) -> int | None:
        """The most workers at once; None for no limit."""
        return self._max_workers

    def close_idle(self, older_than_s: float = 0) -> builtins.list[str]:
        """End workers that nobody asks, although there are handles to them, and give their memory back.

        A worker ends with its last handle by itself; this is for a program that keeps handles which it may not need
        again. Those say so from here on, or are built again if they were loaded with ``restart="on-death"``.

        Args:
            older_than_s: End those alone that were not asked for as many seconds.

        Returns:
            Names of what was ended.
        """
        older_than_s = checked_seconds("older_than_s", older_than_s)
        return [] if self._pool is None else self._pool.close_idle(older_than_s)

    def close(self) -> None:
        """End every worker. Handles of this session raise `SessionClosedError` from here on."""
        if self._replica:
            return  # the workers are those of the session that it is a replica of
        with self._pool_lock:
            self._closed = True
            pool, self._pool = self._pool, None
            in_use, self._in_use = self._in_use, None
        if pool is not None and self._pid == os.getpid():
            pool.close()
        if in_use is not None:
            in_use.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Parts.

    def _bound(self, policy: Sandbox | str) -> bool:
        """Whether a worker may download by its caller alone."""
        without_network = isinstance(policy, Sandbox) and not policy.network
        return without_network or self._lockfile is not None or is_offline(self._offline)

    def _root(self) -> Path:
        return Path(get_dir()) if self._cache_dir is None else self._cache_dir

    def _catalog(self, source: SourceName | None) -> Catalog:
        check_choice("source", source, _SOURCES)
        return Catalog(
            self._root(),
            offline=is_offline(self._offline),
            lockfile=self._lockfile,
            submodules=self._submodules,
            lfs=self._lfs,
        )

    def _trust(self) -> Trust:
        from isohub.repos.trust import Trust

        return Trust(self._root())

    def _weights_of(self, pin: Pin) -> tuple[Path, ...]:
        """Where the store keeps a repo's weights, for its worker to read; nothing where that cannot be made."""
        from isohub.repos.disk import make_root

        directory = weights_dir(self._root(), (pin.reference.host, pin.reference.owner, pin.reference.repo))
        try:
            make_root(self._root())
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            return ()
        return (directory,)

    def _open_pool(self) -> Pool:
        from isohub.session.pool import Pool

        if self._pid != os.getpid():
            raise SessionClosedError(
                f"a session was used in a forked process (pid {os.getpid()}, opened in {self._pid})",
                hint="open another here: isohub.Session()",
            )
        with self._pool_lock:
            if self._closed:
                raise SessionClosedError("the session is closed", hint="open another: isohub.Session()")
            if self._pool is None:
                self._pool = Pool(self._max_workers, self._when_full)
            return self._pool

    def _prepared(
        self,
        on: Environment,
        checkout: Checkout | None,
        outline: Outline | None,
        *,
        force_reload: bool,
        verbose: bool,
    ) -> Prepared:
        """What a checkout runs on, in use until the session is closed; so it is asked for once, as long as it is there.

        A requirements file of the caller's may change meanwhile.
        """
        from isohub.environments.prepare import prepare

        known = None
        if checkout is not None and not on.is_host and not isinstance(on.requirements, str):
            known = on, checkout.path, checkout.commit
            found = self._prepared_for.get(known)
            if found is not None and not force_reload and all(map(os.path.isdir, found.runtime.packages)):
                return found
        prepared = prepare(
            on,
            self._root(),
            checkout,
            outline,
            offline=is_offline(self._offline),
            progress=verbose,
            refresh=force_reload,
            lockfile=self._lockfile,
        )
        if prepared.held is not None:
            from isohub.environments.store import InUse

            with self._pool_lock:
                if self._in_use is None:
                    self._in_use = InUse()
                self._in_use.add(prepared.runtime.key, prepared.held)
            prepared = replace(prepared, held=None)
        if known is not None:
            self._prepared_for[known] = prepared
        return prepared

    @contextmanager
    def _lease(
        self,
        wanted: Wanted,
        timeout_s: float | None,
        trust_repo: bool | Literal["check"],
        policy: Sandbox | str,
        on: Environment,
        returns: Returns = "handle",
    ) -> Iterator[tuple[Link, Outline]]:
        """A worker of what is wanted, for the length of the block and as long as there are handles to it.

        With it, its hubconf as read: what can be known before the repo's code runs is known by then.
        """
        from isohub.session.ahead import import_torch

        check_choice("source", wanted.source, _SOURCES)
        pool = self._open_pool()
        if on.is_host:
            pool.warm(confined=policy != NONE)  # before all else: a zygote takes as long as torch's import does
        import_torch()
        checkout, held = self._catalog(wanted.source).hold(wanted)
        with ExitStack() as undo:
            if held is not None:
                undo.callback(os.close, held)
            from isohub.repos.outline import read_outline
            from isohub.session.broker import Broker
            from isohub.session.gate import ProgramGate
            from isohub.session.pool import WorkerKey
            from isohub.session.request import Placement

            gate = ProgramGate(checkout.pin, self._trust(), trust_repo)
            if returns in ("torchscript", "exported_program"):
                gate.check(returns)
            _require_trust(gate, policy, checkout)
            outline = read_outline(checkout.path)
            prepared = self._prepared(on, checkout, outline, force_reload=wanted.force_reload, verbose=wanted.verbose)
            offline = is_offline(self._offline)
            placement = Placement(policy, _root_of(checkout), self._weights_of(checkout.pin), self._root())
            broker = Broker(
                self._root(),
                checkout.pin,
                offline=offline,
                lockfile=self._lockfile,
                revalidate=wanted.force_reload,
                held=held,
                hosts=_download_hosts(policy),
                granted=policy != NONE and bool(placement.granted),
            )
            status = checkout.path.stat()
            key = WorkerKey(
                runtime=prepared.runtime,
                path=str(checkout.path),
                commit=checkout.commit,
                place=(status.st_dev, status.st_ino),
                placement=placement,
                bound=() if self._lockfile is None else (str(checkout.reference), *checkout.pin.extras),
                name=checkout.pin.name,
                reference=str(checkout.reference),
                replica=self._replica,
            )
            with pool.lease(key, timeout_s, lambda worker: _check_confinement(worker, gate)) as worker:
                from isohub.session.handles import make_handle
                from isohub.session.link import Link

                if worker.equip(broker):
                    undo.pop_all()  # the worker's, until it ends
                link = Link(worker, pool, checkout, gate, make_handle, timeout_s, self._max_reply_bytes, wanted.verbose)
                locked = self._lockfile is not None
                bytecode = _open(link, outline, prepared, bound=self._bound(policy), locked=locked)
                yield link, outline
                if bytecode is None:
                    self._precompile(pool, link)

    def _precompile(self, pool: Pool, link: Link) -> None:
        """Have the next worker of this checkout find its modules compiled; once for each."""
        from isohub.session.precompiling import WORTH_S, may_have, precompile

        if link.import_s < WORTH_S or link.checkout.root is None:
            return
        if not may_have(link.worker, locked=self._lockfile is not None):
            return
        key = str(link.checkout.path), link.worker.versions.python
        if key not in self._precompiled:
            self._precompiled.add(key)
            precompile(pool, link.checkout, link.worker)

    def _make_restartable(
        self,
        link: Link,
        built: Any,
        wanted: Wanted,
        timeout_s: float | None,
        trust_repo: bool | Literal["check"],
        policy: Sandbox | str,
        on: Environment,
    ) -> None:
        """Have what was built be built again when its worker has died."""
        from isohub.session.recovery import Recovery

        checkout, recipe = link.checkout, link.recipe
        assert recipe is not None
        wanted = replace(wanted, repo=checkout, source=None)

        @contextmanager
        def again() -> Iterator[tuple[Link, Any]]:
            with self._lease(wanted, timeout_s, trust_repo, policy, on) as (fresh, _):
                yield fresh, _built(fresh, recipe)

        link.recovery = Recovery(again, built)

    def _look(
        self,
        wanted: Wanted,
        timeout_s: float | None,
        trust_repo: bool | Literal["check"],
        on: Environment | None,
        op: str,
        phase: str,
        *args: Any,
    ) -> Any:
        timeout_s = self._timeout_s if timeout_s is None else checked_timeout(timeout_s)
        with self._lease(wanted, timeout_s, trust_repo, self._sandbox, on or self._environment) as (link, _):
            _import(link, None)
            return link.ask(op, *args, phase=phase)


def _policy(policy: Sandbox | str, device: Any) -> Sandbox | str:
    """The same, with the GPUs if the model is to be moved to one."""
    if isinstance(policy, str) or device is None or str(device).split(":")[0] == "cpu":
        return policy
    return policy if policy.gpu is not False else replace(policy, gpu=True)


def _download_hosts(policy: Sandbox | str) -> HostPolicy | None:
    """Where a worker's downloads may come from; None for anywhere. The user's environment may name more hosts."""
    if isinstance(policy, str) or policy.download_hosts is None:
        return None
    from isohub.sandbox.hosts import HostPolicy

    named = os.environ.get(_HOSTS_VARIABLE, "").replace(",", " ").split() if policy.downloads is None else []
    try:
        return HostPolicy((*policy.download_hosts.entries, *named))
    except PolicyError as error:
        raise PolicyError(f"{_HOSTS_VARIABLE}: {error.message}", hint="hosts with commas between them") from None


def _root_of(checkout: Checkout) -> Path:
    """What of the disk a checkout's worker may read."""
    root = checkout.whole.resolve()
    if not checkout.path.resolve().is_relative_to(root):
        raise PolicyError(f"{checkout.path} is not in the tree {root} that it was taken from")
    return root


def _require_trust(gate: ProgramGate, policy: Sandbox | str, checkout: Checkout) -> None:
    """Raise for a policy that gives an untrusted repo more than a confined worker has."""
    powers = ("all of the caller's powers",) if isinstance(policy, str) else policy.needs_trust
    if powers:
        gate.require(f"{checkout.pin.name} would run with {' and '.join(powers)}", "the default sandbox needs no trust")


def _check_confinement(worker: Worker, gate: ProgramGate) -> None:
    """Raise unless a worker has what its policy requires, before it runs a byte of the repo's code or packages."""
    confinement, policy = worker.confinement, worker.placement.policy
    if isinstance(policy, str):
        return
    # A policy may ask for other layers than these, and an untrusted repo has to have these all the same.
    required = dict.fromkeys((*confinement.asked, *DEFAULT_REQUIRED))
    lacking = [name for name in required if name not in confinement.active]
    if lacking and gate.trusted:
        lacking = [] if policy.require == "default" else [name for name in lacking if name in confinement.asked]
    if not lacking:
        return
    named = "; ".join(f"{name}: {confinement.details.get(name) or 'not applied'}" for name in lacking)
    raise ConfinementError(
        f"the worker of {worker.name} would be without {' and '.join(lacking)} ({named})",
        hint="isohub doctor says what this machine can do; run untrusted code on one that has Landlock and seccomp, or "
        "in a container or virtual machine of its own",
        missing=tuple(lacking),
    )


def doctor() -> Diagnosis:
    """What this machine can give a worker: a process is confined, and tries what a worker must not do.

    Returns:
        Layers with their details, what was tried, and whether the defaults, and all of it, hold here.
    """
    from isohub.session.examination import diagnose

    return diagnose()


def _reference(repo: RepoOrDir) -> Reference:
    return replace(repo.reference, ref=repo.commit) if isinstance(repo, Checkout) else parse(repo)


def _open(link: Link, outline: Outline, prepared: Prepared, *, bound: bool, locked: bool) -> bytes | None:
    """Everything that can be known before the repo's code runs.

    Args:
        link: To the worker.
        outline: Of the checkout's hubconf.
        prepared: What it runs on.
        bound: Whether the worker may download by its caller alone.
        locked: Whether a lockfile binds it.

    Returns:
        The bytecode of its modules that the worker was given.
    """
    from isohub.environments.dependencies import missing_error, parse_dependencies, unmet
    from isohub.session.precompiling import bytecode_of, may_have

    checkout = link.checkout
    if checkout.submodules or checkout.lfs_pointers:
        _log.warning("%s", _lacking(checkout))
    dependencies = parse_dependencies(outline.dependencies, prepared.markers)
    names = [dependency.import_name for dependency in dependencies if dependency.import_name is not None]
    bytecode = bytecode_of(checkout, link.worker) if may_have(link.worker, locked=locked) else None
    not_found: Any = link.ask("open", str(checkout.path), names, bound, bytecode, phase="looking for its dependencies")
    lacking = unmet(dependencies, not_found, prepared.version)
    if lacking:
        raise missing_error(lacking, checkout.pin.name, checkout.commit, prepared.name, prepared.version)
    return bytecode


def _check_keywords(outline: Outline, model: str, own: Sequence[str]) -> None:
    """Refuse a keyword that could be meant for either, as far as hubconf's text tells."""
    found = next((entry for entry in outline.entrypoints if entry.name == model), None)
    both = [name for name in own if found is not None and name in _parameters(found.signature)]
    if both:
        raise TypeError(
            f"{both[0]}= is a parameter of isohub's and of the entrypoint {model}(); which one is meant?\n"
            f"hint: entry_kwargs={{'{both[0]}': ...}} for the entrypoint's; with entry_kwargs={{}} beside it, isohub's"
        )


def _parameters(signature: str | None) -> set[str]:
    import ast

    try:
        (function,) = ast.parse(f"def f{signature}: pass").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()  # cut short, or unknown
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def _lacking(checkout: Checkout) -> str:
    """What a checkout does not hold, and how to bring it."""
    in_place = checkout.reference.source == "local" and checkout.reference.ref is None
    found = (
        ("submodules", "git submodule update --init", checkout.submodules),
        ("lfs", "git lfs pull", checkout.lfs_pointers),
    )
    words = {"submodules": "submodules", "lfs": "Git LFS files"}
    lacking = [(option, command, paths) for option, command, paths in found if paths]
    named = " and ".join(
        f"{words[option]} ({printable(', '.join(paths[:3]), newlines=False)}{', ...' if len(paths) > 3 else ''})"
        for option, _, paths in lacking
    )
    how = f"isohub.Session({', '.join(f'{option}=True' for option, _, _ in lacking)})"
    how += f" or isohub fetch {' '.join(f'--{option}' for option, _, _ in lacking)} brings them"
    if in_place:
        how = f"in the directory, {' and '.join(command for _, command, _ in lacking)} brings them"
    return f"{checkout.pin.name} is without its {named}; {how}"


def _import(link: Link, seed: int | None) -> None:
    """Run hubconf, the first of the repo's code."""
    began = time.monotonic()
    link.ask("import", seed, phase="importing hubconf.py")
    link.import_s = time.monotonic() - began


def _built(link: Link, recipe: Recipe, backed: bool = False) -> Any:
    """What the entrypoint gives in this worker, moved and compiled as was asked; `backed` if only its state is."""
    from isohub.session.handles import mark_loaded
    from isohub.session.recipe import remotes_in

    _import(link, recipe.seed)
    phase = f"calling the entrypoint {recipe.entrypoint}()"
    arguments = [*recipe.args], dict(recipe.kwargs)
    built = link.ask("build", recipe.entrypoint, recipe.seed, backed, *arguments, phase=phase)
    link.recipe = recipe
    mark_loaded(built)
    for path, _, remote in remotes_in(built):
        remote.path = path
    try:
        return _prepared(built, recipe)
    except BaseException:
        # A load that fails leaves nothing; the error's own frames would hold the handles for as long as it is held.
        for _, _, remote in remotes_in(built):
            if remote.received[0] == 1:  # else the caller has it from an earlier load
                remote.close()
        raise


def _prepared(built: Any, recipe: Recipe) -> Any:
    """What was built, where it was to be and compiled if it was to be."""
    from isohub.session.link import remote_of

    if recipe.device is not None:
        built = _moved(built, recipe.device, recipe.entrypoint)
    if recipe.compiled is not None:
        if not _is_module(built):
            raise TypeError(
                f"compile= is for a module; the entrypoint {recipe.entrypoint!r} gave {type(built).__name__}"
            )
        remote = remote_of(built)
        assert remote is not None
        remote.ask("compile", dict(recipe.compiled), phase="compiling it")
    return built


def _is_module(built: Any) -> bool:
    from isohub.session.handles import RemoteModule

    return isinstance(built, RemoteModule)


def _moved(built: Any, device: Any, model: str) -> Any:
    from isohub.session.handles import RemoteModule

    if not isinstance(built, RemoteModule):
        raise TypeError(f"device={device!r} moves a module; the entrypoint {model!r} gave {type(built).__name__}")
    return built.to(device)


def _converted(built: Any, returns: Returns, example_inputs: Any) -> Any:
    """What the caller asked for, from what the entrypoint gave."""
    if returns == "handle":
        return built
    from isohub.session.handles import RemoteModule, given_state

    if not isinstance(built, RemoteModule):
        raise TypeError(
            f"returns={returns!r} needs an entrypoint that gives one torch.nn.Module; "
            f"this one gave {type(built).__name__}\nhint: returns='handle' gives what it gave"
        )
    from isohub.session.link import remote_of

    remote = remote_of(built)
    # An entrypoint may give an object that the caller has a handle to already: that one stays open.
    shared = remote is not None and remote.received[0] > 1
    with nullcontext() if shared else built:
        if returns == "state_dict":
            return built.state_dict() if shared else given_state(built)
        inputs = example_inputs if isinstance(example_inputs, tuple) or example_inputs is None else (example_inputs,)
        if returns == "torchscript":
            return built.torchscript(inputs)
        return built.export(inputs or ())


_default: Session | None = None
_default_lock = threading.Lock()


def default_session() -> Session:
    """The session that the module's functions use; another one in a forked process."""
    global _default  # noqa: PLW0603 - one default for the process is what a module-level function means
    with _default_lock:
        if _default is None or _default._pid != os.getpid() or _default._closed:
            _default = Session()
        return _default


def _forget_default_lock() -> None:
    global _default_lock  # noqa: PLW0603 - a lock that another thread held at the fork would never open
    _default_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_default_lock)


def _of_default(method: Callable[Concatenate[Any, _P], _R]) -> Callable[_P, _R]:
    """The same function on the default session."""

    @functools.wraps(method)
    def function(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return method(default_session(), *args, **kwargs)

    signature = inspect_module.signature(method)
    parameters = [*signature.parameters.values()][1:]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__qualname__ = method.__name__
    vars(function).pop("__wrapped__")
    return function


load = _of_default(Session.load)
list = _of_default(Session.list)  # noqa: A001 - torch.hub's name
help = _of_default(Session.help)  # noqa: A001 - torch.hub's name
inspect = _of_default(Session.inspect)
fetch = _of_default(Session.fetch)
trust = _of_default(Session.trust)
untrust = _of_default(Session.untrust)
trusted = _of_default(Session.trusted)
