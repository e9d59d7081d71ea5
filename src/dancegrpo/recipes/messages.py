"""Validation errors in one line: which setting, which value, what is expected, what was perhaps meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]
Model = type[BaseModel]


def explain(error: ValidationError, model: Model, data: Mapping[str, Any]) -> str:
    """The complaints of `error` about `data`, joined by `; ` on one line, unknown settings first."""
    found: dict[tuple[str, bool], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault((_dotted(_path(model, detail["loc"])), detail["type"] == "extra_forbidden"), []).append(detail)
    # The branches of a union each complain: the one that got further into the value knows more.
    kept = [at for at in found if not any(other.startswith(at[0] + ".") for other, _ in found)]
    kept.sort(key=lambda at: not at[1])
    return "; ".join(_line(found[at], model, data) for at in kept)


def _line(details: Sequence[ErrorDetails], model: Model, data: Mapping[str, Any]) -> str:
    first = details[0]
    path = _path(model, first["loc"])
    key, value = _dotted(path), first["input"]
    match first["type"]:
        case "extra_forbidden":
            return _unknown(path, value, model, data)
        case "missing":
            return f"{key} is missing: add it to the recipe, or give {key}=VALUE"
        case "value_error":
            # A validator of a group starts with the field's name.
            return ".".join(filter(None, [key, first["msg"].removeprefix("Value error, ")]))
    rules = list(dict.fromkeys(_rule(detail) for detail in details))
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    hint = ""
    if first["type"] == "string_type" and isinstance(value, (int, float)):
        hint = f": put quotes around it ('{key}=\"{value}\"' on a command line)"
    return f"{key}={shown} must {' or '.join(rules).replace(' or be ', ' or ')}{hint}"


def _rule(detail: ErrorDetails) -> str:
    """Pydantic's sentence as what follows on `must`."""
    if detail["type"] in ("model_type", "dict_type"):
        return "be a mapping of settings"
    text = re.sub(r"^\w+ should ", "", detail["msg"])
    text = re.sub(r", unable to parse .*", "", text)
    for pydantic, ours in {
        "a valid tuple": "a list",
        "a valid integer": "an integer",
        "a valid boolean": "true or false",
    }.items():
        text = text.replace(pydantic, ours)
    return text.replace("a valid ", "a ").replace("input was not a JSON value", "be a plain value, a list or a mapping")


def _unknown(path: Path, value: Any, model: Model, data: Mapping[str, Any]) -> str:
    # An override below a misspelt group: name the setting the user wrote, to its end.
    while isinstance(value, Mapping) and len(value) == 1:
        (part, value), *_ = value.items()
        path = (*path, part)
    key = _dotted(path)
    near = _nearest(path, model, data)
    if near == key:
        return f"unknown setting {key!r} with dots in its name: nest it in a file, dots are for overrides"
    if near:
        return f"unknown setting {key}: the nearest is {near}"
    parent = path[:-1]
    while parent and _group(_annotation(model, parent)) is None:
        parent = parent[:-1]
    group = _group(_annotation(model, parent)) or model
    return f"unknown setting {key}: {_dotted(parent) or 'a run'} has {', '.join(group.model_fields)}"


def _nearest(path: Path, model: Model, data: Mapping[str, Any]) -> str | None:
    """The existing key most like `path`: first beside it, then of that name in any group, then by the whole key."""
    key, last, parent = _dotted(path), str(path[-1]), path[:-1]
    group = _group(_annotation(model, parent))
    beside = difflib.get_close_matches(last, group.model_fields, 1, 0.6) if group else []
    if beside:
        return _dotted((*parent, beside[0]))
    keys = list(_keys(model, data))
    names = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in keys}, 1, 0.8)
    if group and not names and parent:
        return None
    same = [name for name in keys if names and name.rpartition(".")[2] == names[0]]
    return next(
        iter(difflib.get_close_matches(key, same, 1, 0.0) or difflib.get_close_matches(key, keys, 1, 0.75)), None
    )


def _keys(annotation: Any, data: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key below an annotation; those of a free mapping by the names that `data` has."""
    data = data if isinstance(data, Mapping) else {}
    if get_origin(annotation) is dict:
        children = {str(name): get_args(annotation)[1] for name in data}
    else:
        group = _group(annotation)
        children = {name: field.annotation for name, field in group.model_fields.items()} if group else {}
    for name, below in children.items():
        yield prefix + name
        yield from _keys(below, data.get(name), f"{prefix}{name}.")


def _path(model: Model, loc: Path) -> Path:
    """Pydantic's location without the names of union branches."""
    path: Path = ()
    for part in loc:
        here = _annotation(model, path)
        items = any(get_origin(branch) is tuple for branch in (here, *get_args(here)))
        if part != "[key]" and (_group(here) or get_origin(here) is dict or (items and isinstance(part, int))):
            path = (*path, part)
    return path


def _annotation(model: Model, path: Path) -> Any:
    """The type at a dotted path, None where the path leaves the settings."""
    here: Any = model
    for part in path:
        group = _group(here)
        if get_origin(here) is dict:
            here = get_args(here)[1]
        elif group and part in group.model_fields:
            here = group.model_fields[str(part)].annotation
        else:
            return None
    return here


def _group(annotation: Any) -> Model | None:
    """The settings group of `Group` or `Group | None`."""
    if get_origin(annotation) is dict:
        return None
    for branch in (annotation, *get_args(annotation)):
        if isinstance(branch, type) and issubclass(branch, BaseModel):
            return branch
    return None


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
