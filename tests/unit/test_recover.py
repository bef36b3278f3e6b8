"""`prunus recover`: what it leaves, going on after a kill, stopping early, and the record that it writes."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from safetensors.torch import save_file

import prunus
from families import TINY
from prunus.checkpoint import read_record
from prunus.errors import UserError
from prunus.recovery import block_wise, progress_files, trainer
from prunus.recovery.data import order
from prunus.recovery.trainer import held_out_goal
from recovery_case import SETTINGS, Case, make_case, weights

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["prunus.steps.recover"])
BLOCKS = {"method": "block-wise", "loss": ("hidden",)}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(TINY["llama"], tmp_path_factory.mktemp("llama"))


def curve(run: prunus.Run) -> list[float]:
    return [row["loss"] for row in run.last_step["curve"]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": ("ce",)},
        {"loss": ("logits", "hidden=0.1")},
        {"top_k": 16},
        {"method": "lora", "lr": 3e-3},
        {"gradient_checkpointing": True},
        {"micro_batch": 2},
        {"dtype": "bfloat16"},
        BLOCKS,
    ],
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()) or "defaults",
)
def test_held_out_loss_falls_and_no_zero_comes_back(case, tmp_path, settings):
    run = case.recover(tmp_path / "out", **settings)
    step = run.last_step
    goal = "nll" if settings.get("loss") == ("ce",) else "kl"
    assert step["held_out_after"][goal] < step["held_out_before"][goal]
    old, new = weights(case.sparse), weights(run.path)
    assert {name: (t.shape, t.dtype) for name, t in new.items()} == {n: (t.shape, t.dtype) for n, t in old.items()}
    pruned = {f"{row['name']}.weight" for row in read_record(case.sparse)["history"][0]["matrices"]}
    assert len(step["zeros"]) == len(pruned) == 21
    for name in pruned:
        assert (new[name][old[name] == 0] == 0).all()
    assert any(not torch.equal(new[name], old[name]) for name in pruned)
    assert all(row["after"] >= row["before"] > 0 for row in step["zeros"])


def test_what_costs_no_more_than_time_changes_nothing(case, tmp_path):
    """Sequences at once and recomputation are for memory; the curve is that of the plain run."""
    plain = curve(case.recover(tmp_path / "plain"))
    assert curve(case.recover(tmp_path / "recomputed", gradient_checkpointing=True)) == pytest.approx(plain, abs=1e-5)
    assert curve(case.recover(tmp_path / "together", micro_batch=4)) == pytest.approx(plain, abs=1e-5)


def test_the_record_tells_everything(case, tmp_path):
    run = case.recover(tmp_path / "out")
    assert [step["step"] for step in run.record["history"]] == ["sparsify", "recover"]
    step = run.last_step
    assert step["teacher"]["path"] == str(case.dense.resolve())
    assert step["tokens"] == SETTINGS["tokens"]
    assert [one["step"] for one in step["evaluations"]] == [0, 5, 10, 15, 20]
    assert step["data"][0]["windows"] + step["data"][0]["held_out"] <= 4000 // 32
    assert step["sparsity"]["pruned_matrices"] == pytest.approx(0.5)
    assert set(step["seconds_by_part"]) == {"teacher", "forward", "loss", "backward", "optimizer", "held-out"}
    for name in ("environment", "seconds", "tokens_per_second", "peak_memory_bytes", "dtype", "device", "lr", "curve"):
        assert step[name]
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert run.summary()["held_out_after"] == step["held_out_after"]
    assert not list(run.path.glob("training-*"))


def test_done_is_done_and_other_settings_are_refused(case, tmp_path):
    case.recover(tmp_path / "out")
    assert case.recover(tmp_path / "out").reused
    with pytest.raises(UserError, match="not the result of these settings"):
        case.recover(tmp_path / "out", seed=1)


# --- killed; each of these is the target of a process of its own ---


def recover_once(case: Case, out, settings):
    torch.set_num_threads(1)
    case.recover(out, **settings)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_within_step_13(case, out, settings):
    real = trainer.Trainer._step
    trainer.Trainer._step = lambda self, step: die() if step == 12 else real(self, step)
    recover_once(case, out, settings)


def killed_between_weights_and_progress(case, out, settings):
    real = progress_files.ProgressFiles._moments
    progress_files.ProgressFiles._moments = lambda self, step: die() if step == 10 else real(self, step)
    recover_once(case, out, settings)


def killed_in_the_second_block(case, out, settings):
    real = block_wise.BlockWise._backward
    block_wise.BlockWise._backward = lambda self, index, *rest: die() if index == 1 else real(self, index, *rest)
    recover_once(case, out, settings)


@pytest.mark.parametrize(
    ("killed", "settings"),
    [
        (killed_within_step_13, {}),
        (killed_within_step_13, {"method": "lora"}),
        (killed_between_weights_and_progress, {"top_k": 8}),
        (killed_in_the_second_block, BLOCKS),
    ],
)
def test_killed_it_goes_on_and_ends_the_same(case, tmp_path, killed, settings):
    for target, out in ((recover_once, "whole"), (killed, "killed")):
        process = SERVER.Process(target=target, args=(case, tmp_path / out, settings))
        process.start()
        process.join()
        assert process.exitcode == (0 if target is recover_once else -signal.SIGKILL)
    assert not (tmp_path / "killed").exists()
    torch.set_num_threads(1)
    killed_run, whole = case.recover(tmp_path / "killed", **settings), prunus.Run.open(tmp_path / "whole")
    for name in ("curve", "evaluations", "blocks"):
        assert killed_run.last_step.get(name) == whole.last_step.get(name)
    old, new = weights(whole.path), weights(killed_run.path)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert {file.name for file in killed_run.path.iterdir()} == {file.name for file in whole.path.iterdir()}
    if "loss" not in settings:
        rows = [json.loads(line) for line in (killed_run.path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))


@pytest.mark.parametrize(
    ("losses", "goal"),
    [
        ({"logits": 1.0}, 0.5),
        ({"ce": 2.0}, 6.0),
        ({"logits": 1.0, "ce": 0.5, "hidden": 9.0}, 2.0),
        ({"hidden": 1.0}, 0.5),
    ],
)
def test_the_best_evaluation_is_the_best_by_what_is_trained(losses, goal):
    assert held_out_goal({"nll": 3.0, "kl": 0.5}, losses) == goal


def test_the_result_is_the_best_step_and_no_gain_stops_early(case, tmp_path):
    run = case.recover(tmp_path / "out", lr=3.0, patience=2, clip=1e9, evaluate_every=2)
    step = run.last_step
    assert step["best_step"] == 0
    assert step["steps"] == 4
    assert "2 evaluations" in step["stopped"]
    assert step["held_out_after"] == step["held_out_before"]
    old, new = weights(case.sparse), weights(run.path)
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(case, tmp_path, monkeypatch):
    real = trainer.Trainer._micro_batch

    def broken(self, windows, last):
        return {**real(self, windows, last), **({"loss": float("nan")} if self.progress.step == 11 else {})}

    monkeypatch.setattr(trainer.Trainer, "_micro_batch", broken)
    with pytest.raises(UserError, match=r"loss became nan at step 12 .* The state of step 10 is kept in .*lower --lr"):
        case.recover(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "training-weights-00000010.safetensors").exists()


# --- masks ---


def without_record(case, tmp_path):
    directory = tmp_path / "foreign"
    directory.mkdir()
    for file in case.sparse.iterdir():
        if file.name != "prunus.json":
            (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_zeros_of_a_model_without_a_record_are_kept_and_it_is_said(case, tmp_path, capsys):
    run = prunus.recover(
        without_record(case, tmp_path), tmp_path / "out", teacher=str(case.dense), data=(str(case.text),), **SETTINGS
    )
    assert "21 matrices, model.layers.0.self_attn.q_proj the first of them" in " ".join(capsys.readouterr().err.split())
    assert len(run.last_step["zeros"]) == 21


def test_keep_zeros_none_trains_them(case, tmp_path):
    run = case.recover(tmp_path / "out", keep_zeros="none")
    name = "model.layers.0.mlp.down_proj.weight"
    assert run.last_step["zeros"] == []
    assert (weights(run.path)[name] == 0).sum() < (weights(case.sparse)[name] == 0).sum()


def test_a_file_of_masks_decides(case, tmp_path):
    name = "model.layers.0.mlp.down_proj"
    keep_OI = weights(case.sparse)[f"{name}.weight"] != 0
    save_file({name: keep_OI}, tmp_path / "masks.safetensors")
    run = case.recover(tmp_path / "out", keep_zeros=str(tmp_path / "masks.safetensors"))
    assert [row["name"] for row in run.last_step["zeros"]] == [name]
    assert (weights(run.path)[f"{name}.weight"][~keep_OI] == 0).all()


def test_fewer_zeros_than_the_record_says_are_refused(case, tmp_path):
    directory = without_record(case, tmp_path)
    record = json.loads((case.sparse / "prunus.json").read_text())
    record["history"][0]["matrices"][0]["sparsity"] = 0.9
    (directory / "prunus.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"90\.0% of model\.layers\.0\.self_attn\.q_proj .* the weights have 50\.0%"):
        prunus.recover(directory, tmp_path / "out", data=(str(case.text),), **SETTINGS)


# --- the text, and the teacher on disk ---


def test_every_pass_takes_every_window_once_in_another_order():
    passes = [order(10, start, 10, seed=3) for start in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1]
    assert order(10, 7, 15, seed=3) == [*passes[0][7:], *passes[1], *passes[2][:2]]


def test_the_teacher_runs_once(case, tmp_path, monkeypatch):
    case.recover(tmp_path / "first", top_k=4)
    monkeypatch.setattr("prunus.steps.recover_whole.TeacherInMemory", None)
    monkeypatch.setattr("prunus.recovery.teacher._fill", None)
    case.recover(tmp_path / "second", top_k=4, lr=5e-4)


def test_the_teachers_own_samples_and_a_weighted_mix(case, tmp_path):
    run = case.recover(tmp_path / "out", data=(f"{case.text}=3", "self"))
    assert [row["windows"] for row in run.last_step["data"]] == [60, 20]
    assert [row["held_out"] for row in run.last_step["data"]] == [3, 1]


def test_chat_messages_are_written_by_the_template(tmp_path, tiny_llama_dir, capsys):
    import shutil

    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    lines = [{"messages": [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"{2 * n}"}]}
             for n in range(400)]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = prunus.recover(model, tmp_path / "out", data=(str(tmp_path / "chat.jsonl"),), **{**SETTINGS, "loss": ("ce",)})
    assert run.last_step["held_out_after"]["nll"] < run.last_step["held_out_before"]["nll"]


def test_a_recipe_with_recovery(case, tmp_path):
    values = {**SETTINGS, "teacher": "dense", "data": [str(case.text)], "loss": "logits, ce=0.2"}
    recipe = {
        "version": 1,
        "model": str(case.dense),
        "steps": [{"sparsify": {"method": "magnitude"}}, {"recover": values}, "report"],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = prunus.run(tmp_path / "recipe.yaml", tmp_path / "out")
    assert [step["step"] for step in run.steps] == ["sparsify", "recover", "report"]
    assert run.last_step["settings"]["loss"] == ["logits", "ce=0.2"]
    assert run.last_step["held_out_after"]["kl"] < run.last_step["held_out_before"]["kl"]
    assert "Held-out loss" in (tmp_path / "out" / "report.html").read_text()
