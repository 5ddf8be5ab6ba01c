"""Hard-gated prefill and decoding against torch's attention: right on this GPU, and when does it win?

    python benchmarks/inference.py out.csv                           # errors, then times, written to out.csv
    python benchmarks/inference.py out.csv --parts tiles prefill     # try tile shapes, time with the best
    python benchmarks/inference.py out.csv --dump qkv.safetensors    # first real tensors (scripts/dump_qkv.py)

Times by CUDA events as in benchmarks/attention.py (cold L2, at least 30 runs); the decoding runs are replayed
as CUDA graphs, ours and torch's alike, or launching would be all one sees. Synthetic inputs: "scattered", scores
N(0, 1), every query opens keys of its own (the worst case for gathering), and "popular", all queries open the
same keys (the best); the rate of open gates stands in the name. `fused` is the training kernel with hard gates.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from attention import fused, measure, row, write_rows
from safetensors import safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewedges.sparsify.attention import inference
from fewedges.sparsify.attention.gate import gated_attention
from fewedges.sparsify.attention.inference import Walk, causal_range, hard_gated_attention

WAYS = ("gather", "skip")
CHECKS = [  # B, H, G, Q, K, E, dtype, padded, bias by key
    (1, 4, 4, 257, 257, 64, torch.float32, False, False),
    (2, 6, 2, 301, 301, 32, torch.float32, True, True),
    (2, 9, 3, 515, 515, 64, torch.bfloat16, True, False),
    (1, 9, 3, 5000, 5000, 64, torch.bfloat16, False, False),
    (2, 9, 3, 515, 2500, 64, torch.bfloat16, True, True),
    (1, 4, 2, 700, 700, 128, torch.bfloat16, False, False),
    (2, 4, 2, 333, 333, 96, torch.float16, True, False),
    (1, 2, 1, 130, 130, 256, torch.bfloat16, False, False),
    (1, 2, 1, 130, 130, 256, torch.float32, False, False),
    (2, 9, 3, 1, 4097, 64, torch.bfloat16, True, False),
    (32, 9, 3, 1, 999, 64, torch.bfloat16, True, True),
    (1, 32, 8, 4, 3001, 128, torch.bfloat16, False, False),
    (2, 4, 4, 1, 777, 256, torch.float16, False, False),
    (2, 4, 4, 3, 777, 80, torch.float32, True, False),
]
PREFILLS = [  # B, H, G, T, E: SmolLM2's heads with 16,384 tokens, and two longer or wider ones
    *((16384 // t, 9, 3, t, 64) for t in (1024, 2048, 4096, 8192, 16384)),
    (1, 32, 8, 8192, 128),
    (1, 32, 8, 16384, 128),
]
RATES = [("scattered", 0.001), ("scattered", 0.01), ("scattered", 0.1), ("popular", 0.001), ("popular", 0.01)]
DECODES = [(b, 9, 3, k, 64) for b in (1, 8, 32) for k in (1024, 4096, 16384)]
DECODES += [(b, 32, 8, k, 128) for b in (1, 32) for k in (4096, 16384)]
PREFILL_WALKS = [  # few: each takes some seconds to compile
    *(Walk(m, n, 64, w, 3, r) for m, n, w in ((64, 64, 4), (64, 128, 4), (128, 64, 8)) for r in (None, 168, 128)),
    Walk(128, 128, 64, 8, 2),
    Walk(64, 64, 32, 4, 2, 168),
    Walk(64, 32, 64, 4, 3, 128),
]
DECODE_WALKS = [Walk(16, n, 0, w, s) for n in (32, 64, 128) for w in (2, 4) for s in (2, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--parts", nargs="+", default=["check", "dump", "prefill", "decode"], help="also: tiles")
    parser.add_argument("--dump", type=Path, help="tensors written by scripts/dump_qkv.py")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    with torch.no_grad():
        worst = check() if "check" in options.parts else 0.0
        if "tiles" in options.parts:
            choose_walks()
        write_rows(options.csv, times(options))
    sys.exit(0 if worst < 3 else f"the kernel is {worst:.1f} times as wrong as gate.py in the same dtype")


def times(options: argparse.Namespace) -> Iterator[dict]:
    """The rows that were asked for."""
    if "dump" in options.parts and options.dump:
        yield from time_dump(options.dump, options.repeats)
    if "prefill" in options.parts:
        yield from time_prefill(options.repeats)
    if "decode" in options.parts:
        yield from time_decode(options.repeats)


# ------------------------------------------------------------------------------------------------------------
# Right?
# ------------------------------------------------------------------------------------------------------------


def check() -> float:
    """Print errors of our output and of gate.py in the same dtype; return their worst ratio, 2e-6 forgiven."""
    worst = 0.0
    for b, h, g, q, k, e, dtype, padded, by_key in CHECKS:
        query, key, value, bias = scattered(b, h, g, q, k, e, 0.02, dtype)
        bias = bias[:, None] + torch.randn(b, h, k, device="cuda") if by_key else bias
        start = torch.arange(b, device="cuda").flip(0) * (k // 3) if padded else None
        start = None if start is None else start.clamp_max(k - 1)
        stop = None if start is None else torch.full_like(start, k)
        allowed = causal_range(q, k, start, stop).cuda()
        scaling = e**-0.5
        exact = gated_attention(*(x.double() for x in (query, key, value, bias)), allowed, scaling=scaling)
        plain = gated_attention(query, key, value, bias, allowed, scaling=scaling)
        for way in WAYS:
            ours, again = (
                hard_gated_attention(query, key, value, bias, scaling=scaling, start=start, stop=stop, way=way)
                for _ in range(2)
            )
            wrong, same = relative(ours.output, exact.output), relative(plain.output, exact.output)
            gates = (ours.open - exact.open).abs().sum().item() / exact.open.sum().item()
            bits = torch.equal(ours.output, again.output)
            print(b, h, g, q, k, e, dtype, way, f"ours {wrong:.1e} plain {same:.1e} gates {gates:.1e} same bits {bits}")
            worst = max(worst, wrong / max(same, 2e-6)) if bits else torch.inf
    return worst


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


# ------------------------------------------------------------------------------------------------------------
# Inputs
# ------------------------------------------------------------------------------------------------------------


def scattered(b, h, g, q, k, e, rate: float, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Scores N(0, 1), so that this share of the gates is open, anywhere."""
    torch.manual_seed(0)
    sizes = ((q, h), (k, g), (k, g))
    qkv = [torch.randn(b, t, n, e, device="cuda").to(dtype).transpose(1, 2) for t, n in sizes]
    return [*qkv, torch.full((h,), -torch.special.ndtri(torch.tensor(1.0 - rate)).item(), device="cuda")]


def popular(b, h, g, q, k, e, rate: float) -> list[Tensor]:
    """This share of the keys is open to every query: their scores are 10 higher, the gates cut at 5."""
    query, key, value, bias = scattered(b, h, g, q, k, e, rate)
    lift = (10 * e**0.5) ** 0.5
    chosen = torch.rand(k, device="cuda") < rate
    query, key = query.clone(), key.clone()
    query[..., 0] = lift
    key[..., 0] = lift * chosen.to(key.dtype)
    return [query, key, value, torch.full_like(bias, -5.0)]


KINDS: dict[str, Callable[..., list[Tensor]]] = {"scattered": scattered, "popular": popular}


# ------------------------------------------------------------------------------------------------------------
# Fast?
# ------------------------------------------------------------------------------------------------------------


def hard(tensors: list[Tensor], way: str, scaling: float | None = None) -> Callable[[], None]:
    scaling = tensors[0].shape[-1] ** -0.5 if scaling is None else scaling
    return lambda: hard_gated_attention(*tensors, scaling=scaling, way=way)


def sdpa(tensors: list[Tensor], causal: bool, backend: SDPBackend) -> Callable[[], None]:
    query, key, value = tensors[:3]

    def run():
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    return run


def dense(shape: str, tensors: list[Tensor], causal: bool, repeats: int, wrap: Callable) -> Iterator[dict]:
    """torch's own: flash, which is what transformers runs, and cuDNN, which is faster where it runs."""
    for name, backend in (("sdpa", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            yield row(name, shape, wrap(sdpa(tensors, causal, backend)), repeats)
        except RuntimeError as error:
            print(name, shape, "left out:", str(error)[:100])


def time_prefill(repeats: int) -> Iterator[dict]:
    for b, h, g, t, e in PREFILLS:
        name = f"prefill B{b} H{h} G{g} T{t} E{e}"
        tensors = scattered(b, h, g, t, t, e, 0.01)
        yield from dense(name, tensors, True, repeats, lambda run: run)
        yield row("fused", name, lambda x=tensors: fused(False)(*x), repeats)
        for kind, rate in RATES:
            tensors = KINDS[kind](b, h, g, t, t, e, rate)
            for way in WAYS:
                yield row(way, f"{name} {kind} {rate:.1%}", hard(tensors, way), repeats)


def time_decode(repeats: int) -> Iterator[dict]:
    for b, h, g, k, e in DECODES:
        name = f"decode B{b} H{h} G{g} K{k} E{e}"
        yield from dense(name, scattered(b, h, g, 1, k, e, 0.01), False, repeats, graphed)
        for kind, rate in RATES[:3]:
            tensors = KINDS[kind](b, h, g, 1, k, e, rate)
            yield row("hard", f"{name} {kind} {rate:.1%}", graphed(hard(tensors, "gather")), repeats)


def time_dump(path: Path, repeats: int) -> Iterator[dict]:
    """Real tensors, and their first 1024, 2048, ... tokens: prefill as it was, and decoding of the last query."""
    with safe_open(path, "pt", device="cuda") as file:
        facts = json.loads(file.metadata()["facts"])
        for layer in facts["layers"]:
            whole = [file.get_tensor(f"layer.{layer}.{n}") for n in ("query", "key", "value", "bias")]
            for length in sorted({min(2**n, facts["length"]) for n in range(10, 15)}):
                yield from time_real(layer, whole, length, facts["scaling"], repeats)


def time_real(layer: int, whole: list[Tensor], length: int, scaling: float, repeats: int) -> Iterator[dict]:
    """One layer at one length; attention is causal, so the first tokens are what a shorter text would give."""
    *qkv, bias = whole
    tensors = [x[:, :, :length] for x in qkv] + [bias[..., :length] if bias.dim() == 3 else bias]
    edges = hard_gated_attention(*tensors, scaling=scaling).open.mean().item()
    shape = f"layer {layer} T{length} {edges:.2f} edges"
    yield from dense(f"prefill {shape}", tensors, True, repeats, lambda run: run)
    for way in WAYS:
        yield row(way, f"prefill {shape}", hard(tensors, way, scaling), repeats)
    last = [tensors[0][:, :, -1:], *tensors[1:]]
    yield from dense(f"decode {shape}", last, False, repeats, graphed)
    yield row("hard", f"decode {shape}", graphed(hard(last, "gather", scaling)), repeats)


def graphed(run: Callable[[], None]) -> Callable[[], None]:
    """The same launches as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# ------------------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------------------


def choose_walks() -> None:
    """Leave the fastest shapes of width 64 and 16 bits in PREFILL (for gather) and DECODE; print all."""
    long, step = scattered(1, 9, 3, 16384, 16384, 64, 0.001), scattered(32, 9, 3, 1, 16384, 64, 0.001)
    best(inference.PREFILL, (64, 2), PREFILL_WALKS, "prefill gather", hard(long, "gather"))
    for span in (1024, 2048, 4096):
        inference.SPAN = span
        print("span", span, statistics.median(measure(hard(long, "gather"), 20)[0]))
    inference.SPAN = 2048
    best(inference.DECODE, (128, 2), DECODE_WALKS, "decode", hard(step, "gather"))


def best(table: dict, row_: tuple[int, int], walks: list[Walk], name: str, run: Callable[[], None]) -> None:
    times = {}
    for walk in walks:
        table[row_] = walk
        try:
            times[walk] = statistics.median(measure(run, 10)[0])
        except Exception as error:  # too much shared memory, too many registers: a walk that does not run
            print(name, walk, type(error).__name__, str(error)[:100], flush=True)
            continue
        print(name, walk, f"{times[walk]:.3f} ms", flush=True)
    table[row_] = min(times, key=times.get)
    print(name, "best:", table[row_], flush=True)


if __name__ == "__main__":
    main()
