"""States of conversations, kept so that a later turn computes only what is new in it.

A recurrent state cannot be rolled back, so a conversation is kept at several points. What a
snapshot costs is its recurrent states: keys and values it shares with the others of its sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from flashmoe.machine.lock import Lock

if TYPE_CHECKING:
    from flashmoe import _native

_RECENT = 4
"""Snapshots of a conversation that stay beside those it is likely to come back to."""


@dataclass(eq=False)
class Snapshot:
    """A state that nobody changes; its users take forks.

    Attributes:
        native: the state.
        ids: that it has taken in, int32 as bytes.
        used: when it was last of use; the larger the later.
    """

    native: _native.State
    ids: bytes
    used: int = 0
    _lock: Lock = field(default_factory=Lock)

    def fork(self) -> _native.State:
        """A state of its own for a sequence that goes on from here."""
        with self._lock:
            return self.native.fork()

    @property
    def position(self) -> int:
        return self.native.position

    @property
    def own_bytes(self) -> int:
        """Without the keys and values that it may share."""
        logits = self.native.logits
        rest = len(self.ids) + (0 if logits is None else logits.nbytes)
        return self.native.nbytes - self.native.shared[1] + rest


class Conversations:
    """Snapshots by the ids that lead to them; the least recently used make room for others.

    Args:
        budget: bytes that they may take together.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._lock = Lock()
        self._by_ids: dict[bytes, Snapshot] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._by_ids)

    @property
    def nbytes(self) -> int:
        """Bytes that all snapshots take."""
        with self._lock:
            return self._bytes()

    def longest(self, ids: Sequence[int]) -> Snapshot | None:
        """The snapshot that holds the most of these ids from their beginning."""
        wanted = _key(ids)
        with self._lock:
            found = [s for s in self._all() if wanted.startswith(s.ids)]
            if not found:
                return None
            best = max(found, key=lambda s: len(s.ids))
            self._touch(best)
            return best

    def keep(
        self,
        native: _native.State,
        ids: Sequence[int],
        places: Collection[int] = (),
    ) -> None:
        """Keeps a state from now on nobody else's, and lets go what it makes superfluous.

        Args:
            ids: of its sequence, at least those that it has taken in.
            places: positions that its conversation is likely to come back to: their snapshots stay
                as long as this one is in use.
        """
        if native.position == 0 or self.budget == 0:
            return
        key = _key(ids[: native.position])
        with self._lock:
            snapshot = self._by_ids.setdefault(key, Snapshot(native, key))
            lineage = [s for s in self._all() if key.startswith(s.ids)]
            likely = [s for s in lineage if s.position in places]
            others = sorted((s for s in lineage if s not in likely), key=lambda s: len(s.ids))
            for s in others[:-_RECENT]:
                self._by_ids.pop(s.ids, None)
            for s in (*likely, snapshot):
                self._touch(s)
            for s in sorted(self._all(), key=lambda s: s.used):
                if self._bytes() <= self.budget:
                    break
                self._by_ids.pop(s.ids, None)

    def clear(self) -> None:
        """Lets all of them go."""
        with self._lock:
            self._by_ids.clear()

    def _touch(self, snapshot: Snapshot) -> None:
        self._clock += 1
        snapshot.used = self._clock

    def _bytes(self) -> int:
        held = self._all()
        return sum(s.own_bytes for s in held) + sum(dict(s.native.shared for s in held).values())

    def _all(self) -> list[Snapshot]:
        return list(self._by_ids.values())


def _key(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()
