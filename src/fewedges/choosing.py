"""Which verb `fewedges sparsify` is: attention, a method for weights, or the stages of a recipe file; the latter two.

The command line is looked at once before it is parsed, because flags are the fields of the recipe that `--method` or
`--recipe` choose. Imports torch only inside the verb.
"""

import inspect
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fewedges.errors import RecipeError
from fewedges.progress import Progress
from fewedges.recipes import SparseAttention, read_recipe, to_dict
from fewedges.weight_recipes import METHODS, TRAINED, Distil, Gradual, Prune, Quantize, Rewind, Rewire, Tickets, Train

Model = Annotated[str, tyro.conf.Positional]
Verb = Callable[..., None]
if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[("attention", *METHODS, *TRAINED, "distil", "quantize")]


def sparsify_verb(words: Sequence[str], attention: Verb) -> Verb:
    """The verb that these words ask for, its flags the fields of its recipe, their defaults those of `--recipe`.

    Raises RecipeError when the file is no recipe for it, or is one of another method.
    """
    path, method = value_of(words, "--recipe"), value_of(words, "--method")
    given = None if path is None else read_recipe(path)
    kinds = recipe_kinds()
    if given is None and method not in kinds:
        return attention  # no such method: the parser says which there are
    if isinstance(given, tuple) and method is None:
        return with_settings(sparsify_weights, given)
    if given is None:
        kind = kinds[str(method)]
        given = kind() if method in ("attention", "distil", "quantize") else kind(method=str(method))
    elif type(given) is not (kinds.get(method, object) if method else type(given)):
        raise RecipeError(f"--method {method} --recipe {path}", f"a recipe of {_name(given)}", "one of the two")
    if isinstance(given, SparseAttention):
        return with_settings(attention, given)
    if isinstance(given, Tickets):
        return with_settings(sparsify_weights, (given,))
    if isinstance(given, Prune | Distil | Quantize | Train):
        return with_settings(sparsify_weights, given)
    raise RecipeError(f"sparsify --recipe {path}", f"a recipe of {_name(given)}", f"one for {', '.join(kinds)}")


def recipe_kinds() -> dict[str, type]:
    """The recipe of every method: for those that train it is the one that their row's schedule has."""
    by_schedule: dict[str, type] = {kind.schedule: kind for kind in (Train, Rewire, Gradual, Rewind)}
    training = {name: by_schedule[row.schedule] for name, row in TRAINED.items()}
    others = {"distil": Distil, "quantize": Quantize, "attention": SparseAttention}
    return {**dict.fromkeys(METHODS, Prune), **training, **others}


def sparsify_weights(
    model: Model,
    *,
    out: Path,
    data: str | None = None,
    recipe: Path | None = None,
    settings: Any = None,
    max_tokens: int | None = None,
    pause_minutes: float | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Prune, train, distil or quantize a model's weights; with a recipe of stages, in a row. Run again to resume.

    Example: fewedges sparsify smollm2 --method wanda --structure 2:4 --data my_text/ --out runs/pruned

    Args:
        model: Hub id, folder, .gguf file, `smollm2`, `addition`, or a run of this verb to go on from.
        out: Folder of the run: the result after every stage, and the checkpoint of a training.
        data: Text file, folder of text, or a hub dataset; `addition`, random, magnitude and quantize need none.
        recipe: YAML file of settings, which flags override, or of a list of stages (prune, train, distil, quantize).
        settings: The recipe.
        max_tokens: Training reads at most this many tokens of the data (needed for a hub dataset).
        pause_minutes: End this piece of a training after so many minutes; the same command goes on.
        device: cpu or cuda.
        dry_run: Load the model, resolve the recipe, print both, change nothing.
        json: Print one json object at the end.
    """
    from fewedges.sparsify import stages
    from fewedges.sparsify.attention.result import load

    if out.resolve() == Path(model).resolve():
        raise RecipeError(f"--out {out}", "it is the run to go on from", "another folder")
    given: Any = load(model, device=device)
    asked = settings if isinstance(settings, tuple) else (settings,)
    if dry_run:
        return print(f"{given}\n\n{[to_dict(stage) for stage in asked]}\n\nwould write to {out}")
    options: dict[str, Any] = {"max_tokens": max_tokens, "pause_minutes": pause_minutes}
    with Progress(quiet=json) as watch:
        done = stages.sparsify_weights(given, asked, data=data, out=out, watch=watch, **options)
    if json:
        facts = {"finished": done.finished, "density": done.masks.density, "nnz": done.masks.nnz}
        print(dumps({**facts, "stages": [to_dict(stage) for stage in done.stages]}, indent=2))
    else:
        print(f"{done}\nsaved in {out}" + ("" if done.finished else "; paused: run the same command to go on"))


def value_of(words: Sequence[str], flag: str) -> str | None:
    """What follows a flag, if it is there."""
    for place, word in enumerate(words):
        if word == flag and place + 1 < len(words):
            return words[place + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def with_settings(verb: Verb, given: Any) -> Verb:
    """The verb with this recipe's fields as flags and its values as their defaults; several recipes have no flags."""
    signature = inspect.signature(verb)
    parameters = dict(signature.parameters)
    several = isinstance(given, tuple)
    if several:
        del parameters["settings"]
    else:
        kind = Annotated[type(given), tyro.conf.arg(name="")]
        parameters["settings"] = parameters["settings"].replace(default=given, annotation=kind)
    if isinstance(given, Distil | Quantize):
        name = type(given).__name__.lower()
        method = inspect.Parameter("method", inspect.Parameter.KEYWORD_ONLY, default=name, annotation=Literal[name])  # type: ignore[valid-type]
        parameters["method"] = method

    def chosen(*args: Any, **kwargs: Any) -> None:
        if verb is sparsify_weights:  # its stages know their method
            kwargs.pop("method", None)
        verb(*args, **kwargs, **({"settings": given} if several else {}))

    chosen.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    chosen.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    chosen.__name__, chosen.__doc__ = verb.__name__, verb.__doc__  # not functools.wraps: tyro would read the old types
    return chosen


def _name(given: Any) -> str:
    return "several stages" if isinstance(given, tuple) else type(given).__name__
