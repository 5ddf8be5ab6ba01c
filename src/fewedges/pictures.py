"""Results as pictures: what the verbs `draw`, `explain` and `demo` write. Computes nothing that it shows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any


def draw_prompt(
    what: Any, prompt: str, out: Path, *, name: str = "prompt", theme: str = "light", hide_first: bool = False
) -> list[Path]:
    """Write connectivity and attention maps of a prompt, every model side by side; return the files.

    With `hide_first`, edges from later tokens to the first one (attention sinks) are left out of the connectivity.
    """
    from fewedges.draw import connectivity, heads, panels, save
    from fewedges.measure.attention import attention

    maps = attention(what, prompt)
    title = " ".join(prompt.split())[:90]
    lines = {label: _without_first(found) for label, found in maps.items()} if hide_first else maps
    note = " (edges to the first token not drawn)" if hide_first else ""
    out.mkdir(parents=True, exist_ok=True)
    files = save(connectivity(panels(lines), title=title + note, theme=theme), out / f"connectivity-{name}-{theme}")
    return files + save(heads(panels(maps), theme=theme), out / f"heads-{name}-{theme}")


def _without_first(found: Any) -> Any:
    weights, opened = found.weights.copy(), found.open.copy()
    weights[:, :, 1:, 0], opened[:, :, 1:, 0] = 0.0, False
    return found._replace(weights=weights, open=opened)


def draw_explained(found: Sequence[Any], out: Path, *, name: str = "", theme: str = "light") -> list[Path]:
    """Write the curves of explained tasks, one column each, and both models' circuits of each; return the files."""
    end = f"{'-' if name else ''}{name}-{theme}"
    files = draw_effects(found, out / f"explained-effect{end}", theme=theme)
    for one in found:
        task = "".join(c if c.isalnum() else "-" for c in one.task.lower()).strip("-")
        files += draw_circuits(one, out / f"circuit-{task}{end}", theme=theme)
    return files


def draw_effects(
    found: Sequence[Any], stem: Path, *, title: str = "", theme: str = "light", again: Sequence[Sequence[Any]] = ()
) -> list[Path]:
    """Write the curves of explained tasks, one column each; the title says models, ablation and prompts.

    `again` holds, for each task, the results of other runs alike: lines are then their mean, ratios geometric
    means, bands over runs and prompts.
    """
    from fewedges.draw import save
    from fewedges.draw.curve import explained_effect

    stem.parent.mkdir(parents=True, exist_ok=True)
    title = "; ".join([title or ", ".join(sorted({one.model for one in found})), *_protocol(found)])
    runs = max((1 + len(others) for others in again), default=1)
    interval = "95% interval" if runs == 1 else f"mean of {runs} runs, 95% interval over runs and prompts"
    effects = [_effects(one, others) for one, others in zip(found, again or [()] * len(found), strict=True)]
    return save(explained_effect(effects, title=title, interval=interval, theme=theme), stem)


def _protocol(found: Sequence[Any]) -> list[str]:
    """What all these results share: their ablation, and how many prompts were measured."""
    ablations = {one.facts.get("ablation") for one in found} - {None}
    prompts = {len(curve.full) for one in found for curve in one.curves.values()}
    said = [f"{'/'.join(sorted(ablations))} ablation"] if ablations else []
    return [*said, f"{'–'.join(map(str, sorted({min(prompts), max(prompts)})))} held-out prompts"]


def draw_circuits(found: Any, stem: Path, *, theme: str = "light") -> list[Path]:
    """Write the dense and the sparse circuit of an explained task side by side; nothing where neither is known."""
    from fewedges.draw import circuits, save

    stem.parent.mkdir(parents=True, exist_ok=True)
    panels = [_circuit(found, label) for label in ("dense", "sparse") if found.circuits.get(label)]
    return save(circuits(panels, title=found.task, theme=theme), stem) if panels else []


def draw_positions(
    what: Any, found: dict[str, Any], prompt: str, out: Path, *, count: int = 5, name: str = "", theme: str = "light"
) -> list[Path]:
    """Write the attention maps of the heads that carry most, sparse above dense, with what carries the task marked.

    `found` holds the token edges of each model (TokenEdges), `prompt` the text of their first prompt.
    """
    from fewedges.draw import panels, save
    from fewedges.draw.maps import HeadMaps, maps
    from fewedges.measure.attention import attention

    seen = attention(what, prompt)
    labels = [label for label in ("sparse", "dense") if label in found]
    chosen = list(found[labels[0]].heads())[:count]
    rows = []
    for label in labels:
        model = found[label].model
        title = f"Sparse {model}" if label == "sparse" else f"{model} (baseline)"
        rows.append(_maps(HeadMaps, replace(*panels({label: seen[label]}), title=title), found[label], chosen))
    return save(maps(rows, theme=theme), out / f"maps{'-' if name else ''}{name}-{theme}")


def _maps(make: Any, panel: Any, found: Any, chosen: list[str]) -> Any:
    marked, notes = found.carrying(0, chosen), {}
    for one in marked.values():
        line = f"{one.query} reads {one.key} {one.score:+.2f}".replace("-", "\u2212")
        notes.setdefault(one.head, []).append(line)
    return make(panel=panel, heads=chosen, marks={at: one.score for at, one in marked.items()}, notes=notes)


def draw_attention_circuits(found: dict[str, Any], out: Path, *, name: str = "", theme: str = "light") -> list[Path]:
    """Write the curves over attention edges of explained tasks (title -> AttentionExplained); return the files."""
    from fewedges.draw import save
    from fewedges.draw.curve import explained_effect

    out.mkdir(parents=True, exist_ok=True)
    effects = [_of_attention(_effects(one), title) for title, one in found.items()]
    figure = explained_effect(effects, counted="attention edges", theme=theme)
    return save(figure, out / f"attention-circuits{'-' if name else ''}{name}-{theme}")


def _of_attention(task: Any, title: str) -> Any:
    """Random edges touch nearly all heads at once: over heads their line says nothing."""
    edges = [replace(curve, label=curve.label.replace("circuits", "edges")) for curve in task.edges]
    return replace(task, title=title, edges=edges, heads=[curve for curve in task.heads if "random" not in curve.label])


def _effects(found: Any, again: Sequence[Any] = ()) -> Any:
    """Dense first, sparse last: what draw compares. Between them the control and random circuits."""
    from fewedges.draw.curve import Effects
    from fewedges.explain.over_seeds import check_alike

    check_alike([found, *again])
    labels = [label for label in ("dense", "control", "dense, random", "sparse") if label in found.curves]
    seen = {label: [one.curves[label] for one in (found, *again) if label in one.curves] for label in labels}
    shown = {count: [_curve(seen[label], label, count) for label in labels] for count in ("edges", "heads")}
    return Effects(title=found.task, edges=shown["edges"], heads=shown["heads"])


def _curve(seen: Sequence[Any], label: str, count: str) -> Any:
    """The mean line of all runs and their band; a count that repeats is drawn once, at its best circuit."""
    import numpy as np

    from fewedges.draw.curve import Curve
    from fewedges.explain.over_seeds import band, crossing, line

    sizes, effect, (low, high) = getattr(seen[0], count), line(seen, count), band(seen, count)
    kept = [np.flatnonzero(sizes == size)[effect[sizes == size].argmax()] for size in np.unique(sizes)]
    reached = crossing(seen, count)
    at = reached if np.isfinite(reached) else None
    named = label.replace("dense, random", "random circuits")
    return Curve(label=named, edges=sizes[kept], effect=effect[kept], low=low[kept], high=high[kept], reached=at)


def _circuit(found: Any, label: str) -> Any:
    from fewedges.draw.circuit import CircuitPicture

    shape = found.facts["graphs"][label]
    reached = found.curves[label].edges_at(0.9)
    title = f"Sparse {found.model}" if label == "sparse" else f"{found.model} (baseline)"
    caption = f"0.9 of the effect at {reached:,.0f} edges"
    return CircuitPicture(title=title, edges=found.circuits[label], caption=caption, **shape)
