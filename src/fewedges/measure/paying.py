"""At which densities a way pays: where its line of speed-up against density lies at 1 or above.

Between measured points the line is straight on log axes; beyond them nothing is known. Needs no torch: pictures
read it too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Point = tuple[float, float]
"""Density and speed-up over dense."""


class Range(NamedTuple):
    """Densities at which a way is faster than dense."""

    low: float | None
    """Where it comes up through 1; None: it is faster at the lowest density timed."""
    high: float | None
    """Where it comes down through 1; None: it is faster at the highest density timed."""


def points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Density and speed-up of rows, from sparse to dense."""
    return sorted((row["density"], row["speedup"]) for row in rows)


def ranges(line: Sequence[Point]) -> list[Range]:
    """The ranges of density in which a line, sorted by density, lies at 1 or above."""
    faster = [False, *(gain >= 1 for _, gain in line), False]
    starts = [place for place in range(len(line)) if faster[place + 1] and not faster[place]]
    ends = [place for place in range(len(line)) if faster[place + 1] and not faster[place + 2]]
    return [
        Range(
            crossing(line[start - 1], line[start]) if start else None,
            crossing(line[end], line[end + 1]) if end + 1 < len(line) else None,
        )
        for start, end in zip(starts, ends, strict=True)
    ]


def crossing(one: Point, other: Point) -> float:
    """The density at which the line between two points, one on each side of 1, is at 1."""
    share = math.log(one[1]) / math.log(one[1] / other[1])
    return one[0] * (other[0] / one[0]) ** share


def said(line: Sequence[Point]) -> str:
    """Those ranges in words: "below 0.18", "between 0.05 and 0.22", "at all of 0.010 to 0.50", "never"."""
    return " and ".join(_said(found, line) for found in ranges(line)) or "never"


def _said(found: Range, line: Sequence[Point]) -> str:
    if found.low is not None and found.high is not None:
        return f"between {found.low:#.2g} and {found.high:#.2g}"
    if found.low is not None or found.high is not None:
        return f"above {found.low:#.2g}" if found.high is None else f"below {found.high:#.2g}"
    first, last = line[0][0], line[-1][0]
    return f"at {first:#.2g}" if len(line) == 1 else f"at all of {first:#.2g} to {last:#.2g}"


def brief(line: Sequence[Point]) -> str:
    """The same in signs, for a narrow place: "< 0.18", "0.050-0.22", "never"."""
    signs = {"at all of ": "", "between ": "", "below ": "< ", "above ": "> ", "at ": "", " to ": "-", " and ": "-"}
    texts = [_said(found, line) for found in ranges(line)]
    for word, sign in signs.items():
        texts = [text.replace(word, sign) for text in texts]
    return ", ".join(texts) or "never"


def together(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> list[dict[str, float]]:
    """Of one way's rows: all matrices of a model as one, each shape as often as in `counts`, sparse first.

    A point for every density asked for at which each shape was timed: `asked`, the `density` of all together, and
    the `speedup`, dense milliseconds over this way's, both summed.
    """
    found: dict[float, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["shape"] in counts:
            found.setdefault(row["asked"], {})[row["shape"]] = row
    whole = [_whole(asked, at, counts) for asked, at in found.items() if at.keys() == counts.keys()]
    return sorted(whole, key=lambda point: point["density"])


def _whole(asked: float, at: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> dict[str, float]:
    sizes = {shape: math.prod(map(int, shape.split("x"))) * n for shape, n in counts.items()}
    dense, ours = (sum(at[shape][name] * n for shape, n in counts.items()) for name in ("dense_ms_p50", "ms_p50"))
    kept = sum(at[shape]["density"] * size for shape, size in sizes.items())
    return {"asked": asked, "density": kept / sum(sizes.values()), "speedup": dense / ours}
