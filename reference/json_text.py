"""JSON texts that come from files, which anybody may have written."""

from __future__ import annotations

import json
from typing import Any


def parsed_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, an object names a key twice, or it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is no JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from None


def parsed_object(text: str | bytes) -> dict[str, Any]:
    """Return the object of a JSON text.

    Raises:
        ValueError: as `parsed_json`, or the value is no object.
    """
    value = parsed_json(text)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found
