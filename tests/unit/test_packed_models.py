"""Packed models in transformers: opened, used, saved, and refused in one sentence when something is wrong with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, AutoModelForCausalLM

import prunus
from fresh_process import run_fresh, streamed_logits
from packed_models import save_sparse, write_packed
from prunus.checkpoint import open_checkpoint
from prunus.errors import UserError
from prunus.exporting import parse_target
from prunus.models.streamed import open_model
from prunus.models.whole import load_whole
from prunus.runtime import check_packed, pack
from prunus.runtime.entry import QUANT_METHOD
from prunus.runtime.linear import PackedLinear

TOKENS = torch.arange(40).mul(7).remainder(90).add(3).reshape(2, 20)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_sparse("llama", tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """Do not write into it."""
    return write_packed(dense, tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture
def broken(packed, tmp_path):
    """A copy to spoil, with functions that change its tensors and what its config says of one matrix."""
    folder = shutil.copytree(packed, tmp_path / "broken")
    return Broken(folder)


class Broken:
    name = "model.layers.0.self_attn.q_proj"

    def __init__(self, folder):
        self.folder = folder

    def tensors(self, change):
        for file in self.folder.glob("*.safetensors"):
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
        index = {name: file.name for file in self.folder.glob("*.safetensors") for name in load_file(file)}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    def config(self, change):
        file = self.folder / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    def entry(self, **values):
        self.config(lambda config: config["quantization_config"]["matrices"][self.name].update(values))


# --- opening ---

OPEN = """
import sys
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(type(module).__name__ == "PackedLinear" for module in model.modules()))
"""


@pytest.mark.parametrize(
    "imports", ["import prunus", "import transformers.modeling_utils\nimport prunus", "import transformers, prunus"]
)
def test_it_opens_whichever_was_imported_first(packed, imports):
    assert run_fresh(OPEN.format(imports=imports), packed).split() == ["22"]


def test_without_prunus_transformers_fails_and_says_what_to_install(packed):
    failing = """
import sys
sys.stderr = sys.stdout
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("RuntimeError", error)
assert "prunus" not in sys.modules
"""
    said = run_fresh(failing, packed)
    assert f"Unknown quantization type, got {QUANT_METHOD}" in said
    assert "MISMATCH" in said
    assert said.splitlines()[-1].startswith("RuntimeError")


def test_the_command_line_still_imports_neither_torch_nor_transformers():
    code = "import prunus, prunus.cli, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert run_fresh(code).strip() == "set()"


def test_a_spec_that_is_only_looked_at_does_not_lose_the_registration():
    code = """
import importlib.util, sys, prunus, transformers
importlib.util.find_spec("transformers.quantizers.auto")
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(any("prunus" in name for name in AUTO_QUANTIZER_MAPPING), len([f for f in sys.meta_path if "prunus" in repr(f)]))
"""
    assert run_fresh(code).split() == ["True", "0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_tensors_keep_their_types_whatever_is_asked_for(packed, dtype):
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    matrix = model.model.layers[0].self_attn.q_proj
    assert isinstance(matrix, PackedLinear)
    assert {name: one.dtype for name, one in matrix.named_buffers()} == {
        "weight": torch.bfloat16,
        "weight_mask": torch.int32,
        "weight_start": torch.int64,
    }
    assert model.model.embed_tokens.weight.dtype == dtype
    assert model.dtype == dtype


def test_prunus_load_opens_it_too(packed):
    model = prunus.load(packed, dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, streamed_logits(packed, TOKENS), rtol=1e-4, atol=1e-3)
    assert not (packed / "prunus.json").exists()


# --- use ---


def test_padded_batches_generate_what_single_texts_do(packed):
    model = prunus.load(packed, dtype="float32")
    texts = [[5, 9, 13, 17, 21, 25], [40, 44], [60, 61, 62, 63]]
    longest = max(map(len, texts))
    ids = torch.tensor([[2] * (longest - len(text)) + text for text in texts])
    attention = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    together = model.generate(ids, attention_mask=attention, **options)[:, longest:]
    alone = [model.generate(torch.tensor([text]), **options)[0, len(text) :] for text in texts]
    assert together.tolist() == [one.tolist() for one in alone]


def test_greedy_text_is_that_of_the_dense_model(dense, packed):
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    exact = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).float()
    model = prunus.load(packed, dtype="float32")
    for prompt in TOKENS:
        assert torch.equal(model.generate(prompt[None], **options), exact.generate(prompt[None], **options))


def test_the_whole_model_compiles_without_a_break(packed):
    model = prunus.load(packed, dtype="float32")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(found, model(TOKENS, use_cache=False).logits, rtol=1e-4, atol=1e-3)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_it(packed):
    model = prunus.load(packed, dtype="float32")
    compiled = torch.compile(model)
    with torch.no_grad():
        for tokens in (TOKENS, TOKENS[:1, :1]):
            found, expected = (one(input_ids=tokens, use_cache=False).logits for one in (compiled, model))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_outside_no_grad_it_gives_the_same_and_prompts_can_be_tuned(packed):
    model = prunus.load(packed, dtype="float32")
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    logits.square().mean().backward()
    assert embedded.grad.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(logits, model(TOKENS, use_cache=False).logits)


def test_it_is_no_model_to_train(packed):
    quantizer = prunus.load(packed).hf_quantizer
    assert (quantizer.is_serializable(), quantizer.is_trainable, quantizer.is_compileable) == (True, False, True)


# --- what is in it ---


@pytest.mark.parametrize(
    ("family", "to", "head"),
    [
        ("llama", "sparse:bf16", "dense bf16"),
        ("llama", "sparse:int8", "dense int8"),
        ("qwen3", "sparse:bf16", None),
        ("qwen3", "sparse:int8", "dense int8"),
    ],
)
def test_the_head_is_packed_unless_it_is_the_embedding(tmp_path, family, to, head):
    folder = write_packed(save_sparse(family, tmp_path / "model"), tmp_path / "out", to)
    model = AutoModelForCausalLM.from_pretrained(folder)
    packed = open_checkpoint(folder).packed.get("lm_head.weight")
    assert (packed and f"{packed.layout} {packed.type}") == head
    assert model.config.tie_word_embeddings is (head is None)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (head is None)
    tied = family == "qwen3" and to == "sparse:int8"
    assert model.model.embed_tokens.weight.shape == (model.config.vocab_size, model.config.hidden_size)
    if tied:  # the copy stands for the embedding
        whole = open_checkpoint(folder)
        torch.testing.assert_close(
            whole.read("lm_head.weight"), whole.read("model.embed_tokens.weight").float(), rtol=0, atol=0.01
        )


def test_experts_stay_and_the_notes_say_so(tmp_path):
    source = save_sparse("mixtral", tmp_path / "model")
    target = parse_target("sparse:int8")
    note, *_ = target.format.check(open_model(source), target.kind)  # some processors have one of their own
    assert note.startswith("24 matrices of experts stay as they are")
    folder = write_packed(source, tmp_path / "out", "sparse:int8")
    names = open_checkpoint(folder).packed
    assert names
    assert not any("expert" in name for name in names)
    assert target.format.describe(folder)["coverage"]["packed"] < 0.5


def test_biases_go_along(tmp_path):
    for family, name in (("qwen2", "model.layers.0.self_attn.q_proj"), ("gpt2", "transformer.h.0.attn.c_attn")):
        folder = write_packed(save_sparse(family, tmp_path / family), tmp_path / f"{family}-out")
        before = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.bfloat16).get_submodule(name)
        after = AutoModelForCausalLM.from_pretrained(folder).get_submodule(name)
        assert before.bias.abs().max() > 0
        assert torch.equal(after.bias, before.bias)


# --- refused ---


def both_ways(folder, message):
    """By prunus, and by transformers."""
    for opened in (lambda: open_checkpoint(folder), lambda: prunus.load(folder), lambda: plain(folder)):
        with pytest.raises(UserError, match=message) as error:
            opened()
        assert "\n" not in str(error.value)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("version", [2, "1", None, True])
def test_another_version_is_refused(broken, version):
    broken.config(lambda config: config["quantization_config"].update(version=version))
    both_ways(broken.folder, rf"packed in version {version!r} of the format, and this prunus reads version 1; install")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layout": "zip"}, "has layout 'zip' and type 'bf16', where one of dense, bitmask, 2:4, tiles and one of"),
        ({"layout": ["dense"]}, "has layout"),
        ({"type": "fp4"}, "and type 'fp4'"),
        ({"rows": -64}, "has sizes that no matrix has"),
        ({"rows": 64.0}, "has sizes that no matrix has"),
        ({"columns": 0}, "has sizes that no matrix has"),
        ({"values": 10**30}, "has sizes that no matrix has"),
        ({"bias": 1}, "has sizes that no matrix has"),
        ({"more": 1}, r"q_proj is not described by bias, columns, layout"),
    ],
)
def test_a_damaged_entry_is_refused(broken, values, message):
    broken.entry(**values)
    both_ways(broken.folder, f"config.json of the packed model is damaged: .*{message}")


@pytest.mark.parametrize("matrices", [None, [], {}, {"model.layers.0.self_attn.q_proj": 7}])
def test_a_damaged_list_is_refused(broken, matrices):
    broken.config(lambda config: config["quantization_config"].update(matrices=matrices))
    both_ways(broken.folder, "config.json of the packed model is damaged: ")


@pytest.mark.parametrize("part", ["weight", "weight_mask", "weight_start"])
def test_a_missing_part_is_refused(broken, part):
    broken.tensors(lambda tensors: tensors.pop(f"{broken.name}.{part}", None))
    both_ways(broken.folder, rf"tensor {broken.name}\.{part} of the packed model is missing; restore it")


def test_a_mask_that_disagrees_with_the_values_is_refused(broken):
    def flip(tensors):
        if (mask := tensors.get(f"{broken.name}.weight_mask")) is not None:
            mask[0, 0] = ~mask[0, 0]

    broken.tensors(flip)
    with pytest.raises(
        UserError, match=f"{broken.name}: the packed matrix is damaged: where its strips start does not"
    ):
        plain(broken.folder)
    with pytest.raises(UserError, match="the packed matrix is damaged"):
        open_checkpoint(broken.folder).read(f"{broken.name}.weight")


@pytest.mark.parametrize("place", [-1, 4, 2**31 - 1])
def test_tiles_outside_the_matrix_are_refused(tmp_path, place):
    source = save_sparse("llama", tmp_path / "model", sparsity=0.0)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[16:48] = 0
    model.save_pretrained(source)
    broken = Broken(write_packed(source, tmp_path / "out"))
    assert open_checkpoint(broken.folder).packed[f"{broken.name}.weight"].layout == "tiles"

    def move(tensors):
        if (tile := tensors.get(f"{broken.name}.weight_tile")) is not None:
            tile[-1] = place

    broken.tensors(move)
    with pytest.raises(UserError, match=r"a tile lies outside its 64 columns"):
        plain(broken.folder)


def test_starts_that_overflow_are_refused():
    weight = torch.ones(64, 32)
    weight[:16, :16] = 0
    packed = pack(weight, "tiles", torch.bfloat16)
    packed.parts["weight_start"][1:] = torch.tensor([2**63 - 1, -2, 0, 7])
    with pytest.raises(UserError, match="its strips do not follow one another"):
        check_packed(packed)


def test_a_tensor_of_another_type_is_refused(broken):
    def widen(tensors):
        if (mask := tensors.get(f"{broken.name}.weight_mask")) is not None:
            tensors[f"{broken.name}.weight_mask"] = mask.long()

    broken.tensors(widen)
    with pytest.raises(UserError, match=r"weight_mask of the packed model is torch\.int64 .*asks for torch\.int32"):
        prunus.load(broken.folder)


def test_a_matrix_that_the_model_does_not_have_is_refused(broken):
    broken.config(
        lambda config: config["quantization_config"]["matrices"].update(
            {"model.layers.9.q": {"layout": "dense", "type": "bf16", "rows": 1, "columns": 1, "values": 32}}
        )
    )
    with pytest.raises(UserError, match=r"says that model\.layers\.9\.q is a matrix .*has no such matrix"):
        plain(broken.folder)


def test_sizes_that_are_not_the_model_s_are_refused(broken):
    broken.entry(rows=63)
    with pytest.raises(UserError, match=r"is a matrix \(63, 64\), and LlamaForCausalLM has \(64, 64\)"):
        plain(broken.folder)
    with pytest.raises(UserError, match=r"config.json asks for \(64, 64\)"):
        prunus.load(broken.folder)


def test_a_tied_head_cannot_be_packed(broken):
    broken.config(lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(UserError, match=r"lm_head is a matrix .*is tied to another"):
        plain(broken.folder)


def test_other_classes_are_refused(packed):
    with pytest.raises(UserError, match="open it with AutoModelForCausalLM"):
        AutoModel.from_pretrained(packed)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_the_cpu_may_be_named(packed, device_map):
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, device_map=device_map)(TOKENS).logits
        assert torch.equal(found, prunus.load(packed, dtype="float32")(TOKENS).logits)


def test_another_device_is_refused(packed):
    with pytest.raises(UserError, match="is packed for the CPU, and meta was asked for; give --device cpu"):
        load_whole(open_checkpoint(packed), None, "meta")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, r"run in bfloat16 or float32, and torch\.float16 was asked for"),
        ({"device_map": "cuda:0"}, "run on the CPU, and device_map names cuda:0"),
        ({"device_map": {"": "cuda"}}, "run on the CPU, and device_map names cuda"),
    ],
)
def test_what_it_cannot_run_in_is_refused(packed, options, message):
    with pytest.raises(UserError, match=message):
        AutoModelForCausalLM.from_pretrained(packed, **options)


@pytest.mark.parametrize(
    "command",
    [
        ("sparsify", "--calibration", "builtin"),
        ("quantize", "--scheme", "int8"),
        ("shrink", "--ffn", "32", "--calibration", "builtin"),
        ("recover", "--teacher", "MODEL", "--data", "builtin"),
        ("export", "--to", "gguf"),
        ("export", "--to", "sparse"),
    ],
    ids=" ".join,
)
def test_steps_refuse_a_packed_model(packed, dense, tmp_path, refused, command):
    verb, *options = [str(dense) if word == "MODEL" else word for word in command]
    sentence = refused(verb, packed, tmp_path / "out", *options)
    assert sentence.endswith(
        f"{packed} is packed already, for the engine sparse-cpu: take the run that it was exported from."
    )


def test_a_damaged_packed_model_ends_a_command_in_one_sentence(broken, refused):
    broken.config(lambda config: config["quantization_config"].update(version=2))
    assert "this prunus reads version 1" in refused("evaluate", broken.folder, "--text", "builtin", out=None)
    assert "this prunus reads version 1" in refused("bench", broken.folder, out=None)


def test_an_unknown_type_is_refused(dense, tmp_path, refused):
    sentence = refused("export", dense, tmp_path / "out", "--to", "sparse:fp4")
    assert sentence == "error: sparse type 'fp4' is not one that prunus writes; allowed are bf16, int8."
