"""A stage that is called like its verb refuses what is not a loaded model."""

from pathlib import Path

import pytest

import fewedges as fe
from fewedges.errors import ModelError
from tiny import tiny_loaded


@pytest.mark.says
@pytest.mark.parametrize("verb", ["sparsify", "measure", "explain"])
def test_a_name_or_a_bare_model_is_refused_with_what_to_write(verb):
    call = getattr(fe, verb)
    for name in ("addition", Path("runs/sparse")):
        with pytest.raises(ModelError, match=rf"a name, not a model.*fe\.{verb}\(fe\.load\('{name}'\)"):
            call(name)
    with pytest.raises(ModelError, match=r"a LlamaForCausalLM.*fe\.load"):
        call(tiny_loaded("llama", 0).model)
    with pytest.raises(ModelError, match=r"a NoneType"):
        call(None)
    with pytest.raises(ModelError, match="a name, not a model"):
        call(**{"model" if verb == "sparsify" else "what": "addition"})
