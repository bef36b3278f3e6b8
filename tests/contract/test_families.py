"""Every tested family: streamed logits are those of transformers; pruned, saved and reloaded in a fresh process too."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prunus
from families import TINY, save_tiny
from fresh_process import fresh_logits, save_logits
from prunus.calibration import StreamedSource
from prunus.checkpoint import read_record
from prunus.errors import UserError
from prunus.models import families as families_table
from prunus.models import open_model
from prunus.sparsity import NM

TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def streamed_logits(directory: Path) -> torch.Tensor:
    model = open_model(directory)
    source = StreamedSource.__new__(StreamedSource)  # no tokenizer in these directories
    source.model, source.dtype, source._max_memory = model, model.dtype, 1 << 30
    hidden_NTH = source.final_hidden(TOKENS, "")
    return torch.cat([source.logits(TOKENS[n : n + 1], hidden_NTH[n : n + 1]) for n in range(len(TOKENS))])


def whole_logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(TOKENS[n : n + 1]).logits for n in range(len(TOKENS))])


@pytest.fixture(scope="module")
def tiny_dirs(tmp_path_factory):
    """Every family's random model and, beside it, the pruned one with the logits that a fresh process gets from it."""
    root = tmp_path_factory.mktemp("families")
    dirs = {name: (save_tiny(TINY[name], root / name), root / f"{name}-pruned") for name in TINY}
    for model, out in dirs.values():
        prunus.sparsify(model, out, method="magnitude", pattern="2:4")
    save_logits([out for _, out in dirs.values()], TOKENS)
    return dirs


@pytest.fixture(params=TINY)
def family_dir(request, tiny_dirs):
    return tiny_dirs[request.param][0]


@pytest.fixture
def pruned_dir(family_dir):
    return family_dir.with_name(f"{family_dir.name}-pruned")


def test_streamed_logits_are_those_of_transformers(family_dir):
    torch.testing.assert_close(streamed_logits(family_dir), whole_logits(family_dir), rtol=1e-4, atol=1e-4)


def test_every_matrix_of_a_block_is_found(family_dir):
    model = open_model(family_dir)
    covered = sum(linear.shape[0] * linear.shape[1] for linear in model.spec.blocks[-1].linears)
    stored = sum(
        p.numel() for name, p in model.blocks[-1].named_parameters() if p.ndim > 1 and "gate.weight" not in name
    )
    assert covered == stored


def test_pruned_saved_and_reloaded_in_a_fresh_process(family_dir, pruned_dir):
    assert read_record(pruned_dir)["history"][-1]["sparsity"]["pruned_matrices"] == 0.5
    fresh = fresh_logits(pruned_dir)
    torch.testing.assert_close(streamed_logits(pruned_dir), fresh, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fresh, whole_logits(family_dir), atol=1e-3)


def test_only_the_planned_matrices_change(family_dir, pruned_dir):
    before, after = open_model(family_dir), open_model(pruned_dir)
    assert set(after.checkpoint.tensors) == set(before.checkpoint.tensors)
    pruned = set(before.names.keys_of({f"{b.name}.{linear.parameter}" for b, linear in before.spec.matrices}))
    for name in before.checkpoint.tensors:
        same = torch.equal(before.checkpoint.read(name), after.checkpoint.read(name))
        assert same == (name not in pruned), name
    for index, block in enumerate(after.spec.blocks):
        state = after.load_block(index)
        for linear in block.linears:
            assert NM(2, 4).satisfied_by(linear.view(state[f"{block.name}.{linear.parameter}"]) != 0), linear.name


def test_a_family_that_is_not_in_the_table_works_too(tmp_path, monkeypatch):
    """The table is for people: hiding it changes nothing, so an unseen family of the usual shape works as well."""
    directory = save_tiny(TINY["qwen2"], tmp_path / "model")
    monkeypatch.setattr(families_table, "FAMILIES", ())
    torch.testing.assert_close(streamed_logits(directory), whole_logits(directory), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unlisted", ["starcoder2", "stablelm", "granite", "cohere", "bloom", "smollm3"])
def test_unlisted_families_of_the_usual_shape(unlisted, tmp_path):
    assert unlisted not in TINY
    family = families_table.Family(unlisted, unlisted, "unlisted")
    directory = save_tiny(family, tmp_path / unlisted)
    torch.testing.assert_close(streamed_logits(directory), whole_logits(directory), rtol=1e-4, atol=1e-4)
    assert prunus.sparsify(directory, tmp_path / "out", method="magnitude").last_step["matrices"]


def variant(family, directory, **sizes):
    """A random model with sizes of its own."""
    return save_tiny(families_table.Family(family, family, "", sizes), directory)


GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 128,
    "num_kv_shared_layers": 0,
}


def test_blocks_that_are_given_more_of_the_tokens_are_refused(tmp_path):
    """What one sequence's blocks are given is no stand-in for another's: no statistic may come of it."""
    model = open_model(variant("gemma4_text", tmp_path / "model", **{**GEMMA4, "hidden_size_per_layer_input": 8}))
    model.embed(TOKENS[:1])
    model.embed(TOKENS[:1])
    with pytest.raises(UserError, match="'gemma4_text' is not supported: its blocks read more of the tokens"):
        model.embed(TOKENS[1:])


def test_blocks_that_leave_something_for_later_ones_are_refused(tmp_path):
    with pytest.raises(UserError, match="'gemma4_text' is not supported: its blocks share state"):
        open_model(variant("gemma4_text", tmp_path / "model", **{**GEMMA4, "num_kv_shared_layers": 1}))


def test_a_family_is_refused_only_where_it_uses_what_is_not_understood(tmp_path):
    directory = variant("gemma4_text", tmp_path / "model", **GEMMA4)
    torch.testing.assert_close(streamed_logits(directory), whole_logits(directory), rtol=1e-4, atol=1e-4)


def test_a_text_model_inside_a_model_restores_its_own_buffers(tmp_path):
    """Gemma 3n has buffers that only its inner model knows how to fill; its blocks then are refused by name."""
    sizes = {"laurel_rank": 8, "intermediate_size": [96] * 3, "activation_sparsity_pattern": [0.0] * 3}
    directory = variant("gemma3n_text", tmp_path / "model", **{**GEMMA4, "hidden_size_per_layer_input": 8}, **sizes)
    with pytest.raises(UserError, match="'gemma3n_text' is not supported"):
        open_model(directory)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4_text"])
def test_projections_as_narrow_as_the_experts_are_many_are_pruned(family, tmp_path):
    """Keys and values of 16 rows beside 16 experts are no routers."""
    sizes = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 1}
    moe = {**GEMMA4, "enable_moe_block": True, "top_k_experts": 2} if family == "gemma4_text" else {}
    spec = open_model(variant(family, tmp_path / "model", **sizes, **moe)).spec
    names = {linear.projection for linear in spec.blocks[-1].linears}
    assert {f"self_attn.{name}_proj" for name in "qkvo"} <= names
    assert not any("router" in name or name.endswith("gate") for name in names)


def test_routers_and_gates_of_shared_experts_are_left_alone(tmp_path):
    sizes = {"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40}
    spec = open_model(variant("qwen2_moe", tmp_path / "model", **sizes, num_experts_per_tok=2)).spec
    names = {linear.projection for linear in spec.blocks[-1].linears}
    assert "mlp.shared_expert.gate_proj" in names
    assert not names & {"mlp.gate", "mlp.shared_expert_gate"}


def test_code_of_its_own_is_not_run_where_transformers_has_the_family(tmp_path):
    """Official Phi-3 checkpoints name code of their own; the result names it too and opens without it."""
    directory = save_tiny(TINY["phi3"], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Phi3Config", "AutoModelForCausalLM": "own.Phi3ForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text("raise AssertionError('this code was run')")
    out = prunus.sparsify(directory, tmp_path / "out", method="magnitude").path
    assert json.loads((out / "config.json").read_text())["auto_map"] == config["auto_map"]
    assert (out / "own.py").exists()
    torch.testing.assert_close(streamed_logits(out), whole_logits(out), rtol=1e-4, atol=1e-4)


def test_names_without_the_base_prefix_are_kept(tmp_path):
    """The official GPT-2 says `h.0.attn...` where others say `transformer.h.0.attn...`."""
    directory = save_tiny(TINY["gpt2"], tmp_path / "model", shard="1GB")
    expected, file = whole_logits(directory), directory / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    torch.testing.assert_close(streamed_logits(directory), expected, rtol=1e-4, atol=1e-4)
    out = prunus.sparsify(directory, tmp_path / "out", method="magnitude").path
    assert set(open_model(out).checkpoint.tensors) == set(bare)
    torch.testing.assert_close(streamed_logits(out), whole_logits(out), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole_logits(out), expected, atol=1e-3)
