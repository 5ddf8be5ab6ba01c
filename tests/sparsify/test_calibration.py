"""What calibration measures is what a whole forward pass of the pruned model would show, in every family."""

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from fewedges.errors import ModelError, RecipeError
from fewedges.model.anatomy import anatomy
from fewedges.model.loading import Loaded
from fewedges.sparsify import calibration
from fewedges.sparsify.calibration import Inputs, calibrated
from fewedges.sparsify.matrices import blocks_of, chosen, matrices_of, write_
from fewedges.sparsify.obs import Factor
from fewedges.sparsify.pruning import prune_
from fewedges.weight_recipes import Prune
from tiny import SUPPORTED, NoiseBatches, configs, tiny_loaded, tiny_model


def tokens(windows=5, length=12):
    return NoiseBatches(length).at(0, windows).tokens


def seen_by_hooks(model, names, given):
    """Inputs of each matrix in one plain forward pass of the whole model."""
    found, hooks = {}, []
    for name in names:
        module = model.get_submodule(name)
        hooks.append(
            module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].detach()}))
        )
    with torch.no_grad():
        model(input_ids=given, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: x.reshape(-1, x.shape[-1]) for name, x in found.items()}


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_each_block_is_measured_on_the_blocks_before_it_as_they_were_changed(name):
    loaded, given = tiny_loaded(name), tokens()
    walk = calibrated(loaded, given, gram=True, micro_batch=2)
    for block, inputs in walk:
        model = copy.deepcopy(loaded.model)  # with the earlier blocks changed, this one not yet
        wanted = seen_by_hooks(model, inputs, given)
        assert inputs.keys() == {matrix.name for matrix in block.matrices} == wanted.keys()
        for path, rows in wanted.items():
            gram = rows.T @ rows
            torch.testing.assert_close(inputs[path].gram, gram, rtol=0, atol=float(2e-6 * gram.abs().max()))  # 6e-7
            torch.testing.assert_close(inputs[path].norm, rows.norm(dim=0), rtol=4e-6, atol=1e-6)
            assert inputs[path].tokens == 60
        for matrix in block.matrices:
            write_(matrix, matrix.weight * 0.5)


@pytest.mark.matches
def test_squares_alone_give_the_same_norms_as_the_gram_matrix():
    a = [x for _, seen in calibrated(tiny_loaded(), tokens(), gram=True) for x in seen.values()]
    b = [x for _, seen in calibrated(tiny_loaded(), tokens(), gram=False) for x in seen.values()]
    for with_gram, without in zip(a, b, strict=True):
        torch.testing.assert_close(with_gram.norm, without.norm, rtol=2e-6, atol=0)  # measured 5e-7
        assert without.upper is None


@pytest.mark.stays
def test_matrices_that_read_the_same_tensor_share_their_statistics():
    for _, seen in calibrated(tiny_loaded("llama"), tokens()):
        kinds = {name.rpartition(".")[2]: inputs for name, inputs in seen.items()}
        assert kinds["q_proj"] is kinds["k_proj"] is kinds["v_proj"]
        assert kinds["gate_proj"] is kinds["up_proj"]
        assert len({id(x) for x in seen.values()}) == 4


@pytest.mark.matches
@pytest.mark.parametrize("strip", [1, 7, 100])
def test_a_gram_matrix_in_strips_is_a_gram_matrix(monkeypatch, strip):
    monkeypatch.setattr(calibration, "STRIP", strip)
    rows = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = Inputs(20)
    inputs.add_(rows[:10].view(2, 5, 20), gram=True)
    inputs.add_(rows[10:], gram=True)
    torch.testing.assert_close(inputs.gram, rows.T @ rows, rtol=0, atol=5e-14)  # measured 1.4e-14


@pytest.mark.stays
def test_micro_batches_change_rounding_only_and_hooks_and_gradients_are_left_behind_by_none():
    sums = []
    for micro_batch in (1, 3, 5):
        loaded = tiny_loaded("gpt2")
        sums.append(
            [x.norm for _, seen in calibrated(loaded, tokens(), micro_batch=micro_batch) for x in seen.values()]
        )
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())
        assert torch.is_grad_enabled()
    for a, b in zip(sums[0], sums[1], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


class Alive(TorchDispatchMode):
    """The most bytes at any time of tensors that were made since (each piece of storage once)."""

    def __init__(self):
        super().__init__()
        self.made, self.most = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made |= {id(x): x for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        pieces = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.made.values()}
        self.most = max(self.most, sum(pieces.values()))
        return out


def most_in_use(layers, windows, gram):
    """The most bytes of tensors beside the model's at any time of a walk over so many blocks."""
    given, loaded = tokens(windows, length=33), deep(layers)
    with Alive() as alive:
        for _ in calibrated(loaded, given, gram=gram, micro_batch=2):
            pass
    return alive.most


def deep(layers):
    """A tiny model of so many blocks."""
    config = configs()["llama"]
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return Loaded(name="tiny", model=model, tokenizer=None, anatomy=anatomy(model))


@pytest.mark.stays
@pytest.mark.parametrize("windows", [1, 8])
@pytest.mark.parametrize("gram", [False, True])
def test_memory_is_that_of_one_block_and_one_set_of_hidden_states_however_many_blocks(windows, gram):
    small, large = most_in_use(2, windows, gram), most_in_use(6, windows, gram)
    assert small > 4 * windows * 33 * 32  # 4 N T D bytes of hidden states
    assert large == small


@pytest.mark.stays
@pytest.mark.parametrize(("method", "kind"), [("wanda", Inputs), ("sparsegpt", Inputs), ("sparsegpt", Factor)])
def test_pruning_holds_the_statistics_of_one_block_at_a_time(monkeypatch, method, kind):
    most, begin = [], kind.__init__
    for layers in (2, 6):
        living, counts = weakref.WeakSet(), []

        def count(self, *args, living=living, counts=counts, **options):
            begin(self, *args, **options)
            living.add(self)
            counts.append(len(living))

        with monkeypatch.context() as patch:
            patch.setattr(kind, "__init__", count)
            prune_(deep(layers), Prune(method=method, calibration_windows=5, context_length=12), tokens())
        most.append(max(counts))
        assert len(counts) == 4 * layers
    assert most == [4, 4]  # of q k v, of o, of gate and up, of down


@pytest.mark.stays
def test_half_precision_is_for_the_passes_only():
    """Statistics stay float32, and autocast is off while the consumer works."""
    exact = [x.gram for _, seen in calibrated(tiny_loaded(), tokens(), gram=True) for x in seen.values()]
    loose = []
    for _, seen in calibrated(tiny_loaded(), tokens(), gram=True, precision="bf16"):
        assert not torch.is_autocast_enabled("cpu")
        loose += [x.gram for x in seen.values()]
    far = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(exact, loose, strict=True)]
    assert all(x.dtype == torch.float32 for x in loose)
    assert 0 < max(far) < 0.2  # measured .05: bf16 has 8 bits, and these weights are large


@pytest.mark.survives
def test_a_model_that_is_no_chain_of_blocks_is_refused():
    loaded = tiny_loaded()
    layers = loaded.model.model.layers
    layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ModelError, match=r"layers.1 takes another input"):
        next(calibrated(loaded, tokens()))


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_matrices_are_seen_as_outputs_by_inputs(name):
    """Conv1D stores inputs first: every matrix times an input is what its module computes."""
    loaded = tiny_loaded(name)
    matrices = matrices_of(loaded)
    assert len(matrices) == sum(len(block.matrices) for block in blocks_of(loaded))
    tied = {id(loaded.model.get_input_embeddings().weight), id(loaded.model.get_output_embeddings().weight)}
    for matrix in matrices.values():
        x = torch.randn(3, matrix.shape[1])
        bias = matrix.module.bias if matrix.module.bias is not None else 0
        torch.testing.assert_close(matrix.module(x), x @ matrix.weight.T + bias, rtol=0, atol=2e-5)  # measured 8e-6
        assert id(matrix.parameter) not in tied
    assert any(matrix.transposed for matrix in matrices.values()) == (name == "gpt2")


@pytest.mark.survives
def test_weights_of_no_known_layer_are_refused_not_skipped():
    loaded = tiny_loaded()
    block = loaded.model.model.layers[1]
    block.mlp.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ModelError, match=r"mlp.experts is a matrix of no known layer"):
        blocks_of(loaded)


@pytest.mark.survives
def test_shared_blocks_and_adapters_and_names_that_fit_nothing_are_refused():
    loaded = tiny_loaded()
    loaded.model.model.layers[1] = loaded.model.model.layers[0]
    with pytest.raises(ModelError, match="share their matrices"):
        blocks_of(loaded.with_model(loaded.model))
    with pytest.raises(RecipeError, match="no matrix has such a name"):
        chosen(matrices_of(tiny_loaded()), ("c_attn",))
    assert len(chosen(matrices_of(tiny_loaded()), ("down_proj", "o_proj"))) == 10
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="adapters"):
        blocks_of(tiny_loaded().with_model(adapted))
