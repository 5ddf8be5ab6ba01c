"""The models of train_pixelated.py, the step that trains them, and what that costs at least.

Shapes: B windows of T tokens, V = 256 bytes, D width, R outputs and C inputs of a matrix.
"""

import dataclasses
import gc
import itertools
import lzma
import statistics
import time

import numpy as np
import torch
from torch.nn import functional as F

from fewedges import store
from fewedges.data.text import SEPARATOR, Text
from fewedges.measure.clock import peaks
from fewedges.sparsify import cell_gradients, cell_products
from fewedges.sparsify.butterfly import PixelatedLinear, Plan
from fewedges.sparsify.pixelate import pixelate_, plan_for

ARMS = ("dense", "pixelated", "random", "low-rank", "small")
BYTES = 256
MATRICES = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
"""Outputs and inputs of a block's matrices, in widths."""
FEW_PRODUCTS, FEW_GRADIENTS, FEW_THIN = (0, 2, 4, 5, 6), (0, 2, 4), (0, 2)
"""Places in the kernels' candidates: one of each kind of tile, so that compiling them takes 20 s and not 45."""


# -- models --------------------------------------------------------------------------------------------------------


def kind_of(name):
    """The model of an arm: pixelated-longer is a pixelated one."""
    return name.removesuffix("-longer")


def width_of(kind, args):
    return (args.small_width or narrow(args)) if kind == "small" else args.width


def narrow(args):
    """The width, in whole heads, at which dense blocks have as many parameters as pixelated ones."""
    kept = sum(p.parameters(*shape) for shape, p in matrices("pixelated", args)) / args.layers
    return max(1, round((kept / 12) ** 0.5 / args.head)) * args.head


def matrices(kind, args):
    """Shape and plan of every matrix, block after block; no plan where it is dense."""
    width = width_of(kind, args) if kind == "small" else args.width
    shapes = [(r * width, c * width) for r, c in MATRICES.values()] * args.layers
    return [(shape, plan_of(kind, shape, place, args)) for place, shape in enumerate(shapes)]


def plan_of(kind, shape, place, args):
    if kind in ("dense", "small"):
        return None
    plan = plan_for(shape, args.density, args.rank_share, args.block)
    if kind == "random":
        return dataclasses.replace(plan, layout="random", seed=args.seed * 1000 + place)
    if kind == "low-rank":
        return Plan(0, 0, max(8, round(plan.parameters(*shape) / sum(shape) / 8) * 8))
    return plan


def build(kind, args):
    """The model, its weights drawn with the seed; on a GPU the blocks' norms give what the matrices take."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(args.seed)
    width = width_of(kind, args)
    config = GPT2Config(
        vocab_size=BYTES, n_positions=args.length, n_embd=width, n_layer=args.layers, n_head=width // args.head,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    with torch.device(args.device):
        model = GPT2LMHeadModel(config)
    if kind not in ("dense", "small"):
        names = [f"transformer.h.{n}.{name}" for n in range(args.layers) for name in MATRICES]
        plans = {name: plan for name, (_, plan) in zip(names, matrices(kind, args), strict=True)}
        pixelate_(model, start="scratch", plans=plans, kernel=args.kernel)
    if args.device != "cpu":
        for block in model.transformer.h:
            block.ln_1.__class__ = block.ln_2.__class__ = HalfNorm
        for layer in model.modules():
            if isinstance(layer, PixelatedLinear) and layer.sparse is not None:
                layer.__class__ = Opaque
    return model


class HalfNorm(torch.nn.LayerNorm):
    """As autocast would have it one operation later: within what is compiled, the cast costs no pass of its own."""

    def forward(self, x):
        return super().forward(x).bfloat16()


class Opaque(PixelatedLinear):
    """Not for torch.compile to look into: a kernel is launched."""

    forward = torch.compiler.disable(PixelatedLinear.forward)


def logits_of(model, tokens):
    """The model's forward pass without what transformers adds for generation: (B, T, V).

    Embedding is a product with one-hot rows: of 256 bytes it costs 1 % of a step, and its gradient needs no sort.
    """
    inside = model.transformer
    rows = (tokens[..., None] == torch.arange(BYTES, device=tokens.device)).to(inside.wte.weight.dtype)  # (B, T, V)
    x = (rows @ inside.wte.weight).float() + inside.wpe.weight[: tokens.shape[1]]  # (B, T, D)
    for block in inside.h:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
    return model.lm_head(inside.ln_f(x))


# -- training ------------------------------------------------------------------------------------------------------


class Trainer:
    """One model and its optimiser, ready to be trained from its start any number of times."""

    def __init__(self, model, args, data, valid):
        self.model, self.args, self.data = model, args, data
        self.device = torch.device(args.device)
        self.held_out = valid.at(0, args.batch * args.eval_batches).tokens.to(self.device).split(args.batch)
        self.tokens = self.held_out[0].clone()
        self.rate = torch.tensor(0.0, device=self.device)
        self.optimizer = adamw(model, self.rate, self.device)
        self.start = [p.detach().clone() for p in model.parameters()]
        self.compiled = not (args.eager or args.no_compile)
        if self.compiled:
            torch.compiler.reset()  # an arm's layers share their code with the last arm's: no limit of variants is met
            for block in model.transformer.h:
                block.compile(dynamic=False)
        self.graph = None if args.eager else self._capture()
        self.pace = self._pace()

    def run(self, steps, rate, every):
        """Train from the start: the curve on held-out text, and milliseconds of single steps."""
        self._reset()
        batches = self._batches(steps)
        curve, spans, seconds = [{"step": 0, "seconds": 0.0, "loss": self._loss()}], [], 0.0
        for first in range(0, steps, every):
            last = min(first + every, steps)
            began = self._now()
            marks = [self._mark()]
            for step in range(first, last):
                self.tokens.copy_(batches[step])
                self.rate.fill_(rate * warm_cosine(step, steps, min(self.args.warm_up, steps // 5)))
                self._step()
                marks.append(self._mark())
            seconds += self._now() - began
            spans += [self._between(a, b) for a, b in itertools.pairwise(marks)]
            curve.append({"step": last, "seconds": seconds, "loss": self._loss()})
        low, middle, high = (statistics.quantiles(spans, n=10)[i] for i in (1, 4, 7))
        return {"seconds": seconds, "ms_p20": low, "ms_p50": middle, "ms_p80": high, "curve": curve}

    def facts(self):
        """What was built, and how it runs."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, PixelatedLinear)]
        blocks = sum(p.numel() for p in self.model.transformer.h.parameters())
        return {
            "width": self.model.config.n_embd,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "block_parameters": blocks,
            "plans": [{"shape": [x.out_features, x.in_features]} | dataclasses.asdict(x.plan) for x in layers[:4]],
            "kernel": layers[0].kernel if layers and layers[0].sparse is not None else "torch",
            "compiled": self.compiled,
            "graph": self.graph is not None,
        }

    def close(self):
        """Give the memory back."""
        self.graph = self.optimizer = self.start = self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _train(self):
        """Forward, backward, clip, update: what is captured."""
        self.optimizer.zero_grad(set_to_none=True)
        self._objective(self.tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _objective(self, tokens):
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = logits_of(self.model, tokens)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def _loss(self):
        """Nats a byte on held-out text; None if it is no number. With gradients, or it would be compiled again."""
        losses = [self._objective(tokens).detach() for tokens in self.held_out]
        loss = torch.stack(losses).mean().item()
        return loss if np.isfinite(loss) else None

    def _capture(self):
        """Warm up (compile, try tiles, make the optimiser's state), then record one step."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._train()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._train()
        return graph

    def _step(self):
        self.graph.replay() if self.graph else self._train()

    def _pace(self):
        """Seconds a step, of a few."""
        for _ in range(2):
            self._step()
        began = self._now()
        for _ in range(5):
            self._step()
        return (self._now() - began) / 5

    @torch.no_grad()
    def _reset(self):
        """Back to the start, in place: a graph knows its tensors by address."""
        for parameter, value in zip(self.model.parameters(), self.start, strict=True):
            parameter.copy_(value)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def _batches(self, steps):
        """The tokens of all steps on the device, (S, B, T) of one byte each."""
        tokens = [self.data.at(step, self.args.batch).tokens.to(torch.uint8) for step in range(steps)]
        return torch.stack(tokens).to(self.device)

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first, second):
        return first.elapsed_time(second) if self.device.type == "cuda" else 1e3 * (second - first)


def adamw(model, rate, device):
    """AdamW whose rate is a tensor; nothing with fewer than two dimensions decays."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1, "lr": rate},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0, "lr": rate},
    ]
    fused = {"fused": True, "capturable": True} if device.type == "cuda" else {"foreach": False}
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), **fused)


def warm_cosine(step, steps, warm_up):
    """The part of the peak rate: up in a line, down along a cosine to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * float(np.cos(np.pi * (step - warm_up) / max(1, steps - warm_up)))


def texts(args):
    """The bytes of --data and --valid as windows; documents end with a byte 0."""
    found = []
    for path in (args.data, args.valid):
        raw = path.read_bytes()
        raw = lzma.decompress(raw) if path.suffix == ".xz" else raw
        raw = raw.replace(f"{SEPARATOR}\n".encode(), b"\0")
        stream, facts = np.frombuffer(raw, dtype=np.uint8), {"sha256": store.sha256_of(path)}
        found.append(Text(path.name, stream, args.length, args.seed, facts))
    return found


def shorten_tiles_():
    """Fewer candidates for the kernels of bfloat16 cells."""
    few = (
        (cell_products.PRODUCTS, FEW_PRODUCTS),
        (cell_gradients.GRADIENTS, FEW_GRADIENTS),
        (cell_products.THIN, FEW_THIN),
    )
    for table, places in few:
        table[2] = tuple(table[2][place] for place in places)


# -- what it costs at least ----------------------------------------------------------------------------------------


def peaks_of(device):
    """FLOP/s and bytes/s of this device, as measured."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return peaks(torch.device(device), dtype, quick=device == "cpu")


def limits(args, peak):
    """FLOPs a token, least milliseconds a step, and dense over arm of both, for every kind."""
    rows = {kind: cost(kind, args, peak) for kind in ARMS}
    for row in rows.values():
        row["limit_arithmetic"] = rows["dense"]["flops_per_token"] / row["flops_per_token"]
        row["limit"] = rows["dense"]["least_ms"] / row["least_ms"]
    return rows


def cost(kind, args, peak):
    """Training one token, and least time of a step: every part by arithmetic or by memory, whichever takes longer.

    A matrix of P parameters: three products of 2 P FLOPs, each reading and writing C + R numbers of 2 bytes a token.
    Causal attention: 2 T D forward, 2.5 times that backward. One-hot embedding 4 V D, logits 6 V D. Norms, residuals,
    GELU and bias gradients, read and written once, fused as far as they can be: 118 bytes per D and block (forward 6
    for a norm, 12 for a residual and a norm, 16 for GELU, 10 for a residual; backward 16, 16, 24, 18). AdamW, clipping
    and casts: 52 bytes a parameter and step.
    """
    width, tokens = width_of(kind, args), args.batch * args.length
    sides = [(r + c, plan.parameters(r, c) if plan else r * c) for (r, c), plan in matrices(kind, args)]
    dense = 7 * args.length * width * args.layers + 10 * BYTES * width
    parameters = sum(p for _, p in sides) + width * (BYTES + args.length + 13 * args.layers)
    moved = width * (118 * args.layers + 30) + 52 * parameters / tokens
    linear = sum(3 * max(2 * p / peak["flops"], 2 * side / peak["bandwidth"]) for side, p in sides)
    return {
        "flops_per_token": dense + sum(6 * p for _, p in sides),
        "bytes_per_token": moved,
        "least_ms": 1e3 * tokens * (linear + dense / peak["flops"] + moved / peak["bandwidth"]),
    }
