"""The one place that opens a program of a worker's in this process, and asks for trust first.

Side: caller. Source: torch's SECURITY.md, "models are programs"; ``torch.jit.load`` alone wrote a file by
``aten::from_file``, and ``torch.export.load`` of a crafted archive executed code (torch 2.13, both seen).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from isohub.errors import UntrustedRepoError

if TYPE_CHECKING:
    from isohub.repos.pins import Pin
    from isohub.repos.trust import Trust

__all__ = ["ProgramGate"]

_FORMS = {"torchscript": "TorchScript", "exported_program": "an ExportedProgram"}


class ProgramGate:
    """Opens programs of one repo, if it is trusted.

    Args:
        pin: Whose programs.
        trust: The list of trusted repos.
        trust_repo: As `Session.load` has it.
    """

    def __init__(self, pin: Pin, trust: Trust, trust_repo: bool | Literal["check"]) -> None:
        self._pin = pin
        self._trust = trust
        self._trust_repo = trust_repo

    def check(self, form: str) -> None:
        """Raise `UntrustedRepoError` unless the repo may open a program here."""
        reference = self._pin.reference
        identity = reference.host, reference.owner, reference.repo
        # Anybody may open a pull request: trust in a repo is in what was shown to be on its branches and tags.
        whole = self._pin.validated
        if self._trust_repo is True or (
            self._trust_repo == "check" and self._trust.allows(*identity, self._pin.commit, whole=whole)
        ):
            return
        what = "all its commits," if whole else "this commit of it,"
        raise UntrustedRepoError(
            f"{_FORMS[form]} of {self._pin.name} would be opened in this process, which can run the repo's code here "
            "with all of your powers; the repo is not trusted",
            hint="returns='handle' and returns='state_dict' need no trust; once you have read the code at "
            f"{self._pin.commit}, trust_repo=True opens it and trusts the repo, {what} from then on "
            "(isohub trust ls | rm)",
            repo="/".join(identity),
        )

    def open(self, form: str, data: bytes) -> Any:
        """The program, opened. Trust: a worker whose repo the user trusts."""
        self.check(form)
        if form == "torchscript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 deprecates TorchScript
                read: Callable[..., Any] = torch.jit.load  # noqa: TID251 - after the check
                return read(io.BytesIO(data))
        return torch.export.load(io.BytesIO(data))  # noqa: TID251 - after the check
