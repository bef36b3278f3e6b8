"""Each mistake with `prunus recover` ends in one sentence, exit code 2, and nothing that looks finished."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

import prunus
from prunus import cli
from prunus.errors import UserError
from prunus.recovery.memory import Sizes, check_fits

SMALL = (
    "--tokens",
    512,
    "--length",
    32,
    "--batch-tokens",
    64,
    "--held-out",
    2,
    "--dtype",
    "float32",
    "--device",
    "cpu",
)


@pytest.fixture
def sparse(tmp_path, model):
    return prunus.sparsify(model, tmp_path / "sparse", method="magnitude", device="cpu").path


@pytest.fixture
def wrong(refused, tmp_path, sparse, text):
    """Recover with a mistake in the options; returns the sentence."""

    def run(*extra: object, data: object = text) -> str:
        return refused("recover", sparse, tmp_path / "out", *SMALL, "--data", data, *extra)

    return run


def test_no_text(refused, tmp_path, sparse):
    assert "give --data" in refused("recover", sparse, tmp_path / "out")


@pytest.mark.parametrize(("content", "expected"), [("", "empty"), (" \n\n ", "empty"), ("too short", "none is left")])
def test_text_that_gives_no_window(wrong, tmp_path, content, expected):
    (tmp_path / "bad.txt").write_text(content)
    assert expected in wrong(data=tmp_path / "bad.txt")


def test_a_teacher_with_another_vocabulary(wrong, tmp_path, model):
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another vocabulary (258 tokens, the model 258)" in wrong("--teacher", other)


def test_a_teacher_with_more_tokens(wrong, tmp_path):
    from families import TINY, save_tiny
    from recovery_case import add_tokenizer

    assert "another vocabulary (128 tokens" in wrong(
        "--teacher", add_tokenizer(save_tiny(TINY["llama"], tmp_path / "t"))
    )


def test_no_teacher_and_no_record(refused, tmp_path, model, text):
    sentence = refused("recover", model, tmp_path / "out", *SMALL, "--data", text)
    assert "has no record that names its dense model; give it with --teacher" in sentence


def test_the_recorded_teacher_is_gone(wrong, model):
    model.rename(model.with_name("moved"))
    assert "is not there any more; give it with --teacher" in wrong()


@pytest.mark.parametrize(
    ("name", "mask", "expected"),
    [
        ("model.layers.9.mlp.up_proj", torch.ones(128, 64, dtype=torch.bool), "is no matrix of this model"),
        ("model.layers.0.mlp.up_proj", torch.ones(64, 128, dtype=torch.bool), "must be torch.bool (128, 64)"),
        ("model.layers.0.mlp.up_proj", torch.ones(128, 64), "must be torch.bool (128, 64)"),
        ("model.layers.0.mlp.up_proj", torch.zeros(128, 64, dtype=torch.bool), "recover never prunes"),
    ],
)
def test_a_mask_that_does_not_fit(wrong, tmp_path, name, mask, expected):
    save_file({name: mask}, tmp_path / "masks.safetensors")
    assert expected in wrong("--keep-zeros", tmp_path / "masks.safetensors")


def test_a_mask_file_that_is_none(wrong, text):
    assert "neither auto, none nor a safetensors file" in wrong("--keep-zeros", text)


def test_weights_that_changed_since_their_record(wrong, tmp_path, sparse):
    record = json.loads((sparse / "prunus.json").read_text())
    record["history"][-1]["matrices"][0]["sparsity"] = 0.8
    (sparse / "prunus.json").write_text(json.dumps(record))
    assert "they were changed since" in wrong()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--tokens", 32), "less than one batch of 64 tokens"),
        (("--tokens", "many"), "tokens='many' is not allowed"),
        (("--loss", "kl"), "give one or several of ce, logits, hidden"),
        (("--loss", "ce=-1"), "a weight is a number above 0"),
        (("--batch-tokens", 16), "give a multiple of 32"),
        (("--micro-batch", 3), "give a multiple of 96"),
        (("--method", "block-wise"), "takes --loss hidden"),
        (("--top-k", 8, "--loss", "hidden"), "takes loss logits"),
        (("--top-k", 1000), "vocabulary has 258 tokens"),
        (("--length", 1024, "--batch-tokens", 1024, "--tokens", 1024), "over the model's maximum of 512"),
        (("--loss", "hidden", "--teacher-blocks", "1,0"), "rising numbers from 0 to 1"),
        (("--method", "magic"), "method='magic' is not allowed"),
        (("--lr", 0), "lr=0.0 is not allowed"),
    ],
)
def test_settings_that_cannot_be(wrong, options, expected):
    assert expected in wrong(*options)


def test_hidden_states_of_another_width(wrong, tmp_path, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    wide = tmp_path / "wide"
    config = LlamaConfig.from_pretrained(model, hidden_size=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    AutoTokenizer.from_pretrained(model).save_pretrained(wide)
    assert "the model has 64 and the teacher 128: use --loss logits" in wrong("--teacher", wide, "--loss", "hidden")


@pytest.mark.parametrize(
    ("limit", "way_out"),
    [("2MiB", "--method block-wise would fit"), ("1KiB", "even block-wise training would not fit")],
)
def test_memory_that_is_too_small_is_said_before_starting(wrong, limit, way_out):
    sentence = wrong("--max-memory", limit)
    assert "not enough memory: --method full takes about" in sentence
    assert way_out in sentence


SIZES = Sizes(
    method="full", parameters=135_000_000, masked=106_000_000, adapted=5_000_000, teacher_parameters=135_000_000,
    largest_block=3_500_000, num_blocks=30, hidden=576, ffn=1536, vocabulary=49152, length=1024, micro_batch=4,
    forward_bytes=2, checkpointing=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("gigabytes", "way_out"),
    [
        (8.0, "--micro-batch 1"),
        (4.0, "--micro-batch 1 --gradient-checkpointing"),
        (2.5, "--method lora --gradient-checkpointing"),
        (1.8, "--method block-wise"),
    ],
)
def test_the_mildest_setting_that_fits_is_named(gigabytes, way_out):
    with pytest.raises(UserError, match=re.escape(f"there; {way_out} would fit")):
        check_fits(SIZES, int(gigabytes * 1e9))


def test_tensorboard_without_its_package(wrong, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert "pip install 'prunus[train]'" in wrong("--tensorboard", "events")


def test_out_inside_model(refused, sparse, text):
    out = sparse / "out"
    assert "lies inside MODEL" in refused("recover", sparse, out, *SMALL, "--data", text, out=out)


def test_the_command_ends_with_one_object(prunus, tmp_path, sparse, text):
    code, printed, errors = prunus("recover", sparse, tmp_path / "out", *SMALL, "--data", text, "--lr", "1e-4")
    assert code == 0
    result = json.loads(printed.splitlines()[-1])
    assert result["step"] == "recover"
    assert result["tokens"] == 512
    assert result["held_out_after"]["kl"] <= result["held_out_before"]["kl"]
    assert "the teacher is" in errors
    assert "none came back" in errors


def test_interrupted_it_says_that_it_goes_on():
    assert "recover" in cli.GO_ON
