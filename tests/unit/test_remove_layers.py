"""Removing layers: what is refused, what an interruption keeps, what goes along."""

import json
import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from families import TINY, class_name, save_tiny, tiny_config
from prunus.checkpoint import output as output_module
from prunus.errors import UserError
from prunus.evaluation.divergence import token_kl
from prunus.models import open_model
from prunus.models.families import Family
from prunus.models.layers import LayerNumbers, fields_without
from prunus.steps import layer_greedy, layer_writing
from prunus.steps.layer_choice import removed_runs
from removing import remove_layers

DEPTH = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Eight layers, of which 2, 5 and 6 do little; a word for each token; tied embeddings; a chat template."""
    sizes = {"num_hidden_layers": DEPTH, "tie_word_embeddings": True}
    directory = save_tiny(Family("llama", "deep", "", sizes), tmp_path_factory.mktemp("deep") / "model")
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for layer in (2, 5, 6):
            for parameter in whole.model.layers[layer].parameters():
                parameter.mul_(0.3)
    whole.save_pretrained(directory, max_shard_size="60KB")
    words = Tokenizer(models.WordLevel(vocab={f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    file, numbers = tmp_path_factory.mktemp("text") / "words.txt", random.Random(0)
    file.write_text(" ".join(f"w{numbers.randrange(128)}" for _ in range(3000)))
    return {"calibration": (str(file),), "samples": 6, "length": 32, "dtype": "float32", "device": "cpu"}


def weights(directory):
    names = [*directory.glob("*.safetensors*"), directory / "config.json"]
    return {file.name: file.read_bytes() for file in sorted(names)}


def stop_after(monkeypatch, number):
    """Interrupt right after progress was saved for the `number`-th time."""
    original, saved = output_module.OutputDirectory.save_progress, []

    def save_then_stop(self, state):
        original(self, state)
        saved.append(state)
        if len(saved) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(output_module.OutputDirectory, "save_progress", save_then_stop)


# --- what comes out ---


def test_tied_weights_template_and_record_go_along(model, settings, tmp_path):
    run = remove_layers(model, tmp_path / "out", layers=0.75, **settings)
    whole = AutoModelForCausalLM.from_pretrained(run.path)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert "lm_head.weight" not in open_model(run.path).checkpoint.tensors
    assert (run.path / "chat_template.jinja").read_bytes() == (model / "chat_template.jinja").read_bytes()
    step = run.last_step
    assert step["axes"]["layers"] == {
        "asked": 0.75,
        "before": 8,
        "after": 6,
        "kept": [0, 1, 2, 3, 4, 7],
        "removed": [5, 6],
    }
    assert step["before"]["parameters"] > step["after"]["parameters"] == open_model(run.path).checkpoint.num_parameters
    assert len(step["scores"]) == 7
    assert [fold["layers"] for fold in step["folds"]] == [[5, 6]]
    assert not [file.name for file in run.path.iterdir() if file.name.startswith(("hidden", "progress", "lock"))]


def test_the_same_call_again_returns_at_once(model, settings, tmp_path):
    remove_layers(model, tmp_path / "out", layers=7, **settings)
    assert remove_layers(model, tmp_path / "out", layers=7, **settings).reused
    with pytest.raises(UserError, match="not the result of these settings"):
        remove_layers(model, tmp_path / "out", layers=6, **settings)


def test_first_and_last_layers_are_protected(model, settings, tmp_path):
    def removed(out, **more):
        run = remove_layers(model, tmp_path / out, layers=3, score="block-influence", fold=False, **more, **settings)
        return run.last_step["axes"]["layers"]["removed"]

    assert removed("all") == removed("one", protect_first=1) != removed("three", protect_first=3, protect_last=0)
    assert removed("three", protect_first=3, protect_last=0) == [3, 4, 5, 6, 7]
    assert 0 in removed("none", protect_first=0, protect_last=3)


def test_a_run_at_the_very_start_has_nothing_to_be_folded_into(model, settings, tmp_path):
    run = remove_layers(model, tmp_path / "out", layers=4, protect_first=0, protect_last=4, **settings)
    assert run.last_step["axes"]["layers"]["removed"] == [0, 1, 2, 3]
    assert run.last_step["folds"] == []


def test_runs_are_what_lies_between_layers_that_stay():
    runs = removed_runs([1, 2, 5, 6], 8)
    assert [(run.before, run.layers, run.boundary) for run in runs] == [(-1, (0,), 1), (2, (3, 4), 5), (6, (7,), 8)]


def test_what_greedy_judged_as_folded_is_what_is_written(model, settings, tmp_path):
    """One layer goes: the KL that chose it is that of the model in OUT, on the text that judged."""
    run = remove_layers(model, tmp_path / "out", layers=7, score="greedy-kl-folded", judged=6, **settings)
    (found,) = run.last_step["scores"]
    batch_NT = tokens(model, settings)
    log = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in (model, run.path)]
    with torch.no_grad():
        dense, smaller = ([whole(batch_NT[n : n + 1]).logits[0] for n in range(6)] for whole in log)
    kl = torch.cat([token_kl(p, q) for p, q in zip(dense, smaller, strict=True)]).mean()
    assert float(kl) == pytest.approx(found["kl"][str(found["removed"])], rel=1e-3)
    assert found["kl"][str(found["removed"])] == min(found["kl"].values())


def tokens(model, settings):
    from prunus.settings_shrink import LayersSettings
    from prunus.steps.calibration_text import calibration_batch

    return calibration_batch(open_model(model), LayersSettings.check(layers=7, **settings)).tokens_NT


def test_names_of_other_tensors_of_a_layer_follow_too(model, settings, tmp_path):
    """Old checkpoints hold rotary buffers that no parameter wants; those of a removed layer go with it."""
    from safetensors.torch import load_file, save_file

    old = shutil.copytree(model, tmp_path / "old")
    file = sorted(old.glob("*.safetensors"))[0]
    index = json.loads((old / "model.safetensors.index.json").read_text())
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((2,), float(i)) for i in range(DEPTH)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(extra, file.name)
    (old / "model.safetensors.index.json").write_text(json.dumps(index))
    out = remove_layers(old, tmp_path / "out", layers=6, score="block-influence", fold=False, **settings)
    kept, checkpoint = out.last_step["axes"]["layers"]["kept"], open_model(out.path).checkpoint
    found = {key: checkpoint.read(key)[0].item() for key in checkpoint.tensors if "inv_freq" in key}
    assert found == {f"model.layers.{new}.self_attn.rotary_emb.inv_freq": float(i) for new, i in enumerate(kept)}


# --- interrupted ---


@pytest.mark.parametrize("saves", [1, 2, 3, 4])
@pytest.mark.parametrize("score", ["greedy-kl", "greedy-kl-folded"])
def test_interrupted_between_rounds_and_folds_it_gives_the_same_bytes(
    score, saves, model, settings, tmp_path, monkeypatch
):
    wish = {"layers": 6, "score": score, "judged": 3, **settings}
    whole = remove_layers(model, tmp_path / "whole", **wish)
    stop_after(monkeypatch, saves)
    with pytest.raises(KeyboardInterrupt):
        remove_layers(model, tmp_path / "out", **wish)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    rounds, original = [], layer_greedy.Judge.kl_without_each
    monkeypatch.setattr(layer_greedy.Judge, "kl_without_each", lambda *args: rounds.append(args) or original(*args))
    again = remove_layers(model, tmp_path / "out", **wish)
    assert len(rounds) == max(2 - saves, 0)  # no round that was saved is judged again
    assert weights(again.path) == weights(whole.path)
    assert again.last_step["scores"] == whole.last_step["scores"]
    assert again.last_step["folds"] == whole.last_step["folds"]


def test_a_fold_that_was_written_is_not_made_again(model, settings, tmp_path, monkeypatch):
    wish = {"layers": 5, "score": "block-influence", **settings}
    whole = remove_layers(model, tmp_path / "whole", **wish)
    assert [fold["layers"] for fold in whole.last_step["folds"]] == [[2], [5, 6]]
    stop_after(monkeypatch, 2)  # the choice, then the first fold
    with pytest.raises(KeyboardInterrupt):
        remove_layers(model, tmp_path / "out", **wish)
    monkeypatch.undo()
    fits, original = [], layer_writing.fit_folds
    monkeypatch.setattr(layer_writing, "fit_folds", lambda *args: fits.append(args[1]) or original(*args))
    again = remove_layers(model, tmp_path / "out", **wish)
    assert fits == [4]
    assert weights(again.path) == weights(whole.path)
    assert again.last_step["folds"] == whole.last_step["folds"]


# --- refused ---


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"layers": 0}, "layers=0 leaves nothing; write a size of at least 1"),
        ({"layers": 0.0}, "layers=0.0 is the ratio that stays"),
        ({"layers": 1.5}, "layers=1.5 is the ratio that stays"),
        ({"layers": 9}, "layers=9 was asked for, but the model has 8; take 2 to 7"),
        ({"layers": 8}, "layers=8 keeps all 8 layers; take 2 to 7"),
        ({"layers": 0.99}, "layers=0.99 keeps all 8 layers"),
        ({"layers": 0.1}, "would leave 1 of 8, but the first 1 and the last 1 are protected"),
        ({"layers": 4, "protect_first": 3, "protect_last": 2}, "take 5 to 7, or protect fewer"),
        ({"layers": 6, "score": "depth"}, "unknown score 'depth' of layers; allowed are greedy-kl"),
        ({"layers": 6, "score": "greedy-kl-folded", "fold": False}, "judges layers as folded"),
        ({"layers": 6, "keep": 3}, "unknown setting 'keep'"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(wish, sentence, model, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("prunus.checkpoint.directory.Checkpoint.read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=sentence):
        remove_layers(model, tmp_path / "out", **wish, **settings)
    assert not list(tmp_path.iterdir())


def test_an_architecture_whose_layers_alternate_by_rule_is_refused():
    """Every second layer has experts, and the config has no other way to say so once the numbers change."""
    sizes = {**TINY["qwen3_moe"].tiny_sizes, "decoder_sparse_step": 2, "mlp_only_layers": [], "num_hidden_layers": 6}
    config = type(tiny_config(TINY["qwen3_moe"]))(**sizes, architectures=[class_name("qwen3_moe")])
    with pytest.raises(UserError, match=r"'qwen3_moe' cannot lose layers: its config cannot say that layer \d"):
        fields_without(config, [0, 2, 3, 4, 5])
    assert fields_without(config, [0, 1, 4, 5])["num_hidden_layers"] == 4


def test_a_scale_that_depends_on_the_number_of_the_layer_is_refused():
    sizes = {**TINY["gpt2"].tiny_sizes, "scale_attn_by_inverse_layer_idx": True}
    config = type(tiny_config(TINY["gpt2"]))(**sizes, architectures=["GPT2LMHeadModel"])
    with pytest.raises(UserError, match=r"'gpt2' cannot lose layers: .*attn.scaling differs"):
        fields_without(config, [0, 2])


def test_names_without_the_layers_number_are_refused():
    with pytest.raises(UserError, match="do not hold the number of their layer in one place"):
        LayerNumbers.found_in([["a.first.weight"], ["a.second.weight"]], "strange")
    numbers = LayerNumbers.found_in(
        [["h.0.experts.0.w", "h.0.experts.1.w"], ["h.1.experts.0.w", "h.1.experts.1.w"]], ""
    )
    assert numbers.renamed("h.1.experts.1.w", 0) == "h.0.experts.1.w"
    assert numbers.layer_of("wte.weight") is None


def test_too_little_memory_is_said(model, settings, tmp_path):
    with pytest.raises(UserError, match="too small"):
        remove_layers(model, tmp_path / "out", layers=6, max_memory="1MiB", **settings)


def test_the_config_of_a_plain_model_changes_in_one_field():
    config = LlamaConfig(**TINY["llama"].tiny_sizes, architectures=["LlamaForCausalLM"])
    assert fields_without(config, [0, 2]) == {"num_hidden_layers": 2}
