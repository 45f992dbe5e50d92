"""What short texts were found to mean: few of them, each once.

Calls of one model differ in little but the numbers in its tensors, so what one message says the next one says too.

Side: both.
"""

from __future__ import annotations

from typing import Any, Dict, Optional

__all__ = ["Known"]

# A model has few forms of calls. What a longer text describes takes longer than the text.
_MOST, _LONGEST_BYTES = 64, 4096


class Known:
    """By key. One thread at a time."""

    def __init__(self) -> None:
        self._kept: Dict[Any, Any] = {}

    def get(self, key: Any) -> Optional[Any]:
        """What is kept under this key."""
        return self._kept.get(key)

    def keep(self, key: Any, text: bytes, meaning: Any) -> None:
        """Keep what a text means, unless that is long; when there are too many, all others go."""
        if len(text) > _LONGEST_BYTES:
            return
        if len(self._kept) >= _MOST:
            self._kept.clear()
        self._kept[key] = meaning
