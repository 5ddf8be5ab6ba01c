"""How far circuit scores by gradients can be trusted: against exact patching, and against the whole effect.

    OMP_NUM_THREADS=1 python scripts/attribution_quality.py --parts rank addition completeness real

    rank           rank correlation with exact patching, six families of tiny random models, five seeds
    addition       the same on the built-in addition model
    completeness   whether the scores out of the input sum to the whole effect: addition and tiny models, behind gates
    real           the same for SmolLM2-135M on IOI, dense and `smollm2-few-heads` (`fewedges get smollm2`; minutes)

Writes one json, part by part; parts that are not asked for keep what is there. The protocol of a part is the
docstring of its function, and goes into the file. Runs in a checkout only: tiny models and random prompts are those of
tests/tiny.py and tests/explain/pairs.py, so that tests and file tell of the same models. Everything runs on the CPU.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import fewedges as fe
from fewedges import store
from fewedges.explain.attribution import attribute
from fewedges.explain.evaluate import evaluate
from fewedges.explain.hooks import wire
from fewedges.explain.manifest import manifest_of
from fewedges.explain.patching import edge_effects
from fewedges.explain.tasks import prompts_for
from fewedges.model.anatomy import anatomy
from fewedges.sparsify.attention.interface import GatePass, attach_
from fewedges.sparsify.attention.result import gates_only

ROOT = Path(__file__).resolve().parent.parent
sys.path.extend([str(ROOT / "tests"), str(ROOT / "tests" / "explain")])

from pairs import random_prompts, rank_correlation  # noqa: E402

from tiny import tiny_model  # noqa: E402

FAMILIES = "gpt2 llama gpt-neox qwen2 opt olmo".split()
GATED = "gpt2 llama gpt-neox olmo qwen3".split()
KINDS = {"as drawn": 1, "6 times as large": 6, "mild": 3}
"""What the weights are, and how many times as large as the model's own initialisation draws them."""
METHODS = {"EAP": ("eap", 1)} | {f"EAP-IG, {steps} steps": ("eap-ig", steps) for steps in (5, 20, 64)}
METHODS |= {"EAP-IG of activations, 5 steps": ("eap-ig-activations", 5)}
CALL = "scripts/attribution_quality.py"


def agreement(wiring, prompts):
    """Every method's scores against exact patching: correlations (signed, absolute), equal signs (all, largest)."""
    real, found = wiring.graph.real, {}
    exact = edge_effects(wiring, prompts)[real]
    large = np.abs(exact) >= np.quantile(np.abs(exact), 0.75)
    for name, (method, steps) in METHODS.items():
        scores = attribute(wiring, prompts, method, steps=steps).edges[real]
        correlation = [rank_correlation(scores, exact), rank_correlation(np.abs(scores), np.abs(exact))]
        same = np.sign(scores) == np.sign(exact)
        found[name] = {"correlation": rounded(correlation), "sign": rounded([same.mean(), same[large].mean()])}
    return {"edges": wiring.graph.edges, "methods": found}


def rounded(numbers, digits=6):
    """As plain numbers for json."""
    return np.round(np.asarray(numbers, dtype=float), digits).tolist()


def random_model(name, seed, kind):
    """A tiny random model in float64, wired."""
    model = tiny_model(name, seed).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(KINDS[kind] / 6 if parameter.dim() > 1 else 1)  # tiny_model's are 6 times those drawn
        if kind == "mild":
            model.get_input_embeddings().weight.add_(torch.randn(32))
    return wire(model, anatomy(model))


def rank(seeds=range(5)):
    """Spearman's rank correlation of edge scores with exact patching of each edge alone (counterfactual), all edges.

    Tiny random models (2 layers, 4 heads, width 32, float64), 8 random prompts that differ from their corrupt ones in
    tokens 2 to 4; a seed draws model and prompts. Matrices are as drawn by the model's own initialisation or 6 times as
    large; mild: 3 times as large, and one random vector added to all token embeddings, so that they are much alike.
    `correlation`: signed scores, absolute ones; means and least values over seeds. EAP-IG samples the middle of steps.
    """
    rows, means, least, spread = [], {}, {}, {}
    for kind in KINDS:
        for name in FAMILIES:
            some = [agreement(random_model(name, seed, kind), random_prompts(8, seed=seed)) for seed in seeds]
            rows += [{"weights": kind, "model": name, "seed": n, **x} for n, x in zip(seeds, some, strict=True)]
        table = np.array(  # model, seed, way, signed or absolute
            [[x["methods"][way]["correlation"] for way in METHODS] for x in rows if x["weights"] == kind]
        ).reshape(len(FAMILIES), len(seeds), len(METHODS), 2)
        steps = [n for n, (method, _) in enumerate(METHODS.values()) if method == "eap-ig"]
        differ = np.ptp(table[:, :, steps], axis=2).max(), np.ptp(table.mean(1)[:, steps], axis=1).max()
        spread[kind] = dict(zip(("single models", "means"), rounded(differ), strict=True))
        means[kind], least[kind] = named(table.mean(1)), named(table.min(1))
    show(means)
    print("5, 20 and 64 steps of EAP-IG differ by at most", spread)
    return {"seeds": [*seeds], "means": means, "least": least, "steps_differ_by": spread, "rows": rows}


def named(table):
    """Numbers by model and way."""
    return {name: dict(zip(METHODS, rounded(x), strict=True)) for name, x in zip(FAMILIES, table, strict=True)}


def show(means):
    """The means as rows of markdown, signed / absolute."""
    print("| |", " | ".join(FAMILIES), "|")
    for kind, found in means.items():
        for way in METHODS:
            cells = [" / ".join(f"{x:.2f}".lstrip("0") for x in found[name][way]) for name in FAMILIES]
            print(f"| {kind}, {way} |", " | ".join(cells), "|", flush=True)


def addition(seeds=range(2)):
    """As in `rank`, on the built-in trained addition model (float32): its task (tens digit), 32 prompts a seed.

    `sign`: the share of edges whose score has the exact effect's sign: of all, of the quarter with the largest effects.
    """
    loaded = fe.load("addition", probes=False)
    wiring, rows = wire(loaded.model, loaded.anatomy), []
    for seed in seeds:
        prompts = prompts_for("addition", loaded.tokenizer, 32, seed)
        rows.append({"seed": seed, "prompts": prompts.describe(), **agreement(wiring, prompts)})
        for way, x in rows[-1]["methods"].items():
            print(f"addition, seed {seed}, {way}: {x}", flush=True)
    return {"seeds": [*seeds], "models": manifest_of(loaded, None, CALL)["models"], "rows": rows}


def shortfall(label, wiring, prompts, all_steps, ways=("none",), **also):
    """How far the scores out of the input are from the effect of the corrupt prompt: rows by steps and gates."""
    found = evaluate(wiring, prompts, wiring.graph.real[None])
    effect, rows = found.full - found.empty, []
    for steps in all_steps:
        for way in ways:
            start = time.perf_counter()
            options = {"gate_pass": GatePass(straight_through=True)} if way == "straight through" else None
            total = attribute(wiring, prompts, steps=steps, options=options).per_prompt[:, 0].sum(1)
            row = {"model": label, **also, "gates": way, "steps": steps}
            row["worst"] = rounded(np.abs(total - effect).max() / np.abs(effect).max(), 5)
            row["of_the_mean"] = rounded(abs(total.mean() - effect.mean()) / abs(effect.mean()), 5)
            row["effect"] = rounded(effect.mean(), 4)
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
    return rows


def completeness():
    """EAP-IG scores of the edges out of the input, summed, against metric(clean) - metric(corrupt), prompt by prompt.

    `worst`: the largest error of a prompt over the largest effect of a prompt. `of_the_mean`: the error of the mean
    over prompts, over the mean effect. Addition: 32 prompts (seed 0), float32, dense and behind constant gates
    `score + bias > 0` on the same weights. Tiny: random models in float64, weights 6 times as large as drawn, 8 random
    prompts (seed 0), dense (bias null) and gates of bias -0.5, -0.05 and 0.5, two seeds of models. Gates: constants to
    the gradient, or straight through. `tiny`: `worst` of tiny models, least, median, largest.
    """
    loaded = fe.load("addition", probes=False)
    prompts, gated = prompts_for("addition", loaded.tokenizer, 32, 0), ("constant", "straight through")
    rows = shortfall("addition, dense", wire(loaded.model, loaded.anatomy), prompts, (5, 64, 256))
    for bias in (0.0, -0.5, -2.0):
        wiring = wire(gates_only(loaded, bias).model, loaded.anatomy)
        rows += shortfall("addition, gated", wiring, prompts, (5, 64, 256), gated, bias=bias)
    rows += [x for name in GATED for bias in (None, -0.5, -0.05, 0.5) for x in tiny_shortfall(name, bias)]
    tiny = {way: summary([x for x in rows if "seed" in x and x["gates"] == way]) for way in ("none", *gated)}
    print("tiny models:", json.dumps(tiny, indent=1))
    models = manifest_of(loaded, None, CALL)["models"]
    facts = {"seeds": {"prompts": 0, "models": [0, 1]}, "prompts": prompts.describe(), "models": models}
    return {**facts, "tiny": tiny, "rows": rows}


def summary(rows):
    """Least, median and largest `worst` with 64 and 256 steps, and how far the two are apart at most."""
    few, many = (np.array([x["worst"] for x in rows if x["steps"] == steps]) for steps in (64, 256))
    three = {n: rounded(np.quantile(x, [0, 0.5, 1]), 5) for n, x in (("64 steps", few), ("256 steps", many))}
    return {"models": len(few), **three, "differ_by": rounded(np.abs(few - many).max(), 5)}


def tiny_shortfall(name, bias):
    """Rows of two tiny random models behind gates of this bias; None: dense."""
    rows = []
    for seed in range(2):
        model = tiny_model(name, seed).double()
        body = anatomy(model)
        if bias is not None:
            attach_(model, body, bias_start=bias, learned=False)
        ways = ("none",) if bias is None else ("constant", "straight through")
        rows += shortfall(f"tiny {name}", wire(model, body), random_prompts(8), (64, 256), ways, bias=bias, seed=seed)
    return rows


def real():
    """As in `completeness`: SmolLM2-135M in float32, IOI, 4 prompts (seed 0), dense and `smollm2-few-heads`."""
    sparse = fe.load("smollm2-few-heads", probes=False)
    prompts = prompts_for("ioi", sparse.tokenizer, 4, 0)
    dense = wire(sparse.dense.model.requires_grad_(False), sparse.dense.anatomy)
    rows = shortfall("smollm2, dense", dense, prompts, (5, 32))
    gated = wire(sparse.model.requires_grad_(False), sparse.loaded.anatomy)
    rows += shortfall("smollm2-few-heads", gated, prompts, (5, 24, 64), ("constant", "straight through"))
    models = manifest_of(sparse, None, CALL)["models"]
    return {"seeds": {"prompts": 0}, "prompts": prompts.describe(), "models": models, "rows": rows}


PARTS = {"rank": rank, "addition": addition, "completeness": completeness, "real": real}


def written(found):
    """As json with a line per row, and few elsewhere."""
    parts = []
    for name, part in found.items():
        rows = ",\n".join(f"   {json.dumps(row)}" for row in part["rows"])
        rest = "".join(f"  {json.dumps(key)}: {json.dumps(x)},\n" for key, x in part.items() if key != "rows")
        parts.append(f' {json.dumps(name)}: {{\n{rest}  "rows": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "circuits" / "attribution-quality.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.parts:
        start = time.perf_counter()
        facts = {
            "protocol": " ".join(PARTS[name].__doc__.split()),
            "command": f"python {CALL} --parts {name} --threads {options.threads}",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": store.device_name("cpu"),
            "threads": torch.get_num_threads(),
            "versions": store.versions(),
        }
        found = PARTS[name]()
        facts["seconds"] = round(time.perf_counter() - start)
        before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        every = {**before, name: {**facts, **found}}
        store.write_text(options.out, written({part: every[part] for part in PARTS if part in every}))


if __name__ == "__main__":
    main()
