"""The layers a configuration is made of, and how to say in one line what is wrong with one.

A layer is a nested mapping and where it came from: a YAML file, the environment, the options of a
command. Only `stream.config` uses this.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError

from tsdiff.errors import ConfigError

Key = tuple[str, ...]
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Layer:
    """Settings of one origin; `place(key)` says where a key of it stands, for the reader."""

    values: Mapping[str, Any]
    place: Callable[[Key], str]


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """Make one nested mapping of all layers; the later ones win, key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge_into(merged, layer.values)
    return merged


def _merge_into(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            below = target.get(key)
            target[key] = dict(below) if isinstance(below, Mapping) else {}
            _merge_into(target[key], value)
        else:
            target[key] = value


def yaml_layer(path: Path, settings: type[BaseSettings]) -> Layer:
    """Read a YAML file; an empty file, and an empty section, are empty settings."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a settings file, got nothing there") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path}: expected a readable YAML file: {reason}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: expected YAML: {one_line(error.problem or '')}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected YAML: {one_line(str(error))}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as input:, got {_shown(values)}")
    for section, value in values.items():
        # `grid:` with everything in it commented out is not a mistake.
        if value is None and section in settings.model_fields:
            values[section] = {}
    lines: dict[Key, int] = {}
    for key, number in _yaml_lines(root, ()):
        if key in lines:
            raise ConfigError(
                f"{path}:{number}: {'.'.join(key)}: expected once, got it on line {lines[key]} too"
            )
        lines[key] = number

    def place(key: Key) -> str:
        while key and key not in lines:
            key = key[:-1]
        return f"{path}:{lines[key]}" if key else str(path)

    return Layer(values, place)


def _yaml_lines(node: yaml.Node | None, prefix: Key) -> Iterator[tuple[Key, int]]:
    if not isinstance(node, yaml.MappingNode) or len(prefix) > 4:
        return
    for key_node, value_node in node.value:
        key = (*prefix, str(key_node.value))
        yield key, key_node.start_mark.line + 1
        yield from _yaml_lines(value_node, key)


def secret_keys(settings: type[BaseSettings]) -> set[str]:
    """Dotted keys whose values are secret."""
    return {".".join(key) for key in _leaves(settings, ()) if _secret(settings, key)}


def environment_layer(settings: type[BaseSettings]) -> Layer:
    """Read the environment variables named TSDIFF_SECTION__KEY."""
    prefix = str(settings.model_config.get("env_prefix", ""))
    keys = list(_leaves(settings, ()))
    single = {f"{prefix}{'_'.join(key)}".upper(): _variable(prefix, key) for key in keys}
    for name in os.environ:
        if not name.upper().startswith(prefix):
            continue
        if name.upper() in single:
            raise ConfigError(
                f"environment variable {name}: expected two underscores between section and key, "
                f"as in {single[name.upper()]}"
            )
        parts = name[len(prefix) :].lower().split("__")
        if len(parts) > 1 and parts[0] not in settings.model_fields:
            raise ConfigError(
                f"environment variable {name}: unknown key {'.'.join(parts)}"
                f"{_suggestion(tuple(parts), keys)}"
            )
    try:
        values = EnvSettingsSource(settings, case_sensitive=False)()
    except SettingsError as error:
        raise ConfigError(
            f"environment variables {prefix}*: expected one variable for each key, such as "
            f"{_variable(prefix, keys[0])}, not JSON: {one_line(str(error))}"
        ) from None
    return Layer(values, lambda key: f"environment variable {_variable(prefix, key)}")


def _variable(prefix: str, key: Key) -> str:
    return f"{prefix}{'__'.join(key)}".upper()


def overrides_layer(overrides: Mapping[str, Any]) -> Layer:
    """Take options, with dotted or nested keys; None is "not given"."""
    values: dict[str, Any] = {}
    for dotted, value in overrides.items():
        if value is None:
            continue
        nested: Any = overrides_layer(value).values if isinstance(value, Mapping) else value
        for part in reversed(dotted.split(".")):
            nested = {part: nested}
        _merge_into(values, nested)
    return Layer(values, lambda _: "option")


def read_secret_file(path: Path, key: str) -> str:
    """Read the secret in a file, without the line end that editors and `echo` add.

    Raises:
        ConfigError: the file cannot be read, or holds nothing.

    """
    try:
        secret = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{key}: expected a file with a secret at {path}: {reason}") from None
    if not secret:
        raise ConfigError(f"{key}: expected a secret in {path}, got an empty file")
    return secret


def describe_problem(
    error: ValidationError, layers: Sequence[Layer], settings: type[BaseSettings]
) -> str:
    """Say in one line what to mend first, and how many more problems there are."""
    problems = error.errors(include_url=False)
    # A misspelt required key is both unknown and missing: only the first says what to do.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return one_line(_describe(problems[0], layers, settings)) + more


def _describe(problem: ErrorDetails, layers: Sequence[Layer], settings: type[BaseSettings]) -> str:
    key = tuple(str(part) for part in problem["loc"])
    dotted = ".".join(key)
    place = _place(key, layers)
    if problem["type"] == "extra_forbidden":
        return f"{place}: {dotted}: unknown key{_suggestion(key, list(_leaves(settings, ())))}"
    if problem["type"] == "missing":
        key = _required_leaf(settings, key)
        field = _field(settings, key)
        what = (field.description if field else None) or "a value"
        variable = _variable(str(settings.model_config.get("env_prefix", "")), key)
        return (
            f"{place}: {'.'.join(key)}: expected {what[0].lower()}{what[1:]}, got nothing "
            f"(set it in the file, or as {variable})"
        )
    value = problem["input"]
    message = problem["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Input should be ", "expected ", message)
    if problem["type"] in {"model_type", "model_attributes_type", "dict_type"}:
        message = "expected keys below it"
    if ", got " not in message and "not built yet" not in message:
        message += f", got {'a hidden value' if _secret(settings, key) else _shown(value)}"
    return f"{place}: {dotted + ': ' if dotted else ''}{message}"


def _place(key: Key, layers: Sequence[Layer]) -> str:
    """Say where the value that won stands; where nothing was given, the file, if any."""
    for depth in range(len(key), 0, -1):
        for layer in reversed(layers):
            if _holds(layer.values, key[:depth]):
                return layer.place(key[:depth])
    return layers[0].place(()) if len(layers) > 2 else "settings"


def _holds(values: Any, key: Key) -> bool:  # noqa: ANN401
    for part in key:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _leaves(model: type[BaseModel], prefix: Key) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        key = (*prefix, field.alias or name)
        below = _model_of(field)
        if below is None:
            yield key
        else:
            yield from _leaves(below, key)


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _field(model: type[BaseModel], key: Key) -> FieldInfo | None:
    field: FieldInfo | None = None
    below: type[BaseModel] | None = model
    for part in key:
        if below is None:
            return None
        named = [f for n, f in below.model_fields.items() if part == (f.alias or n)]
        if not named:
            return None
        field = named[0]
        below = _model_of(field)
    return field


def _required_leaf(settings: type[BaseModel], key: Key) -> Key:
    field = _field(settings, key)
    below = _model_of(field) if field else None
    if below is None:
        return key
    for name, inner in below.model_fields.items():
        if inner.is_required():
            return _required_leaf(settings, (*key, inner.alias or name))
    return key


def _secret(settings: type[BaseModel], key: Key) -> bool:
    field = _field(settings, key)
    kind = field.annotation if field else None
    return "password" in key[-1:] or kind is SecretStr or SecretStr in get_args(kind)


def _suggestion(key: Key, known: list[Key]) -> str:
    """Name the nearest known key: by its last part in the same section first, then anywhere."""
    dotted = [".".join(k) for k in known]
    siblings = [k[len(key) - 1] for k in known if k[: len(key) - 1] == key[:-1]]
    near = difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join((*key[:-1], near[0]))}?"
    same_name = [name for k, name in zip(known, dotted, strict=True) if k[-1] == key[-1]]
    near = same_name[:1] or difflib.get_close_matches(".".join(key), dotted, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; expected one of {', '.join(dict.fromkeys(siblings or [k[0] for k in known]))}"


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "keys below it"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def one_line(text: str) -> str:
    """Turn every run of white space, line ends too, into one blank."""
    return " ".join(text.split())
