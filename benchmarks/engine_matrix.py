"""Which results of prunus load in which engine, whether they compute the same there, and how much faster they are.

Families: tiny random models of Llama, Qwen 2, Qwen 3, Mistral, Gemma 3 and Qwen 3 MoE, with widths that engines take
(hidden 128, FFN 256, 4 heads of 32 on 2, 4 layers; Gemma 3 has 6, the last of them with full attention), and the
tokenizer of the demo's model, Qwen 2 its own; and SmolLM2 itself. Each as it is, and as these variants:

    shrunk     FFN and KV groups halved, by magnitude; of experts their FFN. SmolLM2: FFN 1536 to 1024, by activation
    depth      2 layers; SmolLM2: 24 of 30
    experts    half of the experts
    zeros      2:4 by magnitude
    8 bits, 4 bits   the engine's own type of so many bits, or the scheme of `prunus quantize` that it takes

Engines are those of `prunus engines` that are installed; what fits them comes from the tables of formats. Tiny models
are exported in the widest type of the format, SmolLM2 in its default. "agrees" is the verdict of the proof that each
export ends with (KL to transformers under the type's bound, NLL, tokens). In transformers, a process without prunus
opens the directory, and its logits of 64 tokens are compared with those of the block-by-block run. SmolLM2 is timed
too, with `prunus bench`, in turn with the dense model in the same engine (128 prompt, 32 new tokens, 7 pairs, one
thread); the tiny ones are too small to time.

One line of JSON per row goes to RESULTS; a row that is there is skipped, so that the same command goes on.
docs/measured/engine_matrix.jsonl is such a file, and `make docs` makes the tables in docs/engines.md from it. In few
bits transformers needs the extra: pip install 'prunus[quantize]'.

usage: engine_matrix.py RESULTS.jsonl WORK [--model DIR] [--engines llama.cpp,vllm] [--families llama,smollm2]
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from lines import add, rows_in
from peers import demo_model
from qwen_tokenizer import qwen2_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.benchmark.machine import machine
from prunus.calibration import StreamedSource
from prunus.engines import ENGINES, Engine, find
from prunus.engines.transformers import TRANSFORMERS
from prunus.errors import EngineError, UserError
from prunus.evaluation.divergence import token_kl
from prunus.exporting import FORMATS, FileType, Format
from prunus.models.streamed import open_model
from prunus.quantizing import SCHEMES

SMOLLM2 = "smollm2"
SIZES = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
GEMMA = {"sliding_window": 64, "query_pre_attn_scalar": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"], **GEMMA},
    "qwen3_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1, **EXPERTS},
}
TEXT: dict[str, Any] = {"calibration": ("builtin",), "samples": 4, "length": 64, "dtype": "float32"}
MORE_TEXT: dict[str, Any] = {"calibration": ("builtin",), "samples": 16, "length": 256, "dtype": "float32"}
BITS = {"8 bits": (8.0, 9.0), "4 bits": (4.0, 5.0)}
BENCH: dict[str, Any] = {"prompt_tokens": 128, "new_tokens": 32, "repetitions": 7, "threads": 1}
KL_ALLOWED = 1e-4  # in transformers, where both sides compute in float32
POSITIONS = 64
PATIENCE = 1800.0  # seconds for each thing asked of an engine: the machine may be busy

# Opens the directory as anyone would: prunus is not there.
PLAIN = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.from_numpy(numpy.load(sys.argv[2]))[None]).logits[0]
assert not any(name.partition(".")[0] == "prunus" for name in sys.modules)
numpy.save(sys.argv[3], logits.float().numpy())
"""

Make = Callable[[Path, Path], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `demo` is SmolLM2, whose tokenizer the tiny models borrow; everything is made below `work`."""

    family: str
    variant: str
    engine: Engine
    work: Path
    demo: Path

    @property
    def folder(self) -> Path:
        return self.work / self.family

    @property
    def form(self) -> Format:
        return next(form for form in FORMATS.values() if form.engine is self.engine)

    @property
    def kinds(self) -> list[FileType]:
        """The types of so many bits. UserError where the format has none."""
        least, most = BITS[self.variant]
        found = [kind for kind in self.form.types.values() if least <= kind.bits <= most]
        if not found:
            raise UserError(f"{self.form.name} has no type of {self.variant}")
        return found

    @property
    def scheme(self) -> str | None:
        """The scheme of `prunus quantize` that the engine reads; None where nothing or its own format quantizes."""
        if self.variant not in BITS:
            return None
        if self.engine is TRANSFORMERS:
            return {"8 bits": "int8", "4 bits": "int4-g32"}[self.variant]
        kept = [kind.name for kind in self.kinds if kind.keeps]
        return min(kept, key=lambda name: SCHEMES[name].group or 0, default=None)

    @property
    def to(self) -> str:
        """The type to export in: so many bits, else the widest, and for SmolLM2, which is timed, the default."""
        if self.variant in BITS:
            return f"{self.form.name}:{self.scheme or self.kinds[0].name}"
        widest = max(self.form.types.values(), key=lambda kind: kind.bits).name
        return f"{self.form.name}:{self.form.default if self.family == SMOLLM2 else widest}"


def variants(family: str) -> dict[str, Make]:
    """What is made of the dense model, by steps of prunus; quantized ones are made for each engine."""
    smol, experts = family == SMOLLM2, family == "qwen3_moe"
    folds = family not in ("gemma3_text", "qwen3_moe")  # norms stand behind the matrices; a layer ends in experts
    half: dict[str, Any] = {"expert_ffn": 0.5} if experts else {"ffn": 0.5}
    widths: dict[str, Any] = {**half, "kv_groups": 0.5, "score": "magnitude", "refit": False}
    narrow: dict[str, Any] = {"ffn": 1024, "score": "activation", **MORE_TEXT} if smol else widths
    depth: dict[str, Any] = {"layers": 24, **MORE_TEXT} if smol else {"layers": 2, "fold": folds, **TEXT}
    found: dict[str, Make] = {
        "shrunk": lambda model, out: prunus.shrink(model, out, **narrow),
        "depth": lambda model, out: prunus.shrink(model, out, **depth),
        "zeros": lambda model, out: prunus.sparsify(model, out, method="magnitude", pattern="2:4"),
    }
    return {**found, "experts": lambda model, out: prunus.shrink(model, out, experts=2, **TEXT)} if experts else found


def dense_model(case: Case) -> Path:
    """SmolLM2, or a tiny random model: norms and biases are random too, so that nothing hides behind ones and zeros."""
    if case.family == SMOLLM2:
        return case.demo
    folder, unfinished = case.folder / "dense", case.folder / "unfinished"
    if not folder.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[case.family](**{**SIZES, **FAMILIES[case.family]}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(5)
        model.float().save_pretrained(unfinished)
        tokenizer = qwen2_tokenizer() if case.family == "qwen2" else AutoTokenizer.from_pretrained(case.demo)
        tokenizer.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(unfinished).save_pretrained(unfinished)  # some families cut text their own way
        unfinished.rename(folder)
    return folder


def row(case: Case) -> dict[str, Any]:
    """What the engine makes of one variant, or the sentence that refuses it or says how it failed."""
    try:
        dense = dense_model(case)
        model = made(case, dense)
        out, told = in_transformers(case, model) if case.engine is TRANSFORMERS else in_engine(case, model)
        return told | (timed(out, dense) if case.family == SMOLLM2 and case.variant != "dense" else {})
    except UserError as error:
        return {"loads": False, "agrees": False, "refused": said(error, case)}
    except EngineError as error:
        if "had not finished" in str(error):
            raise  # that is a busy machine, and no result
        return {"loads": "the proof failed" in str(error), "agrees": False, "failed": said(error, case)}


def said(error: Exception, case: Case) -> str:
    """The sentence and the engine's last line, without the paths of this machine."""
    first, *others = str(error).replace(f"{case.work}/", "").replace(str(case.demo), SMOLLM2).splitlines()
    return " ".join([first, *(line.strip() for line in others[-1:])])


def made(case: Case, dense: Path) -> Path:
    """The directory of a variant; one that is there is used again. Of few bits, what the engine is to read."""
    case.folder.mkdir(parents=True, exist_ok=True)
    if case.scheme is not None:
        return prunus.quantize(dense, case.folder / case.scheme, scheme=case.scheme).path
    if case.variant == "dense" or case.variant in BITS:
        return dense
    out: Path = variants(case.family)[case.variant](dense, case.folder / case.variant).path
    return out


def in_engine(case: Case, model: Path) -> tuple[Path, dict[str, Any]]:
    """Exported, and proved by the engine; where it is, and what the proof says."""
    out = case.folder / f"{case.variant} {case.to}".replace(" ", "-").replace(":", "-")
    step = prunus.export(model, out, to=case.to, timeout=PATIENCE).last_step
    proof = {name: step["proof"][name] for name in ("kl", "kl_allowed", "perplexity", "greedy")}
    versions = dict(list(step["engine"]["versions"].items())[-2:])
    return out, {"loads": True, "agrees": True, "to": case.to, **proof, "engine_versions": versions}


def in_transformers(case: Case, model: Path) -> tuple[Path, dict[str, Any]]:
    """Opened by plain transformers, in a process without prunus."""
    tokens_1T = torch.arange(POSITIONS).mul(37).remainder(4096)[None]
    source = StreamedSource(open_model(model), max_memory=None)
    own_TV = source.logits(tokens_1T, source.final_hidden(tokens_1T, "Block by block"))[0]
    files = [case.work / name for name in ("tokens.npy", "logits.npy")]
    np.save(files[0], tokens_1T[0].numpy())
    done = subprocess.run([sys.executable, "-c", PLAIN, model, *files], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"transformers failed: {done.stderr.strip().splitlines()[-1]}")
    kl = token_kl(own_TV, torch.from_numpy(np.load(files[1]))).double().mean().item()
    found = {"loads": True, "agrees": kl <= KL_ALLOWED, "to": "as it is", "kl": kl, "kl_allowed": KL_ALLOWED}
    return model, {**found, "engine_versions": {"transformers": transformers.__version__}}


def timed(model: Path, dense: Path) -> dict[str, Any]:
    """Beside the dense model in the same engine."""
    told = prunus.bench(model, against=str(dense), **BENCH)
    speed = {role: round(told[role]["decode_tokens_per_second"], 2) for role in ("dense", "model")}
    named = ("median", "low", "high", "claim")
    ratios = {phase: {key: one[key] for key in named} for phase, one in told["speedup"].items()}
    return {"speedup": ratios, "decode_tokens_per_second": speed, "bench": {**BENCH, "dtype": told["dtype"]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, help="SmolLM2. Default: the demo's model")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--families", default=",".join([*FAMILIES, SMOLLM2]))
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    demo = (args.model or Path(demo_model())).resolve()
    engines = [engine for name, engine in ENGINES.items() if name in args.engines.split(",") and find(engine)]
    for family in args.families.split(","):
        for variant in ["dense", *variants(family), *BITS]:
            for engine in engines:
                key = {"family": family, "variant": variant, "engine": engine.name}
                if any(key.items() <= known.items() for known in rows_in(args.results)):
                    continue
                found = {**key, **row(Case(family, variant, engine, args.work, demo))}
                add(args.results, {**found, "environment": machine()}, show=True)


if __name__ == "__main__":
    main()
