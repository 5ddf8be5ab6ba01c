"""The fused pixelated butterfly against its batched products, on the CPU through Triton's interpreter.

The interpreter cannot multiply bfloat16 matrices: benchmarks/blocks.py checks those on a GPU.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError
from fewedges.sparsify import cell_gradients
from fewedges.sparsify.butterfly import PixelatedLinear, Plan
from fewedges.sparsify.cell_kernel import pixelated_product
from fewedges.sparsify.cell_products import BY_TORCH, Tile, Tiles

DEVICE = "fewedges.sparsify.cell_device"
SMALL = Tile(16, 16, 16, 1, 1)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Device functions built anew for the interpreter, whoever imported what before."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(DEVICE, None)
    yield
    sys.modules.pop(DEVICE, None)


def pair(plan, height, width, dtype=torch.float32, bias=True, gamma=0.3):
    """A layer, and the same in float64 by batched products."""
    torch.manual_seed(0)
    layers = [PixelatedLinear(plan.grid * width, plan.grid * height, plan, bias=bias) for _ in range(2)]
    if layers[0].gamma is not None:
        layers[0].gamma.data.fill_(gamma)
    mine, exact = layers[0].to(dtype), layers[1].double()
    exact.load_state_dict(mine.state_dict())
    mine.kernel = "triton"
    return mine, exact


def fused(layer, tiles):
    low = (None, None) if layer.low is None else (layer.low.up, layer.low.down)
    cells = layer.sparse
    given = (cells.weight, cells.columns, cells.sources, *low, layer.gamma, layer.bias)
    return lambda x: pixelated_product(x, *given, tiles=tiles)


def gradients(layer, x, parameters):
    x = x.detach().requires_grad_()
    y = layer(x)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], pull)]


def errors(mine, exact, x, run=None):
    """Relative 2-norms of result and gradients, by name.

    The gradient of gamma is one number, a sum that may happen to be small: it counts against its usual size.
    """
    names = ["y", "x", *(name for name, _ in mine.named_parameters())]
    ours = gradients(run or mine, x, list(mine.parameters()))
    truth = gradients(exact, x.double(), list(exact.parameters()))
    usual = truth[0].norm()
    size = [b.norm().clamp_min(usual if n == "gamma" else 1e-12) for n, b in zip(names, truth, strict=True)]
    return {n: float((a.double() - b).norm() / s) for n, a, b, s in zip(names, ours, truth, size, strict=True)}


CASES = [  # plan, height, width, tokens
    (Plan(4, 1, 8), 24, 16, 37),
    (Plan(8, 2, 0), 16, 40, 5),
    (Plan(4, 2, 24), 40, 72, 130),
    (Plan(8, 3, 16, "random"), 32, 8, 64),
    (Plan(2, 0, 4), 4, 12, 1),
    (Plan(1, 0, 32), 48, 80, 20),
]


@pytest.mark.matches
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_matches_the_batched_products(case, bias):
    plan, height, width, tokens = case
    mine, exact = pair(plan, height, width, bias=bias)
    found = errors(mine, exact, torch.randn(tokens, plan.grid * width))
    assert max(found.values()) < 1.2e-6, found  # measured 3.1e-7 (up)


@pytest.mark.matches
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 3).flatmap(lambda p: st.tuples(st.just(2**p), st.integers(0, p))),
    st.tuples(*[st.integers(1, 9)] * 3), st.integers(1, 40), st.sampled_from([16, 32]), st.sampled_from([1, 3]),
    st.integers(0, 2), st.sampled_from([0, 1, 2, 4]),
)  # fmt: skip
def test_any_plan_and_any_tiles_match(cells, sizes, tokens, side, splits, persistent, parts):
    """Tiles that divide nothing, bands that end early, sums cut into parts, programs with many tiles."""
    height, width, rank = (4 * n for n in sizes)
    mine, exact = pair(Plan(*cells, rank), height, width)
    tile = Tile(16, side, 16, 1, 1, band=splits, persistent=persistent)
    thin = tile._replace(splits=parts) if parts else BY_TORCH
    run = fused(mine, Tiles(tile, tile._replace(rows=side), tile._replace(splits=splits), thin, thin))
    found = errors(mine, exact, torch.randn(tokens, cells[0] * width), run)
    assert max(found.values()) < 3e-6, found  # measured 9.3e-7 over 150 examples (gamma)


@pytest.mark.matches
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_float16_matches_the_batched_products(case):
    plan, height, width, tokens = case
    mine, exact = pair(plan, height, width, torch.float16)
    found = errors(mine, exact, torch.randn(tokens, plan.grid * width).half())
    assert max(found.values()) < 2e-3, found  # measured 5.5e-4 (down): roundings of the low rank


@pytest.mark.matches
@pytest.mark.parametrize("gamma", [0.0, 1.0, -2.0, 1e-30, 1e4])
def test_any_gamma_will_do(gamma):
    """The kernel divides by it and multiplies again."""
    mine, exact = pair(Plan(4, 1, 8), 16, 16, gamma=gamma)
    found = errors(mine, exact, torch.randn(20, 64))
    assert max(found.values()) < 2.4e-6, found  # measured 6.4e-7 (gamma)


@pytest.mark.matches
def test_inputs_of_any_strides_and_dimensions():
    mine, exact = pair(Plan(4, 1, 8), 16, 16)
    for x in (torch.randn(64, 20).T, torch.randn(20, 100)[:, 3:67], torch.randn(2, 3, 64), torch.randn(64)):
        y = mine(x)
        assert y.shape == (*x.shape[:-1], 64)
        torch.testing.assert_close(y.double(), exact(x.double()), rtol=0, atol=1.8e-6)  # measured 4.7e-7
    x = torch.randn(20, 64, requires_grad=True)
    (pulled,) = torch.autograd.grad(mine(x).sum(), x)  # an upstream without strides
    wanted = torch.autograd.grad(exact(x.double()).sum(), x)[0]
    torch.testing.assert_close(pulled, wanted, rtol=0, atol=9e-7)  # measured 2.4e-7
    assert mine(torch.zeros(0, 64)).shape == (0, 64)


@pytest.mark.stays
def test_autocast_computes_in_half_and_gives_float32_gradients():
    mine, exact = pair(Plan(4, 1, 8), 16, 16)
    x = torch.randn(9, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        y = mine(x)
    assert y.dtype == torch.float16
    assert (y - exact(x.double())).norm() <= 1.8e-3 * y.norm()  # measured 4.6e-4
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in mine.parameters()} == {torch.float32}


@pytest.mark.stays
def test_what_a_row_of_cells_does_not_read_does_not_reach_it():
    """Cells narrower than a step: what lies beyond them is another cell's, and may be anything."""
    mine, _ = pair(Plan(8, 1, 0), 8, 12, bias=False)
    x = torch.randn(5, 96)
    clean = mine(x)
    x[:, 24:36] = torch.nan  # the third column of cells
    y = mine(x).unflatten(1, (8, 8))
    reached = y.isnan().any(2).any(0)
    assert torch.equal(reached, (mine.sparse.columns == 2).any(1))
    assert torch.equal(y[:, ~reached], clean.unflatten(1, (8, 8))[:, ~reached])


@pytest.mark.stays
def test_only_what_is_asked_for_is_computed(monkeypatch):
    mine, _ = pair(Plan(4, 1, 8), 16, 16)
    mine.requires_grad_(False)
    monkeypatch.setattr(cell_gradients, "_launch", None)  # frozen: their gradients would be an error
    x = torch.randn(5, 64, requires_grad=True)
    mine(x).sum().backward()
    assert x.grad is not None


@pytest.mark.matches
@pytest.mark.parametrize(
    "wanted", ["x", "sparse.weight", "low.up", "low.down", "gamma", "bias", "low.up bias", "x gamma"]
)
def test_each_gradient_alone_is_the_one_beside_the_others(wanted):
    """What is not asked for leaves no room in the buffer that all share."""
    mine, _ = pair(Plan(4, 1, 8), 24, 16)
    tiles = Tiles(SMALL, SMALL, SMALL._replace(splits=2), SMALL, BY_TORCH)  # dY U alone is torch's
    x, pull = torch.randn(37, 64, requires_grad=True), torch.randn(37, 96)
    leaves = {"x": x} | dict(mine.named_parameters())
    every = torch.autograd.grad(fused(mine, tiles)(x), list(leaves.values()), pull)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted.split())
    alone = torch.autograd.grad(fused(mine, tiles)(x), [leaves[n] for n in wanted.split()], pull)
    known = dict(zip(leaves, every, strict=True))
    assert all(torch.equal(a, known[n]) for n, a in zip(wanted.split(), alone, strict=True))


@pytest.mark.stays
def test_no_tokens_no_gradient():
    mine, _ = pair(Plan(4, 1, 8), 24, 16)
    x = torch.zeros(0, 64, requires_grad=True)
    found = torch.autograd.grad(mine(x).sum(), [x, *mine.parameters()])
    assert [g.shape for g in found] == [x.shape, *(p.shape for p in mine.parameters())]
    assert not any(g.any() for g in found)


@pytest.mark.reproduces
def test_same_inputs_same_bits():
    mine, _ = pair(Plan(4, 1, 8), 24, 16)
    x = torch.randn(50, 64)
    tiles = Tiles(SMALL, SMALL, *[SMALL._replace(splits=3)] * 3)
    first, second = (gradients(fused(mine, tiles), x, list(mine.parameters())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.matches
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_torch_compile_goes_around_it():
    """A break in the graph: the same numbers, gradients included."""
    mine, _ = pair(Plan(4, 1, 8), 16, 16)
    x, leaves = torch.randn(5, 64, requires_grad=True), list(mine.parameters())
    traced = torch.compile(torch.nn.Sequential(mine, torch.nn.GELU()), backend="eager")
    first = torch.autograd.grad(traced(x).sum(), [x, *leaves])
    second = torch.autograd.grad(torch.nn.functional.gelu(mine(x)).sum(), [x, *leaves])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


CHECK = """
import subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from fewedges.sparsify.cell_device import finish, multiply, sample, thin
def compiled(kernel, types, numbers, warps):
    numbers = numbers | ({} if kernel is finish else {"PRECISION": "tf32"})
    signature = {n: "constexpr" if n in numbers else types.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=numbers)
    options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
box = lambda *sides: f"tensordesc<bf16[{','.join(map(str, sides))}]>"
types = {"X": box(1, 128, 64), "W": box(1, 1, 256, 64), "Y": box(1, 128, 256), "Index": "*i64"}
numbers = {"BM": 128, "BN": 256, "BK": 64, "TURNED": False, "PERSISTENT": False, "EARLY": True}
plain = compiled(multiply, types, numbers | dict.fromkeys(("Low", "Basis", "Whole", "Bias", "Gamma")), 8)
types |= {"Low": box(1, 128, 64), "Whole": box(128, 64), "Basis": box(1, 256, 64), "Bias": "*bf16", "Gamma": "*fp32"}
whole = compiled(multiply, types, numbers, 8)
types = {"X": box(128, 64), "Basis": box(256, 64), "Low": box(1, 128, 256)}
low = compiled(thin, types, {"BM": 128, "BR": 256, "BK": 64, "TURNED": False, "EARLY": True}, 8)
types = {"G": box(1, 64, 128), "X": box(1, 64, 256), "W": box(1, 1, 128, 256), "Up": box(1, 128, 64)}
types |= {"Low": box(64, 64), "Back": box(64, 64), "Gamma": "*fp32", "Index": "*i64"}
types |= {"Biases": "*fp32", "Dots": "*fp32", "Cells": box(1, 1, 1, 128, 256), "Ups": box(1, 1, 128, 64)}
types["Downs"] = box(1, 64, 1, 256)
grad = compiled(sample, types, {"BH": 128, "BW": 256, "BK": 64, "BU": 64, "BD": 64, "EARLY": True}, 8)
types = {"Parts": "*fp32", "Grads": "*bf16", "Dots": "*fp32", "Gamma": "*fp32"}
compiled(finish, types, {"BLOCK": 1024}, 4)
def remarks(ptx):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr
for kernel in (plain, whole, low, grad):
    ptx = kernel.asm["ptx"]
    said, waits = remarks(ptx), ptx.count("wgmma.wait_group.sync.aligned 1")
    slow = "serialized" in said or "0 bytes spill stores" not in said
    print("m64n" in ptx, "mma.sync" in ptx, waits, slow, kernel.metadata.shared, end="; ")
"""


@pytest.mark.stays
def test_the_compiler_gives_the_tensor_cores_whole_tiles_from_the_copy_engine():
    """Compiled for an H100, which needs none: wgmma alone, one in flight, three buffers of every operand, no spill.

    ptxas of Triton 3.6 made wgmma wait for each other where a loop might not have run at all, and ptxas of 3.9 where
    sums of columns were taken beside them.
    """
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK], env=environment, capture_output=True, text=True)
    three = 3 * (128 + 256) * 64 * 2
    wanted = [("True", "False", waits, "False") for waits in ("1", "2", "1", "4")]  # a loop for each of its products
    found = [line.split() for line in run.stdout.strip().rstrip(";").split(";")]
    assert [tuple(line[:4]) for line in found] == wanted, run.stdout + run.stderr
    assert all(three <= int(line[4]) < three + 4096 for line in found), found


@pytest.mark.says
def test_says_what_it_cannot_do(monkeypatch):
    mine, _ = pair(Plan(4, 1, 8), 16, 16)
    x = torch.randn(5, 64)
    with pytest.raises(ModelError, match="float64"):
        mine.double()(x.double())
    mine.float()
    with pytest.raises(ModelError, match=r"torch.float16.*torch.float32"):
        mine(x.half())
    with pytest.raises(ModelError, match=r"\(5, 60\)"):
        mine(x[:, :60])
    with pytest.raises(ModelError, match=r"cells of 10 x 32, rank 8.*multiples of 4"):
        pair(Plan(4, 1, 8), 5, 16)[0](x)
    with pytest.raises(ModelError, match="multiples of 8"):
        pair(Plan(4, 1, 4), 16, 16, torch.float16)[0](x.half())
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ModelError, match=r"not on a GPU.*kernel='reference'"):
        mine(x)
