"""What a terminal shows: a progress bar with the numbers that matter, and tables."""

import sys
from typing import Any


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
    """Print a result's tables (a Report has one), and under them the protocol."""
    from rich.console import Console
    from rich.table import Table

    from fewedges.measure.report import table

    console = Console()
    for header, rows in report.tables() if hasattr(report, "tables") else [table(report)]:
        grid = Table(*header)
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
    console.print(report.protocol())
