"""The loss curves of a recovery on the page, and how a recovered run is called there."""

from prunus.reporting.record import Run
from prunus.reporting.recovery_figures import recovery_figures
from report_page import page, words
from report_record import HOSTILE, record


def recovered(**facts):
    step = {
        "step": "recover",
        "settings": {"method": "full", "loss": ["logits", f"hidden{HOSTILE}"]},
        "tokens": 4000,
        "steps": 4,
        "best_step": 4,
        "seconds": 10.0,
        "data": [{"held_out": 16}],
        "curve": [{"step": n, "tokens": 1000 * n, "loss": 1 / n, "logits": 0.5 / n, "hidden": 0.5 / n} for n in (1, 4)],
        "evaluations": [{"step": 0, "nll": 3.0, "kl": 0.5}, {"step": 4, "nll": 2.5, "kl": 0.2}],
        "zeros": [{"name": "a", "before": 1, "after": 1}],
        **facts,
    }
    made = record()
    return {**made, "history": [*made["history"], step]}


def test_training_and_held_out_losses_are_drawn_over_tokens():
    training, held_out = recovery_figures(Run("run", recovered()))
    assert [(line["name"], line["x"], line["y"]) for line in held_out.data] == [
        ("KL to the teacher", [0, 4000], [0.5, 0.2]),
        ("negative log-likelihood", [0, 4000], [3.0, 2.5]),
    ]
    assert [line["name"] for line in training.data] == ["loss", "logits", "hidden"]
    assert training.data[0]["x"] == [1000, 4000]
    assert "<script>" not in training.caption
    assert "16 windows" in held_out.caption


def test_blocks_are_drawn_beside_each_other():
    blocks = [{"block": n, "before": 0.2, "after": 0.1, "kept": True} for n in range(3)]
    (figure,) = recovery_figures(Run("run", recovered(blocks=blocks, curve=[], evaluations=[])))
    assert [bar["y"] for bar in figure.data] == [[0.2] * 3, [0.1] * 3]


def test_a_run_that_never_trained_has_none():
    assert recovery_figures(Run("run", record())) == []


def test_a_recovered_run_is_called_so_and_keeps_its_sparsity(tmp_path):
    run = Run("run", recovered())
    assert run.method == "admm + recovery"
    assert run.setting("pattern") == "0.5"
    assert run.sparsity == 0.5
    text = words(page(tmp_path, recovered()))
    assert "Recovery" in text
    assert "method admm + recovery" in text
