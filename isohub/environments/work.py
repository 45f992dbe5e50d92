"""One environment on its way: what is asked for, looked up or resolved, and built.

Side: caller. Trust: requirements are a repo's text; see `resolver` for what comes of them.
"""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from isohub.environments.building import SourceBuilds, sourceless
from isohub.environments.declared import Asked, Declared, Unusable
from isohub.environments.environment import Environment
from isohub.environments.host import HostPackages, host_packages
from isohub.environments.interpreters import Interpreter, find_interpreter
from isohub.environments.prepare import Prepared
from isohub.environments.requirements import declared_by, required_name
from isohub.environments.resolver import Question, install, resolve
from isohub.environments.runtime import HOST
from isohub.environments.settings import package_settings
from isohub.environments.store import EnvironmentStore, Recipe, digest_of
from isohub.errors import EnvironmentBuildError, OfflineError, printable
from isohub.repos.lock_format import LockedEnvironment, LockedPackage

if TYPE_CHECKING:
    from isohub.repos.lockfile import Lockfile
    from isohub.repos.outline import Outline
    from isohub.repos.pins import Checkout

__all__ = ["Work", "as_locked", "check_needs"]

_log = logging.getLogger("isohub.environments")
_TRIES = 3


def as_locked(
    locked: LockedEnvironment, work: Work, lockfile: Lockfile, checkout: Checkout
) -> tuple[LockedPackage, ...]:
    """The packages that a lockfile names, if they can be what they were.

    Raises:
        LockMismatchError: Another Python or platform, or they and the host do not meet what is asked for.
    """
    here, there = (work.python, work.target.platform), (locked.python, locked.platform)
    if here != there:
        expected, got = (f"Python {python} on {platform}" for python, platform in (there, here))
        raise lockfile.differs(checkout.reference, checkout.pin.extras, expected, got)
    whole = (work.host or HostPackages({}, {}, "")).with_locked(locked.package)
    lacking = ", ".join([each.text for each in work.asked if not whole.meets(each, work.target.markers)][:5])
    if lacking:
        # Without a host: a file that the caller's includes has changed; the environment's name knows the first one.
        expected, got = f"{len(locked.package)} packages", f"what they do not meet: {lacking}"
        if work.host is not None:
            expected, got = f"a host that has {lacking}", "this one"
        raise lockfile.differs(checkout.reference, checkout.pin.extras, expected, got)
    return locked.package


def check_needs(prepared: Prepared, work: Work, lockfile: Lockfile, checkout: Checkout) -> None:
    """Stop where packages need others that another host had, or that were taken out of a lockfile."""
    overridden = {required_name(text) for text in work.environment.overrides}
    there = (work.host or HostPackages({}, {}, "")).with_locked(prepared.packages)
    lacking = there.lacking(prepared.runtime.packages, work.target.markers, overridden)
    if lacking:
        if prepared.held is not None:
            os.close(prepared.held)
        expected, got = f"what its packages need: {', '.join(lacking[:5])}", "an environment without"
        raise lockfile.differs(checkout.reference, checkout.pin.extras, expected, got)


class Work:
    """One environment on its way."""

    def __init__(
        self,
        environment: Environment,
        root: Path,
        checkout: Checkout | None,
        outline: Outline | None,
        *,
        offline: bool,
        progress: bool,
        refresh: bool,
    ) -> None:
        self.environment = environment
        self.store = EnvironmentStore(root)
        self.checkout = checkout
        self.offline = offline
        self.progress = progress
        self.refresh = refresh
        self.target: Interpreter = find_interpreter(environment.python)
        self.host = host_packages() if environment.base == "auto" else None
        self.declared: Declared = declared_by(
            environment, None if checkout is None else checkout.path, outline, self.target.markers
        )
        self._apply_overrides()
        self.python = ".".join(map(str, self.target.version[:2]))
        self.who = environment.name if checkout is None else f"{checkout.pin.name} ({environment.name})"
        self.asked = self._asked()

    def _apply_overrides(self) -> None:
        """Let an override also stand for what cannot be installed as it is written, and for what constraints say."""
        overrides = {required_name(text): text for text in self.environment.overrides}
        for each in self.declared.unusable:
            name = None if each.name is None else required_name(each.name)
            if name in overrides:
                self.declared.asked.append(Asked(overrides[name], "overrides="))
        kept = [each for each in self.declared.constraints if required_name(each.text) not in overrides]
        self.declared.constraints[:] = kept

    def _asked(self) -> list[Asked]:
        """What is asked for, overrides applied: what has to be met by the host for it to be used as it is."""
        overrides = {required_name(text): text for text in self.environment.overrides}
        named = {required_name(each.text) for each in self.declared.asked}
        kept = [each for each in self.declared.asked if required_name(each.text) not in overrides]
        return kept + [Asked(text, "overrides=") for name, text in overrides.items() if name in named]

    def resolved(self) -> tuple[LockedPackage, ...]:
        """What is to be installed."""
        self._check_unusable()
        if self.host is not None:
            self._check_torch(self.host)
            if self._is_met(self.host):
                self._say_remarks(logging.INFO)
                return ()
        settings = package_settings(self.declared.indexes)
        question = Question(
            self.environment,
            self.declared,
            self.target,
            self.host,
            host_packages().version("torch"),
            settings,
            refresh=self.refresh,
        )
        key = digest_of(question.identity)
        known = None if self.refresh and not self.offline else self.store.recall(key)
        if known is not None:
            return known.packages
        if self.offline:
            raise self._offline("which packages it needs was not found out before")
        self._say_remarks(logging.WARNING)
        for remark in settings.remarks:
            _log.info("%s", remark)
        with self.store.resolving(key) as (directory, held):
            # Whoever had the lock before may have resolved it.
            known = None if self.refresh else self.store.recall(key)
            if known is not None:
                return known.packages
            what = f"resolving what {self.who} needs"
            try:
                if self.environment.allow_build:
                    builds = SourceBuilds(question, self.store.built, directory, held, progress=self.progress)
                    packages = builds.resolve(what)
                else:
                    packages = resolve(question, directory, held, what=what, progress=self.progress)
            except EnvironmentBuildError as error:
                raise self._explained(error) from error
            self.store.remember(key, packages)
        return packages

    def built(self, packages: tuple[LockedPackage, ...]) -> Prepared:
        """The environment of these packages, in use."""
        if self.host is not None and not packages:
            return Prepared(HOST, self.environment.name, markers=self.target.markers, host=self.host)
        recipe = Recipe("whole" if self.host is None else "overlay", self.target, packages)
        for _ in range(_TRIES):
            if self.store.lookup(recipe) is None:
                if self.offline:
                    raise self._offline("its packages were not installed before")
                self.store.make(
                    recipe, self.environment.name, self._made_for(), lambda place, held: self._fill(recipe, place, held)
                )
            try:
                held = self.store.hold(recipe)
            except FileNotFoundError:
                continue
            return Prepared(
                self.store.runtime(recipe), self.environment.name, packages, self.target.markers, self.host, held
            )
        raise EnvironmentBuildError(
            f"the environment of {self.who} is removed from {self.store.directory} as soon as it is there",
            hint="is `isohub env rm` or `prune` running in a loop?",
        )

    def _fill(self, recipe: Recipe, place: Path, held: int | None) -> None:
        settings = package_settings(self.declared.indexes)
        count = len(recipe.packages)
        what = f"installing {count} package{'s' * (count != 1)} for {self.who}"
        install(
            recipe.packages,
            recipe.interpreter,
            settings,
            place,
            held,
            what=what,
            progress=self.progress,
            links=self.store.built_wheels(recipe.packages),
        )

    def _made_for(self) -> str:
        return "" if self.checkout is None else self.checkout.pin.name

    # What stops it, and what is said.

    def _is_met(self, host: HostPackages) -> bool:
        markers = self.target.markers
        named = {required_name(each.text) for each in self.asked}
        bound = [each for each in self.declared.constraints if required_name(each.text) in named]
        return all(host.meets(each, markers) for each in (*self.asked, *bound))

    def _check_torch(self, host: HostPackages) -> None:
        """An overlay is over the host's torch; another one needs an environment of its own."""
        lacking = [
            each
            for each in (*self.asked, *self.declared.constraints)
            if required_name(each.text) == "torch" and not host.meets(each, self.target.markers)
        ]
        if not lacking:
            return
        have = host.version("torch")
        raise EnvironmentBuildError(
            f"{self.who} needs another torch than the host's: {lacking[0].where} asks for {lacking[0].text}, and "
            f"the host has {have or 'none'}",
            hint=f"an environment of its own: isohub.Environment(python='{self.python}'), or an older Python as that "
            "torch needs; or the host's torch all the same: isohub.Environment('auto', overrides=['torch'])",
        )

    def _check_unusable(self) -> None:
        """Stop at what would have to be installed and is not installed on a repo's word."""
        overridden = {required_name(text) for text in self.environment.overrides}
        lacking: list[Unusable] = []
        for each in self.declared.unusable:
            name = None if each.name is None else required_name(each.name)
            there = name is not None and (
                name in overridden or (self.host is not None and self.host.version(name) is not None)
            )
            if not there:
                lacking.append(each)
        if not lacking:
            return
        named = "; ".join(f"{each.where}: {each.text} ({each.why})" for each in lacking[:5])
        own = self.environment.requirements is not None
        whose = "what no package index is asked for" if own else "what is not installed on a repo's word"
        raise EnvironmentBuildError(
            f"{self.who} asks for {whose}: {named}",
            hint="say what to install in its place: isohub.Environment('auto', requirements=[...]); what an index has "
            "under that name can be given as overrides=[...]",
        )

    def _say_remarks(self, level: int) -> None:
        for remark in self.declared.remarks:
            _log.log(level, "%s: %s", self.who, remark)
        wanted = self.declared.requires_python
        if wanted is not None and not _contains(wanted, self.target.version_text):
            shown = printable(wanted, limit_chars=80, newlines=False)
            _log.log(
                level, "%s: the project is for Python %s, and runs on %s", self.who, shown, self.target.version_text
            )

    def _explained(self, error: EnvironmentBuildError) -> EnvironmentBuildError:
        """The same error, with what was not honoured, and what may help."""
        remarks = "".join(f"\n{remark}" for remark in self.declared.remarks)
        hint = error.hint
        if hint is None and not self.environment.allow_build and sourceless(error.stderr_tail or ""):
            hint = "allow_build=True also takes packages that are there as source only, and builds them confined"
        if hint is None and self.host is not None and f"torch=={self.host.version('torch')}" in error.message:
            hint = f"the host's torch stays; isohub.Environment(python='{self.python}') has packages of its own"
        return EnvironmentBuildError(f"{error.message}{remarks}", hint=hint, **error.fields)

    def _offline(self, why: str) -> OfflineError:
        what = "" if self.checkout is None else f" {shlex.quote(str(self.checkout.reference))}"
        return OfflineError(
            f"the environment of {self.who} is not here, and the network may not be used: {why}",
            hint=f"with a network: isohub env build{what}{_options(self.environment)}; offline comes from "
            "ISOHUB_OFFLINE or offline=True",
            reference=what.strip() or None,
        )


def _options(environment: Environment) -> str:
    """The command line's options for an environment."""
    words = ["--environment", environment.base] if environment.base else []
    wanted = environment.requirements
    words += ["--environment", wanted] if isinstance(wanted, str) else []
    words += [word for text in (wanted if isinstance(wanted, tuple) else ()) for word in ("--with", text)]
    words += ["--python", environment.python] if environment.python else []
    words += [word for text in environment.overrides for word in ("--override", text)]
    words += [word for name in environment.extras for word in ("--extra", name)]
    words += ["--allow-build"] if environment.allow_build else []
    return "".join(f" {shlex.quote(word)}" for word in words)


def _contains(specifier: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)
