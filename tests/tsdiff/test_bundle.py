"""What is written is read back; whatever is wrong with a bundle is said in one line."""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.train.simulated import anchor_bundle
from tsdiff.bundle import FORMAT, Bundle, load_bundle, make_bundle, save_bundle
from tsdiff.errors import BundleError, ConfigError


def test_round_trip(tmp_path: Path) -> None:
    bundle = anchor_bundle()
    version = save_bundle(bundle, tmp_path / "b")
    again = load_bundle(tmp_path / "b")
    assert version == bundle.version == again.version
    assert again.manifest == bundle.manifest
    assert again.arrays.keys() == bundle.arrays.keys()
    for name, array in bundle.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "manifest.json",
        "params.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_version_is_the_hash_of_the_manifest(tmp_path: Path) -> None:
    version = save_bundle(anchor_bundle(), tmp_path / "b")
    digest = hashlib.sha256((tmp_path / "b" / "manifest.json").read_bytes()).hexdigest()
    assert version == f"tsdiff@{digest[:12]}"


def test_an_older_bundle_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    save_bundle(anchor_bundle(), tmp_path / "b")
    other = make_bundle(
        msgspec.structs.replace(anchor_bundle().manifest, name="other"), anchor_bundle().arrays
    )
    assert save_bundle(other, tmp_path / "b") == load_bundle(tmp_path / "b").version
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(BundleError, match="found something else there"):
        save_bundle(other, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


@pytest.mark.parametrize("name", ["", "UPPER", "a/b", "x" * 65, "-a"])
def test_names_that_cannot_be_versions(name: str) -> None:
    manifest = msgspec.structs.replace(anchor_bundle().manifest, name=name)
    with pytest.raises(ConfigError, match="expected a bundle name"):
        make_bundle(manifest, {})


def edit_manifest(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        file = folder / "manifest.json"
        content = json.loads(file.read_bytes())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def flip_a_byte(folder: Path) -> None:
    file = folder / "params.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "not a bundle"),
    "no params": (lambda f: (f / "params.safetensors").unlink(), "lacks its file params"),
    "flipped byte": (flip_a_byte, "is damaged: params.safetensors"),
    "cut short": (lambda f: (f / "params.safetensors").write_bytes(b""), "is damaged"),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_bytes(b'{"kind": "tsdiff-bu'),
        "manifest.json is not readable",
    ),
    "older format": (
        edit_manifest(lambda m: m.update(format=FORMAT - 1)),
        f"has format {FORMAT - 1}, this tsdiff reads format {FORMAT}; train the bundle again",
    ),
    "newer format": (
        edit_manifest(lambda m: m.update(format=FORMAT + 1, novelty=[1])),
        f"has format {FORMAT + 1}, this tsdiff reads format {FORMAT}; upgrade tsdiff",
    ),
    "other kind": (edit_manifest(lambda m: m.update(kind="cake")), "expected kind"),
    "field lost": (edit_manifest(lambda m: m.pop("channels")), "channels"),
    "impossible setting": (
        edit_manifest(lambda m: m.update(model={"window": 0})),
        "is damaged: manifest.json: expected 1 <= hidden",
    ),
    "path outside": (
        edit_manifest(lambda m: m.update(files={"../../etc/passwd": "0"})),
        "should list the file",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    save_bundle(anchor_bundle(), tmp_path / "b")
    damage, message = DAMAGE[kind]
    damage(tmp_path / "b")
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(tmp_path / "b")
    assert "\n" not in str(caught.value)


class _Trap:
    """What runs when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self._sprung = sprung

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._sprung,)


@pytest.mark.parametrize("form", ["pickle", "npy", "npz"])
def test_a_hostile_bundle_is_refused_and_runs_nothing(form: str, tmp_path: Path) -> None:
    sprung, folder = tmp_path / "sprung", tmp_path / "b"
    trap = _Trap(sprung)
    save_bundle(anchor_bundle(), folder)
    params = folder / "params.safetensors"
    if form == "pickle":
        params.write_bytes(pickle.dumps(trap))
    else:
        with params.open("wb") as file:
            save = np.save if form == "npy" else np.savez
            save(file, np.array([trap], object))
    # Whoever writes a bundle can write the right hash as well.
    digest = hashlib.sha256(params.read_bytes()).hexdigest()
    edit_manifest(lambda m: m.update(files={params.name: digest}))(folder)
    with pytest.raises(BundleError, match="holds no arrays"):
        load_bundle(folder)
    assert not sprung.exists()
    # The trap is a real one: whatever unpickled it would spring it.
    pickle.loads(pickle.dumps(trap))  # noqa: S301 - made three lines above
    assert sprung.exists()


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="found none; make it with `tsdiff train"):
        load_bundle(tmp_path / "nowhere")


def test_a_bundle_without_an_array_is_refused_by_the_detector() -> None:
    from tsdiff.detector import Detector

    bundle = anchor_bundle()
    arrays = {name: array for name, array in bundle.arrays.items() if name != "band_scale"}
    with pytest.raises(BundleError, match="lacks the array 'band_scale'"):
        Detector(replace(bundle, arrays=arrays))


def test_bundle_is_plain_data() -> None:
    assert isinstance(anchor_bundle(), Bundle)
    assert {array.dtype.name for array in anchor_bundle().arrays.values()} == {"float32", "int32"}
