"""`prunus export --to sparse`, proved, measured and evaluated by its own engine, as a user calls it."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

import prunus
from packed_models import save_sparse, write_packed
from prunus.checkpoint import open_checkpoint, read_record
from prunus.engines import ENGINES
from prunus.engines.worker import bytes_of
from prunus.errors import EngineError, UserError
from prunus.exporting import parse_target, sparse_directory
from prunus.exporting.exported import find_exported
from prunus.exporting.sparse_directory import SPARSE_TYPES
from prunus.models.streamed import open_model
from prunus.runtime.native import Kernels

SIZES = {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2, "threads": 1}


def with_tokenizer(folder, tiny_tokenizer):
    made = AutoModelForCausalLM.from_pretrained(folder)
    made.resize_token_embeddings(len(tiny_tokenizer))
    made.config.bos_token_id, made.config.eos_token_id = 0, 1
    made.generation_config.bos_token_id, made.generation_config.eos_token_id = 0, 1
    made.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    """A tiny random Llama, 60% of its weights zero, with a tokenizer."""
    return with_tokenizer(save_sparse("llama", tmp_path_factory.mktemp("sparse") / "model"), tiny_tokenizer)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tiny_tokenizer):
    """The same with all its weights."""
    folder = save_sparse("llama", tmp_path_factory.mktemp("sparse") / "dense", sparsity=0.0)
    return with_tokenizer(folder, tiny_tokenizer)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return prunus.export(model, tmp_path_factory.mktemp("sparse") / "out", to="sparse:int8")


def test_the_record_says_what_was_chosen_and_what_it_saves(run):
    step = run.last_step
    assert (step["format"], step["type"], step["engine"]["name"]) == ("sparse", "int8", "sparse-cpu")
    assert step["proof"]["kl"] <= step["proof"]["kl_allowed"]
    assert step["layouts"]["bitmask"]["matrices"] == 21
    assert step["layouts"]["dense"]["matrices"] == 1  # the head
    assert step["layouts"]["bitmask"]["bytes"] < 0.75 * step["layouts"]["bitmask"]["bytes_dense"]
    rows = {row["name"]: row for row in step["matrices"]}
    assert rows["lm_head"]["layout"] == "dense"
    assert rows["model.layers.0.mlp.up_proj"]["type"] == "int8"
    assert sum(row["bytes"] for row in rows.values()) == sum(one["bytes"] for one in step["layouts"].values())
    assert 0.5 < step["coverage"]["sparse"] < step["coverage"]["packed"] < 1
    checkpoint = open_checkpoint(run.path)
    embedding = checkpoint.tensors["model.embed_tokens.weight"].num_bytes
    assert step["decode_bytes_per_token"] == checkpoint.num_bytes - embedding
    assert step["bytes"] == pytest.approx(bytes_of(run.path), abs=100_000)
    assert step["parameters"] == open_checkpoint(step["input"]["path"]).num_parameters


def test_the_same_again_is_done_already(run, model):
    assert prunus.export(model, run.path, to="sparse:int8").reused


def test_it_is_benched_beside_the_dense_model_exported_alike(run, dense):
    told = prunus.bench(run.path, against=str(dense), engine="sparse-cpu", **SIZES)
    assert (told["engine"], told["dtype"]) == ("sparse-cpu", "int8")
    assert told["model"]["decode_bytes_per_token"] < told["dense"]["decode_bytes_per_token"]
    assert told["model"]["bytes_on_disk"] < told["dense"]["bytes_on_disk"]
    assert told["model"]["peak_memory_bytes"] > 2**20
    assert told["speedup"]["decode"]
    step = find_exported(run.path.with_name("out.dense")).step
    assert step["layouts"]["dense"]["matrices"] == 22
    assert (step["coverage"]["sparse"], step["settings"]["to"]) == (0, "sparse:int8")


def test_it_is_evaluated_in_its_engine(run, model, tmp_path):
    moved = shutil.copytree(run.path, tmp_path / "moved")
    asked = {"text": ["builtin"], "length": 32, "windows": 3, "dtype": "float32"}
    text, shown = prunus.evaluate(moved, against=str(model), prompts=["A vine"], **asked)
    (expected,) = prunus.evaluate(model, **asked)
    assert (text["engine"], text["dtype"]) == ("sparse-cpu", "int8")
    assert text["perplexity"] == pytest.approx(expected["perplexity"], rel=0.02)
    assert 0 < text["against"]["kl"] < 0.05
    assert shown["kind"] == "continuations"


def test_without_its_record_it_is_still_a_model(run, tmp_path):
    bare = shutil.copytree(run.path, tmp_path / "bare")
    (bare / "prunus.json").unlink()
    asked = {"text": ["builtin"], "length": 32, "windows": 3, "dtype": "float32"}
    (found,) = prunus.evaluate(bare, **asked)
    assert found["engine"] == "transformers"
    told = prunus.bench(bare, **SIZES)
    step = run.last_step
    assert told["model"]["parameters"] == step["parameters"]
    row = 2 * 64  # of the embedding, which the two count differently
    assert told["model"]["decode_bytes_per_token"] == step["decode_bytes_per_token"] + row
    profile = prunus.profile(bare)
    assert profile["parameters"] == step["parameters"]


def test_the_command_says_what_was_packed(run, model, prunus):
    code, printed, errors = prunus("export", model, run.path, "--to", "sparse:int8")
    assert code == 0
    told = json.loads(printed.splitlines()[-1])
    assert told["coverage"] == run.last_step["coverage"]
    assert "packed: 1 dense, " in errors
    assert "; 21 bitmask, " in errors


def test_the_report_shows_it(run, tmp_path):
    page = prunus.report([run.path], tmp_path / "report.html")
    assert "sparse-cpu" in page.read_text(encoding="utf-8")


def test_a_recipe_may_end_in_it(model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    step = {"method": "magnitude", "pattern": "0.5"}
    steps = [{"sparsify": step}, {"export": {"to": "sparse"}}]
    recipe.write_text(json.dumps({"version": 1, "model": str(model), "steps": steps}))
    made = prunus.run(recipe, tmp_path / "out")
    assert made.last_step["layouts"]["bitmask"]["matrices"] == 21


@pytest.mark.parametrize(("level", "said"), [("avx2", True), ("avx512-vbmi2", False), ("amx", False)])
def test_a_processor_that_unpacks_slowly_is_named(model, level, said, monkeypatch):
    native = SimpleNamespace(level=level, expands=Kernels.expands.fget(SimpleNamespace(_level=level)))
    monkeypatch.setattr(sparse_directory, "kernels", lambda: native)
    notes = sparse_directory.SPARSE_DIRECTORY.check(open_model(model), SPARSE_TYPES["int8"])
    assert any(f"this processor ({level})" in note for note in notes) is said


def test_a_full_disk_is_seen_beforehand(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs about 0\.0 GiB, and 0\.0 are free; choose another disk"):
        prunus.export(model, tmp_path / "out", to="sparse")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_cannot_start_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("prunus.engines.sparse_cpu.WORKER", tmp_path / "absent.py")
    with pytest.raises(EngineError, match="sparse-cpu"):
        prunus.export(model, tmp_path / "out", to="sparse")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["sparse:bf16", "sparse:int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
def test_the_space_that_is_asked_for_is_enough(tmp_path, family, to):
    source = save_sparse(family, tmp_path / "model", sparsity=0.0)
    target = parse_target(to)
    asked = target.format.size(open_model(source), target.kind)
    written = open_checkpoint(write_packed(source, tmp_path / "out", to)).num_bytes
    assert written <= asked < 1.5 * written


def test_shards_and_index_are_those_of_other_writers(model, tmp_path):
    folder = write_packed(model, tmp_path / "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) == 4  # what lies outside the blocks, and three of them
    checkpoint = open_checkpoint(folder)
    assert index["metadata"]["total_size"] == sum(info.num_bytes for info in checkpoint.parts.values())
    beside = {file.name for file in model.iterdir()} - {"model.safetensors", "prunus.json"}
    assert beside <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_is_never_read_whole(model, tmp_path, monkeypatch):
    """At most the tensors of one written file are held, whatever the number of blocks."""
    sizes = []
    write = sparse_directory.write_tensors

    def watched(file, tensors):
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        write(file, tensors)

    monkeypatch.setattr(sparse_directory, "write_tensors", watched)
    write_packed(model, tmp_path / "out")
    assert len(sizes) == 4
    assert max(sizes) < 0.5 * sum(sizes)


def test_the_engine_comes_with_prunus(prunus):
    code, printed, _ = prunus("engines")
    rows = {row["engine"]: row for row in json.loads(printed.splitlines()[-1])["engines"]}
    assert code == 0
    assert rows["sparse-cpu"]["installed"]
    assert rows["sparse-cpu"]["install"] is None
    assert ENGINES["sparse-cpu"].packages == ()


def test_a_history_goes_on(run):
    record = read_record(run.path)
    assert [entry["step"] for entry in record["history"]] == ["export"]
    assert {file.suffix for file in run.path.iterdir()} <= {".json", ".safetensors", ".jinja"}
