"""The block pass against the slow literal procedure: before each stage, run the whole model again and look."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from families import TINY, save_tiny
from prunus.calibration import BlockPass, HiddenStates, embed_all, hidden_shape, staged_run
from prunus.models import StreamedModel, open_model
from prunus.sparsity import METHODS, Statistics, Unstructured, prune
from prunus.steps.plan import Plan
from prunus.steps.sparsify_edit import SparsifyEdit

TOKENS = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(1))
REAL = torch.ones(3, 20, dtype=torch.bool)
REAL[1, 12:] = False
REAL[2, 5:] = False
PATTERN = Unstructured(0.5, "row")


def run_pass(directory, propagate, num_in_memory, real=REAL):
    model = open_model(directory)
    method = METHODS["wanda"]
    plan = Plan({block.full_name(linear): PATTERN for block, linear in model.spec.matrices})
    edit = SparsifyEdit(method, method.options(), plan)
    shape = hidden_shape(model, TOKENS)
    hidden = [HiddenStates(shape, model.dtype), HiddenStates(shape, model.dtype)]
    embed_all(model, TOKENS, hidden[0])
    block_pass = BlockPass(model=model, real_NT=real, edit=edit, propagate=propagate, num_in_memory=num_in_memory)
    states = {}
    for index in range(len(model.spec.blocks)):
        states |= block_pass.run_block(index, hidden[index % 2], hidden[(index + 1) % 2])
    return states, hidden[len(model.spec.blocks) % 2].states_NTH, edit.matrices


def literal(directory, propagate):
    """Prune stage after stage; the inputs of each come from forward passes of the whole model with plain hooks."""
    spec = open_model(directory).spec
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    observed = copy.deepcopy(model) if propagate == "dense" else model
    for block in spec.blocks:
        for stage in block.stages:
            inputs = inputs_of(observed, f"{block.name}.{stage.module}", stage.weight)
            for group, x_TI in zip(stage.groups, inputs, strict=True):
                statistics = Statistics(num_tokens=len(x_TI), input_sq_norm_I=x_TI.square().mean(0))
                for linear in group.linears:
                    weight_OI = linear.view(model.get_parameter(f"{block.name}.{linear.parameter}").data)
                    weight_OI.copy_(prune(METHODS["wanda"], weight_OI, statistics, PATTERN).weight_OI)
    return model


def inputs_of(model, name, weight):
    """For each matrix group of a stage, the inputs of all real tokens; experts see those that are sent to them."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args))
    with torch.no_grad():
        for n in range(len(TOKENS)):
            model(TOKENS[n : n + 1])
    handle.remove()
    if weight is None:
        assert isinstance(module, nn.Linear | Conv1D)
        flat = [x.reshape(-1, x.shape[-1]) for x, *_ in seen]  # some families drop the batch axis inside a block
        return [torch.cat([x_TI[real] for x_TI, real in zip(flat, REAL, strict=True)])]
    return [
        torch.cat([expert_inputs(module, weight, e, args, real) for args, real in zip(seen, REAL, strict=True)])
        for e in range(module.num_experts)
    ]


def expert_inputs(experts, weight, expert, args, real):
    """From what a bank of experts is called with: the real tokens that one expert gets, up to the asked matrix."""
    hidden_TH, chosen_TK, _ = args
    x_TH = hidden_TH[(chosen_TK == expert).any(1) & real]
    if weight == "gate_up_proj":
        return x_TH
    gate_TF, up_TF = (x_TH @ experts.gate_up_proj.data[expert].T).chunk(2, dim=1)
    return experts.act_fn(gate_TF) * up_TF


@pytest.fixture(scope="module", params=TINY)
def directory(request, tmp_path_factory):
    return save_tiny(TINY[request.param], tmp_path_factory.mktemp(request.param) / "model")


@pytest.mark.parametrize("propagate", ["sparse", "dense"])
def test_equals_the_literal_procedure(directory, propagate):
    states, _, matrices = run_pass(directory, propagate, num_in_memory=2)
    expected = literal(directory, propagate).state_dict()
    for name, tensor in states.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    assert {row["tokens"] for row in matrices if "experts" not in row["name"]} == {int(REAL.sum())}


def test_hidden_states_are_those_of_the_pruned_model(directory):
    _, hidden_NTH, _ = run_pass(directory, "sparse", num_in_memory=3)
    seen = []
    model = literal(directory, "sparse")
    last = model.get_submodule(open_model(directory).spec.blocks[-1].name)
    last.register_forward_hook(lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        for n in range(len(TOKENS)):
            model(TOKENS[n : n + 1])
    torch.testing.assert_close(hidden_NTH, torch.cat(seen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_in_memory", [1, 2])
def test_sequences_that_wait_on_disk_give_the_same_bits(directory, num_in_memory, monkeypatch):
    expected, expected_NTH, _ = run_pass(directory, "sparse", len(TOKENS))
    on_disk = []
    spilled = staged_run.Spilled
    monkeypatch.setattr(staged_run, "Spilled", lambda held, file: on_disk.append(len(held)) or spilled(held, file))
    states, hidden_NTH, _ = run_pass(directory, "sparse", num_in_memory)
    in_front_of_blocks = 3 * (len(TOKENS) - num_in_memory)  # where a block without a first norm has made nothing yet
    assert on_disk.count(0) in (0, in_front_of_blocks), "every waiting sequence has something to put on disk"
    assert all(torch.equal(states[name], expected[name]) for name in expected)
    assert torch.equal(hidden_NTH, expected_NTH)


def test_padding_does_not_enter_statistics(directory, monkeypatch):
    """Other tokens in the padding, the same result."""
    states, _, _ = run_pass(directory, "sparse", 2)
    monkeypatch.setitem(globals(), "TOKENS", torch.where(REAL, TOKENS, 7))
    changed, _, _ = run_pass(directory, "sparse", 2)
    assert all(torch.equal(states[name], changed[name]) for name in states)


def test_padding_does_not_reach_experts(tmp_path, monkeypatch):
    directory = save_tiny(TINY["mixtral"], tmp_path / "model")
    states, _, matrices = run_pass(directory, "sparse", 2)
    monkeypatch.setitem(globals(), "TOKENS", torch.where(REAL, TOKENS, 7))
    changed, _, _ = run_pass(directory, "sparse", 2)
    assert all(torch.equal(states[name], changed[name]) for name in states)
    experts = [row for row in matrices if row["block"] == 0 and row["projection"] == "mlp.experts.gate_up_proj"]
    assert sum(row["tokens"] for row in experts) == 2 * int(REAL.sum())  # each token wakes two


@pytest.mark.parametrize("propagate", ["sparse", "dense"])
def test_the_grad_mode_stays_the_callers(directory, propagate):
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            enabled = torch.is_grad_enabled()
            states, hidden_NTH, _ = run_pass(directory, propagate, num_in_memory=2)
            assert torch.is_grad_enabled() == enabled
        assert not any(tensor.requires_grad for tensor in [hidden_NTH, *states.values()])


def test_sequences_that_take_turns_leave_the_grad_mode_alone(directory):
    model = open_model(directory)
    hidden = [model.embed(TOKENS[n : n + 1]) for n in range(len(TOKENS))]
    model.load_block(0)
    with staged_run.stops_at_stages(model.blocks[0], model.spec.blocks[0].stages):
        runs = [staged_run.StagedRun(model, 0, hidden_1TH) for hidden_1TH in hidden]
        for _ in range(len(model.spec.blocks[0].stages) + 1):
            for run in runs:
                run.advance()
                assert torch.is_grad_enabled()
    assert not any(run.output_1TH.requires_grad for run in runs)


def test_memory_holds_one_block_at_a_time(directory, monkeypatch):
    """Whenever a block is loaded, no other one is."""
    loaded = []
    original = StreamedModel.load_block

    def load_and_count(self, index):
        state = original(self, index)
        loaded.append([i for i, block in enumerate(self.blocks) if not any(p.is_meta for p in block.parameters())])
        return state

    monkeypatch.setattr(StreamedModel, "load_block", load_and_count)
    run_pass(directory, "sparse", 2)
    assert loaded == [[0], [1], [2]]
