"""`prunus quantize`: what it writes and records, what reads it back, and every mistake in one sentence."""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import prunus
from families import TINY, save_tiny
from prunus.checkpoint import open_checkpoint
from prunus.checkpoint import output as output_module
from prunus.errors import UserError
from prunus.models import open_model, whole
from prunus.models.families import Family
from prunus.pipeline import check_recipe
from prunus.quantizing import QUANTIZERS, SCHEMES, quantize_matrix
from prunus.recipe import parse_recipe
from prunus.settings_quantize import QuantizeSettings
from prunus.sparsity import Statistics
from prunus.steps.calibration_text import calibration_batch
from prunus.steps.quantize_dry_run import dry_run

CALIBRATED = {"samples": 4, "length": 64, "dtype": "float32"}


@pytest.fixture
def int8(model, tmp_path):
    return prunus.quantize(model, tmp_path / "int8", scheme="int8", dtype="float32").path


def test_what_is_recorded(model, text, tmp_path):
    pruned = prunus.sparsify(model, tmp_path / "half", method="magnitude", dtype="float32").path
    run = prunus.quantize(
        pruned, tmp_path / "out", scheme="int4-g32", method="gptq", calibration=(str(text),), **CALIBRATED
    )
    step = run.last_step
    assert [one["step"] for one in run.record["history"]] == ["sparsify", "quantize"]
    assert (step["scheme"], step["method"]) == ("int4-g32", "gptq")
    assert len(step["matrices"]) == 14
    for row in step["matrices"]:
        assert row["zeros_before"] == row["shape"][0] * row["shape"][1] // 2
        assert row["zeros_before"] <= row["zeros_after"]
        assert 0 < row["error"] < 0.1
        assert row["tokens"] == 256
        assert row["bytes_after"] < 0.2 * row["bytes_before"]
    assert step["num_zeros"]["before"] == sum(row["zeros_before"] for row in step["matrices"])
    assert step["peak_memory_bytes"] > 0
    stored = open_checkpoint(run.path)
    on_disk = sum(info.num_bytes for info in stored.parts.values())
    assert step["bytes"] == {"before": open_checkpoint(pruned).num_bytes, "after": on_disk}
    assert stored.num_bytes == on_disk
    files = sum(file.stat().st_size for file in run.path.glob("*.safetensors"))
    assert on_disk < files < on_disk + 4096 * len(stored.parts)


@pytest.mark.parametrize(
    ("before", "scheme", "refused"),
    [
        ([], "int4-g128", "rows of 64 weights, no multiple of the 128"),
        ([], "int4-g32", None),
        ([{"shrink": {"ffn": 80, "multiple_of": 16}}], "int4-g32", "down_proj has rows of 80 weights"),
        ([{"shrink": {"ffn": 96, "multiple_of": 32}}], "int4-g32", None),
        ([{"shrink": {"parameters": 0.8}}], "int4-g32", None),  # nobody knows the widths yet
    ],
)
def test_a_recipe_whose_scheme_does_not_fit_is_refused_before_its_first_step(before, scheme, refused, model, tmp_path):
    steps = [*before, {"quantize": {"scheme": scheme}}]
    recipe = parse_recipe({"version": 1, "model": str(model), "steps": steps})
    with contextlib.nullcontext() if refused is None else pytest.raises(UserError, match=refused):
        check_recipe(recipe, tmp_path / "out", trust_remote_code=False)
    if refused:
        with pytest.raises(UserError, match=refused):
            prunus.run(recipe, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


def test_the_disk_has_to_hold_what_the_scheme_writes_and_no_more(model, tmp_path, monkeypatch):
    once = prunus.quantize(model, tmp_path / "once", scheme="int4-g32").path
    written = sum(file.stat().st_size for file in once.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    assert written < 0.7 * open_checkpoint(model).num_bytes
    for free, fits in ((written - 1, False), (written + 1024 * len(open_checkpoint(model).tensors), True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        for do in (dry_run, prunus.quantize):
            with contextlib.nullcontext() if fits else pytest.raises(UserError, match="no space"):
                do(model, tmp_path / "out", scheme="int4-g32")


def test_a_run_that_goes_on_needs_no_second_room_for_what_is_written(model, tmp_path, monkeypatch):
    save = output_module.OutputDirectory.save_progress

    def interrupted(output, state):
        save(output, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(output_module.OutputDirectory, "save_progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prunus.quantize(model, tmp_path / "out", scheme="int4-g32")
    monkeypatch.undo()
    written = sum(file.stat().st_size for file in (tmp_path / "out.partial").glob("*.safetensors"))
    needed = sum(prunus.quantize(model, tmp_path / "once", scheme="int4-g32").last_step["bytes"].values())
    needed -= open_checkpoint(model).num_bytes
    free = needed + 1024 * len(open_checkpoint(model).tensors) - written
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free + 4096))
    assert prunus.quantize(model, tmp_path / "out", scheme="int4-g32").path.exists()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_killed_it_goes_on_and_ends_in_the_same_bytes(method, model, text, tmp_path, monkeypatch):
    settings = {"scheme": "int4-g32", "method": method, "calibration": (str(text),), **CALIBRATED}
    whole_run = prunus.quantize(model, tmp_path / "whole", **settings).path
    save = output_module.OutputDirectory.save_progress

    def killed(self, state):
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(output_module.OutputDirectory, "save_progress", killed)
    with pytest.raises(KeyboardInterrupt):
        prunus.quantize(model, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    resumed = prunus.quantize(model, tmp_path / "out", **settings).path
    for file in whole_run.glob("*.safetensors*"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()
    assert len(prunus.Run.open(resumed).last_step["matrices"]) == 14
    assert prunus.quantize(model, tmp_path / "out", **settings).reused


def inputs_of(directory, name, tokens_NT):
    """What a matrix reads (T, I) in plain transformers."""
    model, seen = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), []
    model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens_NT)
    return torch.cat(seen)


def test_later_matrices_see_the_quantized_earlier_ones(model, text, tmp_path):
    settings = {"scheme": "int4-g32", "method": "gptq", "calibration": (str(text),), **CALIBRATED}
    quantized = open_checkpoint(prunus.quantize(model, tmp_path / "out", **settings).path)
    dense, name = open_checkpoint(model), "model.layers.1.self_attn.q_proj"
    half = shutil.copytree(model, tmp_path / "half")
    tensors = {key: (quantized if ".layers.0." in key else dense).read(key) for key in dense.tensors}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    tokens_NT = calibration_batch(open_model(model), QuantizeSettings.check(**settings)).tokens_NT
    equal = {}
    for directory in (half, model):
        x_TI = inputs_of(directory, name, tokens_NT)
        statistics = Statistics(len(x_TI), None, x_TI.T @ x_TI / len(x_TI))
        weight_OI = dense.read(f"{name}.weight")
        found = quantize_matrix(QUANTIZERS["gptq"], weight_OI, SCHEMES["int4-g32"], statistics).values_OI
        equal[directory] = float(found.isclose(quantized.read(f"{name}.weight")).float().mean())
    assert equal[half] > 0.99 > 0.9 > equal[model]


def test_joint(model, text, tmp_path):
    run = prunus.quantize(
        model,
        tmp_path / "out",
        scheme="int4-g32",
        method="gptq",
        joint=True,
        pattern="2:4",
        calibration=(str(text),),
        **CALIBRATED,
    )
    checkpoint = open_checkpoint(run.path)
    weight = checkpoint.read("model.layers.1.mlp.down_proj.weight")
    assert ((weight != 0).reshape(-1, 4).sum(1) <= 2).all()
    assert run.last_step["sparsity"]["pruned_matrices"] >= 0.5


def test_evaluate_and_profile_read_it(model, int8, text):
    (result,) = prunus.evaluate(int8, text=(str(text),), length=64, windows=2, against=str(model), dtype="float32")
    assert 0 < result["against"]["kl"] < 0.01
    profile = prunus.profile(int8)
    assert profile["bytes"] == open_checkpoint(int8).num_bytes < 0.6 * prunus.profile(model)["bytes"]
    assert profile["parameters"] == prunus.profile(model)["parameters"]
    assert len(prunus.Run.open(int8).record["evaluations"]) == 1


def test_inputs_are_rounded_where_the_scheme_says_so(model, tmp_path, text):
    """Weights of int8 and w8a8 are the same; what w8a8 computes is not."""
    paths = {
        name: prunus.quantize(model, tmp_path / name, scheme=name, dtype="float32").path for name in ("int8", "w8a8")
    }
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [open_checkpoint(path).read(name) for path in paths.values()]
    assert torch.equal(*weights)
    window = {"text": (str(text),), "length": 64, "windows": 2, "against": str(model), "dtype": "float32"}
    kl = {name: prunus.evaluate(path, **window)[0]["against"]["kl"] for name, path in paths.items()}
    assert kl["w8a8"] > 1.2 * kl["int8"]


def test_prunus_load_and_bench(int8):
    pytest.importorskip("compressed_tensors", reason="extra [quantize] is not installed")
    loaded = prunus.load(int8, dtype="float32", device="cpu")
    assert loaded(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    result = prunus.bench(int8, prompt_tokens=4, new_tokens=2, repetitions=1, device="cpu")
    assert result["model"]["decode_tokens_per_second"] > 0


def test_without_the_extra_loading_names_it(int8, monkeypatch):
    monkeypatch.setattr(whole, "is_compressed_tensors_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'prunus\[quantize\]'"):
        prunus.load(int8)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"scheme": "int3"}, "unknown scheme 'int3'; allowed are int8, w8a8, int4-g128, int4-g32, fp8"),
        ({"scheme": "gguf:q4_k_m"}, "make it with `prunus export MODEL OUT --to gguf:q4_k_m`"),
        ({"scheme": "int8", "method": "hqq"}, "unknown method 'hqq' of quantizing; allowed are rtn, gptq, awq"),
        ({"scheme": "w8a8", "method": "awq", "calibration": ("builtin",)},
         "w8a8 rounds both: take --method gptq, or a scheme of weights alone: int8, int4-g128, int4-g32"),
        ({"scheme": "int8", "method": "awq"}, "looks at calibration text: give --calibration PATH"),
        ({"scheme": "int8", "method": "awq", "calibration": ("builtin",), "joint": True, "pattern": "0.5"},
         "method 'awq' does not: add --method gptq"),
        ({"scheme": "int8", "method": "gptq"}, "looks at calibration text: give --calibration PATH"),
        ({"scheme": "int8", "calibration": ("builtin",)}, "looks at weights alone: leave --calibration out"),
        ({"scheme": "int8", "joint": True}, "--joint and --pattern go together"),
        ({"scheme": "int8", "pattern": "0.5"}, "--joint and --pattern go together"),
        ({"scheme": "int8", "joint": True, "pattern": "0.5"}, "method 'rtn' does not: add --method gptq"),
        ({"scheme": "int4-g128"}, "q_proj has rows of 64 weights, no multiple of the 128 that share a scale in "
                                  "int4-g128; schemes that fit: int8, w8a8, int4-g32, fp8"),
    ],
)  # fmt: skip
def test_bad_settings(model, tmp_path, settings, sentence):
    with pytest.raises(UserError) as error:
        prunus.quantize(model, tmp_path / "out", **settings)
    assert sentence in str(error.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "change",
    [
        lambda m, out: prunus.sparsify(m, out, method="magnitude"),
        lambda m, out: prunus.shrink(m, out, ffn=0.5, score="magnitude"),
        lambda m, out: prunus.recover(m, out, data=("builtin",), loss=("ce",)),
        lambda m, out: prunus.quantize(m, out, scheme="int8"),
    ],
    ids=["sparsify", "shrink", "recover", "quantize"],
)
def test_a_quantized_model_is_not_changed(int8, tmp_path, change):
    with pytest.raises(UserError, match=r"is quantized \(int8\).*prune and recover the model it was made from"):
        change(int8, tmp_path / "out")


@pytest.mark.parametrize(
    ("scheme", "to", "takes"),
    [
        ("int8", "gguf:q8_0", "gguf takes, each as it is: none"),
        ("int8", "vllm", "vllm takes, each as it is: w8a8, int4-g128, int4-g32, fp8"),
        ("w8a8", "vllm:bf16", "vllm takes, each as it is: w8a8"),
        ("w8a8", "vllm:fp8", "vllm takes, each as it is: w8a8"),
    ],
)
def test_a_quantized_model_is_exported_as_it_is_or_not_at_all(model, tmp_path, scheme, to, takes):
    quantized = prunus.quantize(model, tmp_path / scheme, scheme=scheme, dtype="float32").path
    with pytest.raises(UserError, match=rf"is quantized \({scheme}\), .* of quantized models {takes}"):
        prunus.export(quantized, tmp_path / "out", to=to)


def test_a_dense_model_is_not_exported_in_a_scheme(model, tmp_path):
    with pytest.raises(
        UserError, match=r"vllm:w8a8 is for what `prunus quantize --scheme w8a8` wrote, and .*/model is not"
    ):
        prunus.export(model, tmp_path / "out", to="vllm:w8a8")


@pytest.mark.parametrize("spoil", ["quant_method", "format", "num_bits"])
def test_other_formats_are_refused(int8, spoil):
    file = int8 / "config.json"
    config = json.loads(file.read_text())
    part = config["quantization_config"]
    (part["config_groups"]["group_0"]["weights"] if spoil == "num_bits" else part)[spoil] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"already quantized .* neither reads nor prunes"):
        open_checkpoint(int8)


def test_a_lost_part_is_named(int8):
    index = int8 / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = int8 / content["weight_map"]["model.layers.0.mlp.up_proj.weight_scale"]
    from safetensors.torch import load_file

    tensors = load_file(file)
    lost = "model.layers.0.mlp.up_proj.weight_packed"
    del tensors[lost], content["weight_map"][lost]
    save_file(tensors, file, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"up_proj.weight_packed of .* is missing"):
        open_checkpoint(int8)


def test_layers_that_differ_are_refused(model, tmp_path):
    differing = prunus.shrink(
        model, tmp_path / "cut", mlp=1, protect_first=0, calibration=("builtin",), samples=2, length=32
    ).path
    with pytest.raises(UserError, match="so no engine would read it quantized"):
        prunus.quantize(differing, tmp_path / "out", scheme="int8")


def test_nothing_comes_after_quantize_in_a_recipe():
    steps = [{"quantize": {"scheme": "int8"}}, {"sparsify": {}}]
    with pytest.raises(UserError, match="has sparsify after quantize"):
        parse_recipe({"version": 1, "model": "m", "steps": steps})


def test_a_recipe(model, tmp_path):
    steps = [
        {"sparsify": {"method": "magnitude", "pattern": "2:4"}},
        {"quantize": {"scheme": "int4-g32"}},
        {"evaluate": {"text": ["builtin"], "length": 64, "windows": 2, "against": "dense"}},
    ]
    run = prunus.run(parse_recipe({"version": 1, "model": str(model), "steps": steps}), tmp_path / "out")
    assert [step["step"] for step in run.record["history"]] == ["sparsify", "quantize"]
    assert run.record["evaluations"][0]["against"]["kl"] > 0


def test_the_command_line(model, text, tmp_path, prunus):
    out = tmp_path / "out"
    options = ("--scheme", "int4-g32", "--method", "gptq", "--calibration", text, "--samples", 4, "--length", 64)
    code, printed, errors = prunus("quantize", model, out, *options, "--dry-run")
    expected = json.loads(printed.splitlines()[-1])
    assert (code, expected["done"], out.exists()) == (0, False, False)
    code, printed, errors = prunus("quantize", model, out, *options)
    told = json.loads(printed.splitlines()[-1])
    assert (code, told["bytes"], told["scheme"]) == (0, expected["bytes"], "int4-g32")
    assert "MB of weights" in errors
    assert "zeros before" in errors


def test_methods_lists_schemes(prunus):
    _, printed, errors = prunus("methods")
    told = json.loads(printed.splitlines()[-1])
    assert [row["scheme"] for row in told["schemes"]] == ["int8", "w8a8", "int4-g128", "int4-g32", "fp8"]
    assert [row["method"] for row in told["quantization_methods"]] == ["rtn", "gptq", "awq"]
    assert "int4-g128" in errors


def test_bfloat16_weights_run_as_they_are_stored(tmp_path, tiny_tokenizer, text):
    sizes = {**TINY["llama"].sizes, "vocab_size": len(tiny_tokenizer)}
    dense = save_tiny(Family("llama", "llama", "", sizes), tmp_path / "dense", dtype=torch.bfloat16)
    out = prunus.quantize(dense, tmp_path / "out", scheme="int8").path
    checkpoint = open_checkpoint(out)
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.parts[name.removesuffix("weight") + "weight_scale"].dtype == torch.bfloat16
    exact = checkpoint.read(name)
    error = (exact - open_checkpoint(dense).read(name).float()).abs().amax()
    scale = exact.abs().amax(1) / 127
    assert error <= 0.52 * scale.max()


def test_the_report_tells_of_it(model, tmp_path):
    pruned = prunus.sparsify(model, tmp_path / "half", method="magnitude", dtype="float32").path
    run = prunus.quantize(pruned, tmp_path / "out", scheme="int4-g32", dtype="float32")
    page = prunus.report([run.path]).read_text()
    assert "magnitude + int4-g32" in page
    assert "362 kB dense, 114 kB now, on disk." in page
    assert "Relative squared change of each matrix&#39;s weights" in page
    assert "does not know the method" not in page
