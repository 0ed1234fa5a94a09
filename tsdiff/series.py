"""A whole series of one entity, scored in one go, as the service would that met it slot by slot."""

import numpy as np
from numpy.typing import NDArray

from tsdiff.detector import Detection, Detector
from tsdiff.types import FloatArray
from tsdiff.windows import extended

SHAPES = ((1, 256),)
"""What to compile a detector for that scores one entity at a time: all slots are there at once."""


def score_series(
    detector: Detector,
    entity: str,
    values: FloatArray,
    *,
    mean: FloatArray,
    scale: FloatArray,
    numbers: NDArray[np.int64],
    first: int = 0,
    start: int = 0,
) -> Detection:
    """Score the slots from `start` on of raw `values` (M, D) on the grid, shapes (M - start, ...).

    `numbers` (M,) are the slots' own, and nothing before position `first` is scored, which fills
    the first window. Where the entity goes on learning, all from `first` on is read; else what
    smoothing needs. Slots after the end count as missing.

    Raises:
        ValueError: there is nothing to score.

    """
    row, lag, before = detector.row(entity), detector.lag, detector.window - 1
    rows = np.array([row], np.int32)
    adaptation = detector.adaptation
    learns = adaptation is not None and adaptation.learns(row)
    begin = first if learns else max(first, start - detector.history)
    padded = np.full((before + len(values) + lag, values.shape[1]), np.nan, np.float32)
    padded[before : before + len(values)] = values
    slots = extended(numbers, before, lag)
    weights = np.zeros(len(padded), np.float32)
    history = np.full((1, detector.history, detector.streams), np.nan, np.float32)
    state: FloatArray | None = None
    ends = [len(values)]
    if learns and adaptation is not None:
        block = (numbers + adaptation.phase(entity)) // adaptation.block
        ends = [*(np.flatnonzero(np.diff(block)) + 1).tolist(), len(values)]
    result: Detection | None = None
    for end in ends:
        if end <= begin:
            continue
        found = detector.detect(
            padded[None, begin : before + end + lag],
            slots[None, begin : before + end + lag],
            np.array([end - begin], np.int32),
            mean[None],
            scale[None],
            rows,
            history,
            [state],
        )
        history = np.concatenate([history, found.streams], 1)[:, end - begin :]
        if result is None:
            result = Detection(
                *(np.full((len(values), *part.shape[2:]), np.nan, np.float32) for part in found)
            )
        for whole, part in zip(result, found, strict=True):
            whole[begin:end] = part[0]
        if adaptation is not None and learns:
            read = slice(before + begin + lag, before + end + lag)
            weights[read] = adaptation.weights(found.streams, rows, [state])[0]
            # Of what is known by now: `lag` slots more than are scored.
            taught = slice(max(read.stop - adaptation.block, 0), read.stop)
            context = slice(max(taught.start - adaptation.context, 0), read.stop)
            teaching = weights[context].copy()
            teaching[: taught.start - context.start] = 0.0
            state = adaptation.learn(
                row, state, padded[context], slots[context], teaching, mean, scale
            )
        begin = end
    if result is None:
        raise ValueError(f"expected more than {first} slots, got {len(values)}")
    return Detection(*(whole[start:] for whole in result))
