"""What the entities of a partition have learned from their readings, and as of which slot.

    slots     ... | block k-1 | block k  | block k+1 ...
    in force        learned up to the end of block k-1 : read block k with it

A block's end is a matter of the slot's number and the entity's name alone, so the result does not
depend on how the readings were batched. A snapshot keeps the newest state that is older than all
that the streams and the alert rule look back on; a restart reads the log again from there, and
comes to the later ones by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
_NEVER = -(2**62)


class Learner(Protocol):
    """How entities learn (`tsdiff.adapt.Adaptation`)."""

    @property
    def block(self) -> int:
        """Slots that are learned from at a time."""

    @property
    def context(self) -> int:
        """Slots before them that are needed besides."""

    @property
    def size(self) -> int:
        """Length of a state."""

    @property
    def key(self) -> str:
        """Names the model and the kind of state; others' states mean nothing."""

    @property
    def entity_bytes(self) -> int:
        """Memory of an entity that has learned."""

    def learns(self, row: int) -> bool:
        """Whether an entity of that row of the model learns."""

    def phase(self, entity: str) -> int:
        """Block k of an entity holds the slots from k * block - phase on."""

    def weights(
        self, streams: Float32, rows: NDArray[np.int32], states: Sequence[Float32 | None]
    ) -> Float32:
        """How much each slot (E, T) teaches, 0 to 1."""

    def learn(
        self,
        row: int,
        state: Float32 | None,
        values: Float32,
        slots: NDArray[np.int64],
        weights: Float32,
        mean: Float32,
        scale: Float32,
    ) -> Float32:
        """Return the next state."""


class Learned(NamedTuple):
    """A state as of the end of slot `slot`; None before anything was learned."""

    slot: int
    state: Float32 | None


@dataclass
class Pupil:
    """One entity's states, oldest first; the last one is in force."""

    learner: Learner
    phase: int
    states: list[Learned] = field(default_factory=lambda: [Learned(_NEVER, None)])

    @property
    def state(self) -> Float32 | None:
        """What windows are read with now."""
        return self.states[-1].state

    def block_end(self, start: int, stop: int) -> int:
        """The first slot from `start` on that ends a block, or the last one before `stop`."""
        block = self.learner.block
        return min(start + (-(start + self.phase + 1)) % block, stop - 1)

    def ends_block(self, slot: int) -> bool:
        """Whether a block ends with this slot that has not been learned from yet."""
        return (slot + self.phase + 1) % self.learner.block == 0 and slot > self.states[-1].slot

    def settled(self, slot: int) -> Learned:
        """Return the newest state as of `slot`, and forget those before it."""
        while len(self.states) > 1 and self.states[1].slot <= slot:
            self.states.pop(0)
        return self.states[0]
