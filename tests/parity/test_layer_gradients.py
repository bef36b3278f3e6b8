"""Taylor+ of layers, one layer at a time, against one backward pass of the whole model by autograd."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import prunus
from families import TINY, save_tiny
from prunus.errors import UserError
from prunus.models import open_model
from prunus.models.families import Family
from prunus.models.trace import find_blocks
from prunus.steps.layer_gradients import check_memory, taylor_sums
from prunus.text.batches import TokenBatch

TOKENS = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(1))
REAL = torch.ones(3, 20, dtype=torch.bool)
REAL[1, 12:] = False
DEPTH = 9


def literal(directory):
    """The paper's sum over all weights of each matrix; the loss is the mean over all real next tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    losses = []
    for tokens_T, real_T in zip(TOKENS, REAL, strict=True):
        logits_TV = model(tokens_T[None]).logits[0]
        losses.append(nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:], reduction="none")[real_T[1:]])
    torch.cat(losses).mean().backward()
    matrices = [[p for p in block.parameters() if p.ndim > 1] for block in find_blocks(model)[1]]
    return [sum(float((p.detach() * p.grad).abs().sum()) for p in block) for block in matrices]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "qwen3_moe"])
def test_it_is_that_of_the_whole_model_by_autograd(name, tmp_path, monkeypatch):
    monkeypatch.setattr("prunus.steps.layer_gradients.POSITIONS_AT_ONCE", 7)
    directory = save_tiny(TINY[name], tmp_path / "model")
    with torch.no_grad():
        found = taylor_sums(open_model(directory), TokenBatch(TOKENS, REAL, []), tmp_path)
    assert found == pytest.approx(literal(directory), rel=1e-3)


# --- in the step ---


@pytest.fixture(scope="module")
def deep(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("deep")
    sizes = {"num_hidden_layers": DEPTH, "vocab_size": len(tiny_tokenizer)}
    tiny_tokenizer.save_pretrained(save_tiny(Family("llama", "deep", "", sizes), root / "model"))
    (root / "text.txt").write_text("".join(f"{n} brown foxes, {n * 7} lazy dogs. " for n in range(200)))
    return root


def shrink(deep, out, **settings):
    text = {"calibration": (str(deep / "text.txt"),), "samples": 4, "length": 32, "dtype": "float32"}
    return prunus.shrink(deep / "model", out, layer_score="taylor+", **{**text, **settings})


def test_the_lowest_go_but_never_the_first_four_or_the_last_two(deep, tmp_path):
    step = shrink(deep, tmp_path / "out", layers=7, judged=3).last_step
    scores = step["scores"]
    assert len(scores) == DEPTH
    assert step["axes"]["layers"]["removed"] == sorted(sorted(range(4, 7), key=scores.__getitem__)[:2])
    assert not list((tmp_path / "out").glob("hidden*"))


def test_a_killed_run_ends_in_the_same_scores(deep, tmp_path, monkeypatch):
    whole = shrink(deep, tmp_path / "whole", layers=7)
    monkeypatch.setattr("prunus.steps.layer_job.LayerWriter", None)  # it stops behind the choice
    with pytest.raises(TypeError):
        shrink(deep, tmp_path / "out", layers=7)
    monkeypatch.undo()
    monkeypatch.setattr("prunus.steps.layer_step.taylor_sums", None)  # the choice was kept
    assert shrink(deep, tmp_path / "out", layers=7).last_step["scores"] == whole.last_step["scores"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": 5}, "take 6 to 8, or take another score: taylor\\+ never removes the first 4 and last 2"),
        ({"layers": 6, "protect_first": 5}, "would leave 6 of 9, but the first 5 and the last 2 are protected"),
        ({"layers": 7, "length": 10**9}, "GiB for one layer with its gradients .* Take a smaller --length"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(settings, sentence, deep, tmp_path, monkeypatch):
    monkeypatch.setattr("prunus.checkpoint.directory.Checkpoint.read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=sentence):
        shrink(deep, tmp_path / "out", **settings)


def test_the_limit_of_memory_is_that_of_the_user(deep):
    with pytest.raises(UserError, match=r"0\.0 GiB are there"):
        check_memory(open_model(deep / "model"), 32, 1 << 20)
    check_memory(open_model(deep / "model"), 32, 1 << 40)
