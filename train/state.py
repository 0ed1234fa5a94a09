"""What training carries from step to step, and its checkpoints."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from tsdiff.errors import ConfigError, TsdiffError


class TrainState(NamedTuple):
    """All of it: a resumed run knows nothing else of the interrupted one.

    `best` are the averaged parameters of the evaluation with the lowest held-out loss,
    `bad` the evaluations since.
    """

    step: Array
    params: dict[str, Array]
    ema: dict[str, Array]
    optimizer: Any
    best: dict[str, Array]
    best_loss: Array
    bad: Array


def remove_checkpoints(folder: Path) -> None:
    """Remove a folder of checkpoints; a folder that holds anything else is left alone.

    Raises:
        ConfigError: it does hold something else.

    """
    if not folder.exists():
        return
    foreign = [entry.name for entry in folder.iterdir() if not entry.name.split(".")[0].isdigit()]
    if not folder.is_dir() or foreign:
        raise ConfigError(
            f"expected {folder} to hold training checkpoints only, found {foreign[0]!r}; "
            "give another --checkpoint-dir"
        )
    shutil.rmtree(folder)


def _orbax() -> Any:  # noqa: ANN401  (orbax ships no types)
    try:
        return import_module("orbax.checkpoint")
    except ModuleNotFoundError as error:
        raise TsdiffError(
            "checkpoints need the package orbax-checkpoint, which is not installed; "
            "install it with: pip install 'tsdiff[train]'"
        ) from error


class Checkpoints:
    """Orbax checkpoints of one training run in a folder of their own.

    `identity` (hex) says which data, settings and seed the run belongs to: another run's
    checkpoints are refused rather than mixed in.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._ocp = _orbax()
        self._folder = folder.absolute()
        self._identity = np.frombuffer(bytes.fromhex(identity), np.uint8)
        self._manager: Any = None

    def _open(self) -> Any:  # noqa: ANN401
        if self._manager is None:
            options = self._ocp.CheckpointManagerOptions(
                max_to_keep=2, create=True, enable_async_checkpointing=False
            )
            self._manager = self._ocp.CheckpointManager(self._folder, options=options)
        return self._manager

    def clear(self) -> None:
        """Remove all checkpoints."""
        self.close()
        remove_checkpoints(self._folder)

    def close(self) -> None:
        """Release the folder."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def save(self, state: TrainState) -> None:
        """Write a checkpoint; when this returns it is on disk."""
        leaves = jax.tree_util.tree_leaves(state)
        tree = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        tree["identity"] = self._identity
        manager = self._open()
        manager.save(int(state.step), args=self._ocp.args.StandardSave(tree))
        manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState | None:
        """Return the latest checkpoint, None when there is none.

        Raises:
            ConfigError: it belongs to other data, settings or seed.

        """
        if not self._folder.exists():
            return None
        manager = self._open()
        latest = manager.latest_step()
        if latest is None:
            return None
        leaves, structure = jax.tree_util.tree_flatten(like)
        wanted = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        wanted["identity"] = self._identity
        mismatch = ConfigError(
            f"expected checkpoints of this data, seed and settings in {self._folder}, found "
            "another run's; train without --resume, or with the same options as before"
        )
        try:
            tree = manager.restore(latest, args=self._ocp.args.StandardRestore(wanted))
        except (ValueError, KeyError) as error:
            raise mismatch from error
        if not np.array_equal(tree.pop("identity"), self._identity):
            raise mismatch
        parts = [jax.numpy.asarray(tree[name]) for name in sorted(tree)]
        restored: TrainState = jax.tree_util.tree_unflatten(structure, parts)
        return restored
