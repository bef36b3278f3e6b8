"""What the edit leaves in the record: exact zeros, and experts that met no token."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from prunus.errors import UserError
from prunus.models.spec import BlockSpec, Group, LinearSpec
from prunus.sparsity import METHODS, Statistics, Unstructured
from prunus.steps.plan import Plan
from prunus.steps.sparsify_edit import SparsifyEdit, notes_of_unseen

LINEAR = LinearSpec(name="expert", parameter="expert.weight", shape=(8, 16), transposed=False)
BLOCK = BlockSpec(name="layers.0", stages=(), returns_tuple=False)


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "admm"])
def test_an_expert_that_met_no_token_is_judged_by_its_weights_and_the_user_is_told(method):
    edit = SparsifyEdit(METHODS[method], METHODS[method].options(), Plan({"layers.0.expert": Unstructured(0.5, "row")}))
    weight_OI = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    nothing = Statistics(num_tokens=0, input_sq_norm_I=torch.zeros(16), gram_II=torch.zeros(16, 16))
    (pruned_OI,) = edit(BLOCK, Group((LINEAR,)), [weight_OI], nothing, {})
    assert torch.equal((pruned_OI == 0).sum(1), torch.full((8,), 8))
    if method in ("wanda", "admm"):  # with inputs all alike both rank by magnitude
        lowest = weight_OI.abs().argsort(1)[:, :8]
        assert bool((pruned_OI.gather(1, lowest) == 0).all())
    assert (
        "1 matrices, such as layers.0.expert, met no calibration token"
        in notes_of_unseen(edit.method.needs, edit.matrices)[0]
    )


def test_magnitude_needs_no_token_and_says_nothing():
    method = METHODS["magnitude"]
    edit = SparsifyEdit(method, method.options(), Plan({"layers.0.expert": Unstructured(0.5, "matrix")}))
    edit(BLOCK, Group((LINEAR,)), [torch.randn(8, 16)], Statistics(), {})
    assert notes_of_unseen(method.needs, edit.matrices) == []


def test_zeros_of_earlier_steps_count_among_all_parameters(tiny_llama_dir, tmp_path):
    prunus.sparsify(tiny_llama_dir, tmp_path / "one", method="magnitude", pattern="0.5")
    two = prunus.sparsify(
        tmp_path / "one", tmp_path / "two", method="magnitude", pattern="0.75", protect=("*.down_proj",)
    )
    tensors = {k: v for file in two.path.glob("*.safetensors") for k, v in load_file(file).items()}
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    total = sum(tensor.numel() for tensor in tensors.values())
    assert two.last_step["sparsity"]["all_parameters"] == pytest.approx(zeros / total, abs=1e-12)
    assert two.last_step["sparsity"]["pruned_matrices"] == pytest.approx(0.75)


def test_activations_that_overflow_end_in_a_sentence(tiny_llama_dir, tmp_path):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny_llama_dir, model)
    text.write_text("the cat sat on the mat. " * 40)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.post_attention_layernorm.weight"] *= 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    settings = {"method": "wanda", "calibration": (str(text),), "samples": 2, "length": 32, "dtype": "float32"}
    with pytest.raises(UserError, match=r"the inputs of model\.layers\.0\.mlp\.\w+ became NaN or Inf in float32"):
        prunus.sparsify(model, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
