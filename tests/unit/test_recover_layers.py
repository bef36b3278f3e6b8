"""Which of the teacher's hidden states the blocks of a model that lost layers learn to give."""

import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus
from families import save_tiny
from prunus.checkpoint import open_checkpoint, read_record
from prunus.models.families import Family
from prunus.steps.recover_layers import ends_of_runs, kept_blocks
from recovery_case import SETTINGS, WORDS, add_tokenizer

DEPTH = 8
TRAINED = {**SETTINGS, "tokens": 2 * 4 * 32, "loss": ("hidden",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model of 8 layers, two steps that leave 5 of them, and a text."""
    root, numbers = tmp_path_factory.mktemp("depth"), random.Random(0)
    add_tokenizer(save_tiny(Family("llama", "deep", "", {"num_hidden_layers": DEPTH}), root / "dense"))
    (root / "words.txt").write_text(" ".join(f"w{numbers.randrange(WORDS)}" for _ in range(4000)))
    text = {"calibration": (str(root / "words.txt"),), "samples": 16, "length": 32, "dtype": "float32"}
    prunus.shrink(root / "dense", root / "six", layers=6, ffn=0.5, multiple_of=1, **text)
    prunus.shrink(root / "six", root / "five", layers=5, layer_score="block-influence", **text)
    return root


def recover(folder, out, *, model="five", **settings):
    return prunus.recover(folder / model, out, **{**TRAINED, "data": (str(folder / "words.txt"),), **settings})


def recorded(folder):
    """The teacher's blocks that are left, step by step from the record's own lists."""
    steps = read_record(folder / "five")["history"]
    assert [step["settings"].get("layers") for step in steps] == [6, None, 5]
    first, last = (step["axes"]["layers"]["kept"] for step in (steps[0], steps[2]))
    return [first[layer] for layer in last]


@pytest.mark.parametrize("method", ["full", "block-wise"])
def test_several_depth_steps_compose(folder, tmp_path, method):
    kept = recorded(folder)
    step = recover(folder, tmp_path / "out", method=method).last_step
    assert step["teacher_layers"] == [*kept[1:], DEPTH]


def test_a_teacher_from_the_middle_of_the_chain(folder, tmp_path):
    step = recover(folder, tmp_path / "out", teacher=str(folder / "six")).last_step
    kept = read_record(folder / "five")["history"][-1]["axes"]["layers"]["kept"]
    assert step["teacher_layers"] == [*kept[1:], 6]


def test_what_the_user_says_goes_first(folder, tmp_path):
    step = recover(folder, tmp_path / "out", teacher_blocks=(0, 2, 3, 5, 7)).last_step
    assert step["teacher_layers"] == [1, 3, 4, 6, 8]


def test_without_a_record_they_are_spread_and_it_is_said(folder, tmp_path, capsys):
    foreign = shutil.copytree(folder / "five", tmp_path / "foreign")
    (foreign / "prunus.json").unlink()
    step = recover(folder, tmp_path / "out", model=foreign, teacher=str(folder / "dense")).last_step
    assert step["teacher_layers"] == [2, 3, 5, 6, 8]
    assert "taken as evenly spread" in capsys.readouterr().err


def test_another_mapping_is_another_result(folder, tmp_path):
    """The record decides, so a run does not pass for one that was made without it."""
    foreign = shutil.copytree(folder / "five", tmp_path / "foreign")
    told = recover(folder, tmp_path / "out", model=foreign, teacher=str(folder / "dense"))
    assert not told.reused
    (foreign / "prunus.json").unlink()
    with pytest.raises(prunus.UserError, match="not the result of these settings"):
        recover(folder, tmp_path / "out", model=foreign, teacher=str(folder / "dense"))


# --- the record ---


def shrunk(before, kept, sha256, **settings):
    axes = {"layers": {"before": before, "after": len(kept), "kept": kept}}
    return {"step": "shrink", "settings": settings, "input": {"sha256": sha256}, "axes": axes}


HISTORY = [
    {"step": "sparsify", "settings": {}, "input": {"sha256": "dense"}},
    shrunk(8, [0, 1, 4, 5, 6, 7], "sparse", layers=6),
    shrunk(8, [0, 1, 4, 5, 6, 7], "between", layers=None, ffn=0.5),  # of the same call: it repeats the axis
    {"step": "recover", "settings": {}, "input": {"sha256": "small"}},
    shrunk(6, [0, 2, 3, 5], "recovered", layers=4),
]


@pytest.mark.parametrize(
    ("teacher", "whole", "kept"),
    [
        ("dense", 8, [0, 4, 5, 7]),
        ("sparse", 8, [0, 4, 5, 7]),
        ("between", 6, [0, 2, 3, 5]),
        ("recovered", 6, [0, 2, 3, 5]),
        ("another", 8, None),
        ("dense", 9, None),  # the lists are not about that many layers
    ],
)
def test_the_blocks_left_of_each_model_of_a_chain(teacher, whole, kept):
    assert kept_blocks(HISTORY, teacher, whole) == kept


def test_a_step_that_says_less_than_which_layers_is_no_answer():
    assert kept_blocks([{"settings": {"layers": 3}, "input": {"sha256": "dense"}}], "dense", 8) is None


def test_a_block_answers_for_the_run_behind_it_and_the_first_for_the_one_before_it():
    assert ends_of_runs([0, 1, 4, 5, 7], 8) == (1, 4, 5, 7, 8)
    assert ends_of_runs([2, 3], 6) == (3, 6)


def test_the_fold_leads_to_the_state_that_the_block_is_given(folder, tmp_path):
    """Of all the teacher's states, the fold brought the block's output nearest to the one behind the run."""
    text = {"calibration": (str(folder / "words.txt"),), "samples": 64, "length": 32, "dtype": "float32"}
    outs = [
        prunus.shrink(folder / "dense", tmp_path / str(fold), layers=5, fold=fold, **text) for fold in (True, False)
    ]
    kept = kept_blocks(outs[0].record["history"], open_checkpoint(folder / "dense").sha256, DEPTH)
    assert kept is not None
    ends = ends_of_runs(kept, DEPTH)
    before_run = next(new for new, end in enumerate(ends) if end > kept[new] + 1)
    dense = hidden_states(folder / "dense")
    folded, plain = (hidden_states(out.path)[before_run + 1] for out in outs)
    gains = [float((plain - target).square().sum() - (folded - target).square().sum()) for target in dense]
    assert max(range(DEPTH), key=gains.__getitem__) == ends[before_run]  # the last state is behind the final norm
    torch.testing.assert_close(plain, dense[kept[before_run] + 1])


def hidden_states(directory):
    tokens_NT = torch.randint(4, WORDS, (8, 32), generator=torch.Generator().manual_seed(3))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens_NT, output_hidden_states=True).hidden_states
