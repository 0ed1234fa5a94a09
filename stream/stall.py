"""Partitions that are not read on although they grow: what a client that lost its way looks like.

position   5    5    5         begun again    3    3    3
end        9   10   12                       13   13   14
told                 stalled                           stalled again
"""

from collections.abc import Mapping

from kafka.structs import TopicPartition


class StallWatch:
    """Notices partitions that are not read on although they grow. Times are monotonic seconds."""

    def __init__(self, after_s: float) -> None:
        self.after_s = after_s
        self._next_look = 0.0
        # Where each partition stood (None: begun again, not looked at since) and ended, since
        # when, and whether it stalled before.
        self._stands: dict[TopicPartition, tuple[int | None, int, float, bool]] = {}

    def due(self, now: float) -> bool:
        """Whether it is time to look again: a look costs the broker a request."""
        if now < self._next_look:
            return False
        self._next_look = now + self.after_s / 4
        return True

    def look(
        self,
        positions: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
        now: float,
    ) -> dict[TopicPartition, bool]:
        """Return the partitions that stall, and of each whether it did so before (True)."""
        stalled = {}
        before, self._stands = self._stands, {}
        for partition, position in positions.items():
            end = ends[partition]
            stood, ended, since, again = before.get(partition, (None, end, now, False))
            stands: tuple[int | None, int, float, bool]
            stands = (position, end, now, again and stood is None)
            if position == stood and position < end:
                stands = (stood, ended, since, again)
                if now - since >= self.after_s and end > ended:
                    stalled[partition] = again
                    stands = (None, end, now, True)
            self._stands[partition] = stands
        return stalled
