"""What a terminal shows: a progress bar with the numbers that matter, and tables."""

import sys
from typing import Any

NAME = 16
"""Characters that the first column of a table keeps at least, where its cells have as many."""
WHOLE = 24
"""Longest cell that is never broken; a longer one (a sentence) is broken at its blanks."""
BORDER = 3
"""Characters a column takes up beside its cells: a line and two blanks."""


class Progress:
    """A progress bar with the numbers that matter; plain lines where there is no terminal, nothing when quiet."""

    def __init__(self, *, quiet: bool):
        self.quiet, self.bar, self.task = quiet, None, None

    def __enter__(self) -> Any:
        if self.quiet:
            return None
        if not sys.stderr.isatty():
            return lambda record: print(_line(record), file=sys.stderr, flush=True)
        from rich import progress
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn())
        self.bar = progress.Progress(*columns, console=Console(stderr=True))
        self.bar.start()
        self.task = self.bar.add_task("starting", total=1.0)
        return lambda record: self.bar.update(self.task, completed=record["progress"], description=_line(record))  # type: ignore[union-attr, arg-type]

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


def _line(record: dict[str, Any]) -> str:
    """One log record for a reader."""
    parts = [f"step {record['step']}", f"loss {record['loss']:.4f}", f"KL {record['kl']:.4f}"]
    if record["edges_per_query_per_head"] is not None:
        parts += [
            f"edges/query/head {record['edges_per_query_per_head']:.3f}",
            f"multiplier {record['multiplier']:.2e}",
        ]
    if "open_heads" in record:
        parts.append(f"heads {record['open_heads']:.0f}")
    left = record["seconds"] * (1 / max(record["progress"], 1e-9) - 1)
    return "  ".join([*parts, f"{record['tokens_per_second']:,} tokens/s", f"{left:.0f} s left"])


def print_table(report: Any) -> None:
    """Print a result's tables (a Report has one), and under them the protocol.

    Into a pipe or a file they are plain Markdown, a line a row. On a terminal no number is ever cut: names are
    folded first, and columns that still do not fit stand in a further table.
    """
    from fewedges.measure.report import table

    tables = report.tables() if hasattr(report, "tables") else [table(report)]
    if not sys.stdout.isatty():
        for header, rows in tables:
            print(*(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)), "", sep="\n")
        print(report.protocol())
        return
    from rich.console import Console

    console = Console()
    for header, rows in tables:
        for part in _fitting(header, rows, console.width):
            lines = [[cells[i] for i in part] for cells in (header, *rows)]
            wide = Console(width=max(console.width, _name(lines) + sum(_widths(lines))))  # the terminal may break it
            wide.print(_grid(lines))
    console.print(report.protocol())


def _fitting(header: list[str], rows: list[list[str]], width: int) -> list[list[int]]:
    """Columns in groups that fit the width, each led by the first column, which may fold down to `NAME`."""
    first, widths = _name([header, *rows]), _widths([header, *rows])
    groups: list[list[int]] = []
    for index, mine in enumerate(widths, start=1):
        if not groups or first + sum(widths[i - 1] for i in groups[-1][1:]) + mine > width:
            groups.append([0])
        groups[-1].append(index)
    return groups or [[0]]


def _name(lines: list[list[str]]) -> int:
    """What the first column needs, with the line at the right end."""
    return min(NAME, max(len(cells[0]) for cells in lines)) + BORDER + 1


def _widths(lines: list[list[str]]) -> list[int]:
    """What each further column needs: its longest cell whole, its header broken at blanks."""
    header, *rows = lines
    columns = zip(*([cells[1:] for cells in rows] or [header[1:]]), strict=True)
    parts = [[*name.split(), *map(_whole, cells)] for name, cells in zip(header[1:], columns, strict=True)]
    return [max(map(len, [*words, ""])) + BORDER for words in parts]


def _whole(cell: str) -> str:
    """The longest part of a cell that stays on one line."""
    return cell if len(cell) <= WHOLE else max(cell.split(), key=len)


def _grid(lines: list[list[str]]) -> Any:
    """A table, header first; only its first column may be narrower than its cells."""
    from rich.table import Table
    from rich.text import Text

    header, *rows = lines
    grid = Table()
    for name, width in zip(header, [1 + BORDER, *_widths(lines)], strict=True):
        grid.add_column(Text(name), min_width=width - BORDER, overflow="fold")
    for cells in rows:
        grid.add_row(*(Text(cell) for cell in cells))
    return grid
