"""How kernels are launched: the choice of tiles without a GPU to time them on, operands, and what is said."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify import launching


@pytest.fixture(autouse=True)
def fresh():
    launching.forget()
    yield
    launching.forget()


@pytest.fixture
def gpu(monkeypatch):
    """A tensor that says it is on a GPU, and times that are known beforehand; counts what was timed."""
    times, timed = {(1,): 3.0, (2,): 2.0, (3,): float("inf")}, []

    def time(launch, tile):
        timed.append(tile)
        return times[tile], "" if times[tile] < 9 else "OutOfResources: shared memory"

    monkeypatch.setattr(launching, "_time", time)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return SimpleNamespace(like=SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16), timed=timed)


@pytest.mark.stays
def test_every_shape_is_tried_once_and_the_fastest_is_kept(gpu):
    tiles = [(1,), (2,), (3,)]
    for _ in range(3):
        assert launching.fastest("product", (8, 8), gpu.like, lambda: tiles, print) == (2,)
    assert gpu.timed == tiles
    assert launching.fastest("product", (8, 16), gpu.like, lambda: tiles, print) == (2,)
    assert len(gpu.timed) == 6
    rows = launching.trials()
    assert [row["chosen"] for row in rows] == [False, True, False] * 2
    assert rows[2]["why"] == "OutOfResources: shared memory"
    assert (rows[0]["what"], rows[0]["shape"], rows[0]["dtype"], rows[0]["device"]) == (
        "product", (8, 8), "float16", "H100",
    )  # fmt: skip
    launching.forget()
    assert launching.trials() == []


@pytest.mark.stays
def test_candidates_are_made_once_a_shape(gpu):
    """They cost the host more than the launch does."""
    for tiles in ([(1,), (2,)], [(1,)]):
        asked = []
        for _ in range(3):
            launching.fastest("product", (len(tiles),), gpu.like, lambda: asked.append(0) or tiles, print)  # noqa: B023
        assert len(asked) == 1


@pytest.mark.stays
def test_nothing_is_tried_on_a_cpu_or_of_a_single_tile(gpu):
    assert launching.fastest("product", (8,), torch.zeros(1), lambda: [(1,), (2,)], print) == (1,)
    assert launching.fastest("product", (8,), gpu.like, lambda: [(1,)], print) == (1,)
    assert gpu.timed == launching.trials() == []


@pytest.mark.survives
def test_no_tile_that_runs_and_a_capture_are_errors(gpu, monkeypatch):
    with pytest.raises(ModelError, match=r"no tile runs \(OutOfResources: shared memory\)"):
        launching.fastest("product", (8,), gpu.like, lambda: [(3,), (3,)], print)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ModelError, match="before the capture"):
        launching.fastest("product", (8,), gpu.like, lambda: [(1,), (2,)], print)


@pytest.mark.stays
def test_operands_are_copied_only_where_they_must_be():
    whole = torch.randn(6, 32)
    assert launching.aligned(whole) is whole
    assert launching.packed(whole) is whole
    for x in (whole.T, whole[:, 1:17], whole[:, :6].contiguous(), torch.randn(1, 8).expand(6, 8)):
        fit = launching.aligned(x)
        assert torch.equal(fit, x)
        assert fit.stride(1) == 1
        assert fit.data_ptr() % 16 == 0
    assert launching.aligned(whole[:, 4:20]).stride() == (32, 1)
    odd = torch.randn(65)[1:].view(8, 8)
    assert launching.packed(odd).data_ptr() % 16 == 0
    assert torch.equal(launching.packed(odd), odd)


@pytest.mark.stays
def test_the_power_that_holds_a_side():
    assert [launching.power_above(n) for n in (1, 16, 17, 64, 65, 688)] == [16, 16, 32, 64, 128, 1024]


@pytest.mark.says
def test_says_why_there_is_no_kernel(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RecipeError, match="reference or triton"):
        launching.choose_kernel("cuda")
    with pytest.raises(ModelError, match=r"not on a GPU.*reference"):
        launching.device_functions("a product", "cell_device", torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton.tools.tensor_descriptor", None)
    with pytest.raises(ModelError, match=r"fewedges\[kernel\]"):
        launching.device_functions("a product", "cell_device", torch.device("cpu"))
