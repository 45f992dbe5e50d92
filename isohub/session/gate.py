"""What asks for trust: opening a worker's program in this process, and a worker that is less confined than others.

Side: caller. Source: torch's SECURITY.md, "models are programs"; ``torch.jit.load`` alone wrote a file by
``aten::from_file``, and ``torch.export.load`` of a crafted archive executed code (torch 2.13, both seen).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from isohub.errors import UntrustedRepoError

if TYPE_CHECKING:
    from isohub.repos.pins import Pin
    from isohub.repos.trust import Trust

__all__ = ["ProgramGate"]

_FORMS = {"torchscript": "TorchScript", "exported_program": "an ExportedProgram"}


class ProgramGate:
    """Says whether one repo is trusted, and opens its programs if it is.

    Args:
        pin: Whose programs.
        trust: The list of trusted repos.
        trust_repo: As `Session.load` has it.
    """

    def __init__(self, pin: Pin, trust: Trust, trust_repo: bool | Literal["check"]) -> None:
        self._pin = pin
        self._trust = trust
        self._trust_repo = trust_repo

    @property
    def trusted(self) -> bool:
        """Whether it is."""
        if self._trust_repo == "check":
            # Anybody may open a pull request: trust in a repo is in what was shown to be on its branches and tags.
            return self._trust.allows(*self._identity(), self._pin.commit, whole=self._pin.validated)
        return self._trust_repo

    def check(self, form: str) -> None:
        """Raise `UntrustedRepoError` unless the repo may open a program here."""
        self.require(
            f"{_FORMS[form]} of {self._pin.name} would be opened in this process, which can run the repo's code here "
            "with all of your powers",
            "returns='handle' and returns='state_dict' need no trust",
        )

    def require(self, what: str, instead: str) -> None:
        """Raise `UntrustedRepoError` unless the repo is trusted.

        Args:
            what: What would happen to an untrusted one.
            instead: What needs no trust.
        """
        if self.trusted:
            return
        whole = "all its commits," if self._pin.validated else "this commit of it,"
        why = (
            "the repo is not trusted, since trust_repo=False trusts nobody"
            if self._trust_repo is False
            else "the repo is not trusted"
        )
        raise UntrustedRepoError(
            f"{what}; {why}",
            hint=f"{instead}; once you have read the code at {self._pin.commit}, trust_repo=True allows it and trusts "
            f"the repo, {whole} from then on (isohub trust ls | rm)",
            repo="/".join(self._identity()),
        )

    def _identity(self) -> tuple[str, str, str]:
        reference = self._pin.reference
        return reference.host, reference.owner, reference.repo

    def open(self, form: str, data: bytes) -> Any:
        """The program, opened. Trust: a worker whose repo the user trusts."""
        self.check(form)
        import torch

        if form == "torchscript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 deprecates TorchScript
                read: Callable[..., Any] = torch.jit.load  # noqa: TID251 - after the check
                return read(io.BytesIO(data))
        return torch.export.load(io.BytesIO(data))  # noqa: TID251 - after the check
