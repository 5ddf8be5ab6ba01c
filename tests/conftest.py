"""Shapes are checked by jaxtyping in every call; tiny models (tiny.py) are built from config, never downloaded.

Every test carries one kind: matches, stays, survives, reproduces or says (DESIGN.md, house style 11).
"""

import importlib.metadata
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: two threads on a busy machine were 8 times slower
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it when a test first imports it

import jaxtyping
import pytest
from jaxtyping import install_import_hook

CHECKED = ["data", "model", "measure", "explain"]
WEIGHTS = "calibration distilling gradual lottery masks matrices obs pattern pruned pruning quantizing"
CHECKED += [f"sparsify.{name}" for name in f"{WEIGHTS} recovery rewiring rounding schedule score select shrink".split()]
CHECKED += [f"sparsify.attention.{name}" for name in "constraint gate interface result student training".split()]
install_import_hook([f"fewedges.{name}" for name in CHECKED], "beartype.beartype")  # not Triton's device code


def _old_interpreter_with_new_numpy():
    """Before 3.7, Triton's interpreter makes loop bounds of arrays of one element by `int`, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


try:
    if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 7):
        _old_interpreter_with_new_numpy()
except importlib.metadata.PackageNotFoundError:
    pass

KINDS = {"matches", "stays", "survives", "reproduces", "says"}


def pytest_collection_modifyitems(items):
    for item in items:
        kinds = {mark.name for mark in item.iter_markers()} & KINDS
        if len(kinds) != 1:
            raise pytest.UsageError(f"{item.nodeid} has {len(kinds)} of the five kinds of test, not one")


@pytest.fixture
def as_users_call(monkeypatch):
    """Without the checks of types and shapes that only tests have: what a user sees who passes the wrong thing."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("FEWEDGES_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def addition():
    """The shipped dense addition model, loaded once; read only."""
    import fewedges as fe

    return fe.load("addition", probes=False)
