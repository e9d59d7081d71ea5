"""Recipes as plain data: YAML files with a base, and dotted overrides. `dancegrpo.config` validates the result."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dancegrpo.errors import ConfigError

FOLDER = Path(__file__).parent
"""The shipped recipes; a leading underscore marks parts that are only bases."""


def recipe_names() -> list[str]:
    """The shipped recipes, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A shipped name, a YAML file or a mapping, merged over its `base` recipes; not validated yet.

    A file that states no name is called after itself. Raises ConfigError.
    """
    if isinstance(recipe, Mapping):
        return _over_base(merge({}, recipe), Path(), ())
    path = _find(recipe, Path())
    return _over_base(_read_file(path), path.parent, (path,))


def merge(base: Any, top: Any) -> Any:
    """`top` over `base`: mappings key by key, at any depth; everything else, lists and null included, is replaced."""
    if isinstance(top, Mapping):
        under = base if isinstance(base, Mapping) else {}
        return {**under, **{key: merge(under.get(key), value) for key, value in top.items()}}
    return list(top) if isinstance(top, (list, tuple)) else top


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML that `read_recipe` reads back equal."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text that PyYAML leaves bare though it is read back as a number (1e5, as a revision may be) or a break."""


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    bare = re.fullmatch(r"(?![-+.\d])[^\x85\u2028\u2029\ufeff]*", value)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if bare else '"')


_Dumper.add_representer(str, _represent_text)


def apply_override(data: Mapping[str, Any], override: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with one `dotted.key=value` put in: the value is YAML, mappings merge, a number in the key is an item.

    defaults: what holds where `data` is silent, so that one item of a list can be changed. Raises ConfigError.
    """
    key, equals, text = override.partition("=")
    path = re.sub(r"\[(\w+)\]", r".\1", key.strip()).split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {override!r} is not key=value: write it like rollout.group_size=16")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: {_problem(error)}; quote the value") from error
    # An empty value is the empty string; `null` says none.
    value = parsed["value"] if text.strip() else ""
    result: dict[str, Any] = _put(data, path, value, defaults, ".".join(path))
    return result


def _put(node: Any, path: Sequence[str], value: Any, default: Any, key: str) -> Any:
    """`node` with `value` at `path`; where node is absent, a default list is copied and mappings are made."""
    if not path:
        return merge(node, value)
    part, *rest = path
    if node is None:
        node = default if isinstance(default, (list, tuple)) and part.isdigit() else {}
    if isinstance(node, (list, tuple)):
        if not part.isdigit() or int(part) >= len(node):
            raise ConfigError(f"{key}: {part} is not an item of a list of {len(node)}: use 0 to {len(node) - 1}")
        items = list(node)
        items[int(part)] = _put(items[int(part)], rest, value, None, key)
        return items
    if not isinstance(node, Mapping):
        raise ConfigError(
            f"unknown setting {key}: {key.removesuffix('.' + '.'.join(path))} is a single value, {node!r}"
        )
    below = default.get(part) if isinstance(default, Mapping) else None
    return {**node, part: _put(node.get(part), rest, value, below, key)}


def _over_base(data: dict[str, Any], folder: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"base={base!r} must be the name or the path of one recipe")
    path = _find(base, folder, f"{chain[-1].name}: " if chain else "")
    if path in chain:
        circle = " -> ".join(step.name for step in (*chain[chain.index(path) :], path))
        raise ConfigError(f"recipes are each other's base: {circle}; take one `base` out")
    below = _over_base(_read_file(path), path.parent, (*chain, path))
    # What is written about the base is no longer true of what stands over it.
    below.pop("description", None)
    merged: dict[str, Any] = merge(below, data)
    return merged


def _find(recipe: str | Path, folder: Path, asker: str = "") -> Path:
    """The file of a shipped name, else of a path from `folder` (with or without .yaml); `asker` opens the error."""
    if isinstance(recipe, str) and recipe in {path.stem for path in FOLDER.glob("*.yaml")}:
        return FOLDER / f"{recipe}.yaml"
    path = folder / Path(recipe).expanduser()
    for candidate in (path, path.with_name(path.name + ".yaml") if path.name else path):
        if candidate.is_file():
            return candidate.resolve()
    if isinstance(recipe, Path) or path.suffix in (".yaml", ".yml") or len(Path(recipe).parts) != 1:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"{asker}recipe file {path} {what}: name a YAML file or a shipped recipe (`dancegrpo recipes`)"
        )
    near = difflib.get_close_matches(recipe, recipe_names(), 1, 0.4)
    nearest = f"the nearest is {near[0]}, " if near else ""
    raise ConfigError(f"{asker}unknown recipe {recipe!r}: {nearest}`dancegrpo recipes` lists all")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror or error}") from error
    try:
        root = next((event for event in yaml.parse(text) if isinstance(event, yaml.NodeEvent)), None)
        if not isinstance(root, yaml.MappingStartEvent):
            raise ConfigError(f"recipe {path} is not a mapping of settings: write lines like `iterations: 100`")
        data = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {_problem(error)}") from error
    assert isinstance(data, dict)
    return {"name": path.stem, **{str(key): value for key, value in data.items()}}


def refuse_interpolation(data: Any, at: str = "") -> None:
    """Raises ConfigError at a value with `${`: OmegaConf would read it as a reference, to the environment even.

    A recipe is data: it runs nothing and looks nothing up.
    """
    if isinstance(data, Mapping):
        for key, value in data.items():
            refuse_interpolation(value, f"{at}.{key}" if at else str(key))
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            refuse_interpolation(value, f"{at}.{index}")
    elif isinstance(data, str) and "${" in data:
        raise ConfigError(f"{at}={data!r}: `${{` is refused, nothing is looked up in a recipe; write the value itself")


def _problem(error: Exception) -> str:
    """A parser's complaint in one line, with the place."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem}"
    return (str(error).splitlines() or [type(error).__name__])[0]
