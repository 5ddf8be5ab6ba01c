"""What every recipe checks its fields by: kind and range, with a message that names the field."""

import dataclasses
import math
import typing
from typing import Any, Literal

from fewedges.errors import RecipeError


def check(recipe: Any, names: str, holds: Any, wanted: str) -> None:
    """Check fields by name: of their kind, and `holds` true of them; None passes where it is allowed."""
    kinds = {f.name: f.type for f in dataclasses.fields(recipe)}
    for name in names.split():
        value, kind = getattr(recipe, name), kinds[name]
        if not fits(value, kind) or (value is not None and not holds(value)):
            raise bad(name, value, f"{wanted}{', whole' if kind in (int, int | None) else ''}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of its field's kind: finite, whole where int is asked, None where allowed."""
    if value is None:
        return type(None) in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(x, typing.get_args(kind)[0]) for x in value)
    if kind is bool:
        return isinstance(value, bool)
    numbers = int if kind in (int, int | None) else int | float
    return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)


def choices(recipe: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Names and options of the fields that are one of a few words."""
    fields = dataclasses.fields(recipe)
    return [(f.name, f.type.__args__) for f in fields if getattr(f.type, "__origin__", None) is Literal]  # type: ignore[union-attr]


def bad(name: str, value: Any, wanted: str) -> RecipeError:
    """The error that names the field, the value and what would do."""
    return RecipeError(f"recipe field {name}", f"{value!r}", f"a value {wanted}")
