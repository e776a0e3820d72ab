"""Trees of plain values and tensors as JSON and named tensors, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# an object with one of these keys alone stands for what JSON has no form of
TENSOR, TUPLE, ITEMS = "$tensor", "$tuple", "$items"


def pack(tree: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Take the tensors out of a tree.

    Args:
        tree: dicts, lists, tuples, text, numbers, None and tensors, nested as they like.

    Returns:
        JSON in which a name stands for each tensor, and copies of the tensors on the CPU by name.

    Raises:
        TypeError: the tree holds something else.
    """
    tensors: dict[str, Tensor] = {}
    return json.dumps(_plain(dict(tree), "", tensors)), tensors


def unpack(text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Rebuild the tree of `pack`.

    Raises:
        ValueError: the text is not of that form.
        KeyError: a tensor is missing.
    """
    tree = _tree(json.loads(text), tensors)
    if not isinstance(tree, dict):
        raise ValueError(f"must be a JSON object, got {type(tree).__name__}")
    return tree


def _plain(value: object, name: str, tensors: dict[str, Tensor]) -> Any:
    def inner(part: object, key: object) -> Any:
        return _plain(part, f"{name}.{key}" if name else str(key), tensors)

    match value:
        case Tensor():
            # a copy: two names may share storage, and the run goes on
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {TENSOR: name}
        case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: inner(part, key) for key, part in value.items()}
        case dict():
            return {ITEMS: [[key, inner(part, key)] for key, part in value.items()]}
        case tuple():
            return {TUPLE: [inner(part, i) for i, part in enumerate(value)]}
        case list():
            return [inner(part, i) for i, part in enumerate(value)]
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"a checkpoint must hold plain values and tensors, got {name}: {value!r}")


def _tree(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    match value:
        case {"$tensor": name, **rest} if not rest:
            return tensors[name]
        case {"$tuple": parts, **rest} if not rest:
            return tuple(_tree(part, tensors) for part in parts)
        case {"$items": items, **rest} if not rest:
            return {key: _tree(part, tensors) for key, part in items}
        case dict():
            return {key: _tree(part, tensors) for key, part in value.items()}
        case list():
            return [_tree(part, tensors) for part in value]
    return value
