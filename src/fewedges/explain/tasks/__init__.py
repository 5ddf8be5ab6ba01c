"""Tasks: pairs of clean and corrupt prompts that differ in what should come next.

prompts = prompts_for("ioi", tokenizer, count=128, corruption="s2_io_flip")
found = check_solved({"dense": dense.model, "sparse": sparse.model}, prompts)
search, held_out = prompts.split()

A new task is a file with a `generate(tokenizer, count, seed, **options) -> Prompts` and a line in TASKS.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fewedges.errors import DataError
from fewedges.explain.tasks import addition, docstring, files, greater_than, induction, ioi, ioi_long
from fewedges.explain.tasks.prompts import Metric, Prompts
from fewedges.explain.tasks.solved import Solved, accuracy, check_solved, last_logits

__all__ = [
    "TASKS",
    "Metric",
    "Prompts",
    "Solved",
    "accuracy",
    "check_solved",
    "last_logits",
    "prompts_for",
    "read_options",
]

COUNT = 128
TASKS: dict[str, Callable[..., Prompts]] = {
    "ioi": ioi.generate,
    "ioi_long": ioi_long.generate,
    "greater_than": greater_than.generate,
    "docstring": docstring.generate,
    "addition": addition.generate,
    "induction": induction.generate,
}
"""Name -> generator (tokenizer, count, seed, **options)."""


def prompts_for(task: str | Path, tokenizer: Any, count: int | None = None, seed: int = 0, **options: Any) -> Prompts:
    """Make prompts of a task by its name, or read them from a .csv, .jsonl or .json file (see `files`).

    `count` is 128 by default, and all rows of a file. DataError for a name or option that there is not, and if the
    tokenizer cannot express the task.
    """
    if files.is_file(task):
        check_options(task, files.generate, options)
        return files.generate(tokenizer, count, seed, **{"path": task, **options})
    make = TASKS.get(str(task).replace("-", "_"))
    if make is None:
        raise DataError(f"task {task!r}", "no such task", f"{', '.join(TASKS)}, or a .csv, .jsonl or .json file")
    check_options(task, make, options)
    return make(tokenizer, COUNT if count is None else count, seed, **options)


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """Read a task's options from words like `corruption=abc` or `layouts=[0,1]`: a value is read as YAML."""
    import yaml

    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise DataError(f"task option {word!r}", "no name=value", "corruption=s2_io_flip, length=30, skip=true")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise DataError(f"task option {word!r}", "a value that is no YAML", "name=value") from error
    return options


def check_options(task: str | Path, make: Callable[..., Prompts], options: dict[str, Any]) -> None:
    """Raise DataError for an option that a generator does not have."""
    known = [name for name, x in inspect.signature(make).parameters.items() if x.kind is x.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(known)):
        raise DataError(f"task {task}", f"no option {', '.join(unknown)}", f"its options: {', '.join(known) or 'none'}")
