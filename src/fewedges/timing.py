"""The verb `hardware`: which kind of sparse weights pays on this device, as a table, advice and a picture.

Imports torch only inside the verb.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fewedges.progress import print_table

Model = Annotated[str | None, tyro.conf.Positional]


def hardware(
    model: Model = None,
    *,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    shapes: tuple[str, ...] | None = None,
    densities: tuple[float, ...] | None = None,
    rows: int | None = None,
    ways: tuple[str, ...] | None = None,
    repeats: int | None = None,
    quick: bool = False,
    clock: Literal["wall", "thread", "graph"] = "wall",
    seed: int = 0,
    theme: Literal["light", "dark"] = "light",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Time a linear layer dense and by every kind of sparse weights, and say at which density each starts to pay.

    Example: fewedges hardware --shapes 1024x4096 --densities 0.01 0.1 --quick

    Args:
        model: Time this model's own matrices, and weigh them as often as it has them.
        device: cpu or cuda.
        dtype: Default float32 on cpu, bfloat16 on cuda.
        shapes: Inputs x outputs, as 1024x4096; default the MLP of a GPT-2 medium.
        densities: Fractions of the weights that are kept.
        rows: Input vectors M; default 256 on cpu, 8192 on cuda.
        ways: Only these, such as csr "bsr 32" pixelated; default all, and what this device cannot do says why.
        repeats: Timed runs of each, interleaved with dense; default 30, of a way that is very slow fewer, at least 5.
        quick: One shape, three densities, 10 repeats where these are not given.
        clock: On cpu: wall time, or CPU time of the one thread (OMP_NUM_THREADS=1), for a machine others use too. On
            cuda: wall, what calls from Python take, or graph, what they take replayed as CUDA graphs.
        seed: Of weights, patterns and the order of runs.
        theme: Light or dark background.
        out: Folder for hardware.json and hardware.csv, written after every round (a shape at a density), and at the
            end two pictures: speed-up against density, and what a block costs. The same command goes on where a run
            was stopped; default: nothing is written.
        json: Print one json object instead of tables.
    """
    from fewedges.measure.speed import hardware as timed

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    asked = {"device": device, "shapes": shapes, "densities": densities, "rows": rows, "ways": ways, "repeats": repeats}
    with _stopping(out):
        found = timed(model, dtype=dtype, quick=quick, clock=clock, seed=seed, out=out, watch=tell, **asked)
    files = []
    if out is not None:
        files = [*found.save(out), *_pictures(found.to_dict(), out, theme)]
    if json:
        print(dumps(found.to_dict(), indent=2))
    else:
        print_table(found)
        print(*found.advice(), *files, sep="\n")


@contextmanager
def _stopping(out: Path | None) -> Iterator[None]:
    """Say after Ctrl-C what is in the folder, if something is."""
    from fewedges.errors import Interrupted
    from fewedges.measure.hardware import JSON, Hardware

    try:
        yield
    except KeyboardInterrupt as stop:
        if out is None or not (out / JSON).exists():
            raise
        left = f"stopped, {Hardware.load(out).unfinished or 'all rounds'} are in {out}"
        raise Interrupted("SIGINT", left, "the same command again: it goes on") from stop


def _pictures(found: dict[str, Any], out: Path, theme: str) -> list[Path]:
    """Draw the blocks that single weights cost, and the speed-ups."""
    from fewedges.draw import Covered, covered, save, speedups
    from fewedges.measure.ways import examples

    block = 16
    panels = [Covered(title=n, mask=p.mask().numpy(), block=block) for n, p in examples(block=block).items()]
    files = save(covered(panels, theme=theme), out / f"hardware-blocks-{theme}")
    return [*files, *save(speedups(found, theme=theme), out / f"hardware-{theme}")]
