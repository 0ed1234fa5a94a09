"""The bundle: what training makes and everything else reads. The only file here touching disk.

    bundle/manifest.json        format, names, configs, calibration facts, SHA-256 of the rest
    bundle/params.safetensors   every array

A bundle is immutable and content-addressed: its version is `name@<first 12 hex of SHA-256 of the
manifest>`, and the manifest holds the hash of the arrays. No times, paths or host facts are in it,
so the same data, settings and seed give the same version. No pickle anywhere.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from tsdiff.config import ModelConfig, NetworkConfig
from tsdiff.errors import BundleError, ConfigError
from tsdiff.flags import Flags

FORMAT = 12
MANIFEST = "manifest.json"
PARAMS = "params.safetensors"
_KIND = "tsdiff-bundle"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of a bundle but its arrays.

    `flags` are the channels that are on or off (`tsdiff.flags`); `network_weight` is the network's
    gate g (0: it was dropped, and `network` is None), `network_unexplained` the share of the
    anchor's held-out loss that it leaves (1 without one); `scorers` are those that it is calibrated
    for; `fingerprint` identifies the training data; `metrics` were measured on held-out data.
    """

    kind: str = _KIND
    format: int = FORMAT
    name: str
    period_ms: int
    channels: tuple[str, ...]
    units: tuple[str, ...]
    entities: tuple[str, ...]
    flags: tuple[str, ...]
    model: ModelConfig
    network: NetworkConfig | None
    network_weight: float
    network_unexplained: float
    scorers: tuple[str, ...]
    training: dict[str, int | float | str | bool]
    fingerprint: str
    metrics: dict[str, float]
    files: dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """A trained model: facts and arrays."""

    manifest: Manifest
    arrays: Mapping[str, NDArray[np.generic]]

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, in the order of every array."""
        return self.manifest.channels

    @property
    def units(self) -> tuple[str, ...]:
        """Unit of every channel, empty where unknown."""
        return self.manifest.units

    @property
    def flags(self) -> Flags:
        """Which channels are on or off, in the order of every array."""
        return tuple(name in self.manifest.flags for name in self.channels)

    @property
    def period_ms(self) -> int:
        """Milliseconds from slot to slot."""
        return self.manifest.period_ms

    @property
    def entities(self) -> tuple[str, ...]:
        """Entities of the training data; row i of the statistics is entity i's."""
        return self.manifest.entities

    @property
    def version(self) -> str:
        """`name@hash12`, the model version that every anomaly score carries."""
        digest = hashlib.sha256(_manifest_bytes(self.manifest)).hexdigest()
        return f"{self.manifest.name}@{digest[:12]}"


def make_bundle(manifest: Manifest, arrays: Mapping[str, NDArray[np.generic]]) -> Bundle:
    """Put a bundle together: checks its name and fills in the hash of the arrays."""
    if not _NAME.fullmatch(manifest.name):
        raise ConfigError(
            f"expected a bundle name of a-z, 0-9, '.', '_', '-' (at most 64), got {manifest.name!r}"
        )
    digest = hashlib.sha256(_array_bytes(arrays)).hexdigest()
    return Bundle(msgspec.structs.replace(manifest, files={PARAMS: digest}), dict(arrays))


def _array_bytes(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    ordered = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    return bytes(save_arrays(ordered))


def _manifest_bytes(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"


def save_bundle(bundle: Bundle, path: str | os.PathLike[str]) -> str:
    """Write `bundle` to the folder `path` in one step; return its version.

    A crash leaves either the old bundle or the new one. An existing bundle is replaced; anything
    else that stands at `path` is left alone.

    Raises:
        BundleError: `path` is something other than a bundle or an empty folder, or not writable.

    """
    target = Path(path)
    if target.exists() and not _replaceable(target):
        raise BundleError(
            f"expected {target} to be free or an older bundle, found something else there; "
            "give another path or move it away"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise BundleError(f"cannot write a bundle to {target}: {error.strerror}") from error
    try:
        _write(staging / PARAMS, _array_bytes(bundle.arrays))
        _write(staging / MANIFEST, _manifest_bytes(bundle.manifest))
        staging.chmod(0o755)  # mkdtemp's 0700 would lock out a service of another user
        _sync_folder(staging)
        if target.exists():
            # A folder cannot be renamed over a full one: move the old one aside first.
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / "bundle")
            staging.rename(target)
            shutil.rmtree(old)
        else:
            staging.rename(target)
        _sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise BundleError(f"cannot write a bundle to {target}: {error.strerror}") from error
    return bundle.version


def _replaceable(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return not names or (MANIFEST in names and names <= {MANIFEST, PARAMS})


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read and verify the bundle at `path`.

    Raises:
        BundleError: not a bundle, of another format, or a file is missing or damaged.

    """
    folder = Path(path)
    retrain = "make it with `tsdiff train DATA -o BUNDLE`"
    if not folder.is_dir():
        raise BundleError(f"expected a bundle folder at {folder}, found none; {retrain}")
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"expected {folder} to hold {MANIFEST}, it does not: not a bundle; {retrain}"
        ) from error
    manifest = _parse(folder, text)
    contents: dict[str, bytes] = {}
    for name, digest in manifest.files.items():
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise BundleError(
                f"bundle {folder} lacks its file {name}; copy the whole folder again"
            ) from error
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise BundleError(
                f"bundle {folder} is damaged: {name} does not have the SHA-256 that {MANIFEST} "
                "states; copy the whole folder again"
            )
    try:
        return Bundle(manifest, load_arrays(contents[PARAMS]))
    except (KeyError, SafetensorError) as error:
        raise BundleError(
            f"bundle {folder} is damaged: {PARAMS} holds no arrays ({_one_line(error)}); {retrain}"
        ) from error


class _Header(msgspec.Struct):
    kind: str = ""
    format: int = 0


def _parse(folder: Path, text: bytes) -> Manifest:
    """Read the header alone first: a newer format may hold fields that this version lacks."""
    try:
        header = msgspec.json.decode(text, type=_Header)
    except msgspec.DecodeError as error:
        raise BundleError(
            f"bundle {folder} is damaged: {MANIFEST} is not readable ({_one_line(error)}); "
            "copy the whole folder again"
        ) from error
    if header.kind != _KIND:
        raise BundleError(
            f"{folder / MANIFEST} is not the manifest of a tsdiff bundle: expected kind "
            f"{_KIND!r}, got {header.kind!r}"
        )
    if header.format != FORMAT:
        newer = "upgrade tsdiff, or " if header.format > FORMAT else ""
        raise BundleError(
            f"bundle {folder} has format {header.format}, this tsdiff reads format {FORMAT}; "
            f"{newer}train the bundle again with this version"
        )
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, ConfigError) as error:
        raise BundleError(
            f"bundle {folder} is damaged: {MANIFEST}: {_one_line(error)}; "
            "copy the whole folder again"
        ) from error
    if set(manifest.files) != {PARAMS}:
        raise BundleError(
            f"bundle {folder} is damaged: {MANIFEST} should list the file {PARAMS}, "
            f"it lists {sorted(manifest.files)}"
        )
    return manifest


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
