"""Two processes on one CPU (gloo): sharded by FSDP2 or with copies, the losses are those of a single process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from families import TINY
from prunus.result import Run
from recovery_case import SETTINGS, make_case

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "sharded, FSDP2": [
        *(BIN / "accelerate", "launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "0", "--use_fsdp", "--fsdp_version", "2"),
    ],
    "copies, DDP": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def launched(
    launcher: str, case, out: Path, cache: Path, *options: str, fails: bool = False
) -> subprocess.CompletedProcess:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [*LAUNCHERS[launcher], BIN / "prunus", "recover", case.sparse, out, "--data", case.text, *given, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PRUNUS_CACHE": str(cache)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, done.stderr
    return done


@pytest.mark.parametrize(
    ("launcher", "method"),
    [
        ("sharded, FSDP2", "full"),
        pytest.param("sharded, FSDP2", "lora", marks=pytest.mark.slow),
        pytest.param("copies, DDP", "full", marks=pytest.mark.slow),
        pytest.param("copies, DDP", "lora", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_losses_of_one(launcher, method, tmp_path):
    case = make_case(TINY["llama"], tmp_path)
    done = launched(launcher, case, tmp_path / "two", tmp_path / "cache", "--method", method, "--held-out=5")
    assert done.stdout.count('"step": "recover"') == 1  # one process speaks for all
    two = Run.open(tmp_path / "two").last_step
    one = case.recover(tmp_path / "one", method=method, held_out=5).last_step
    assert two["processes"] == {"count": 2, "kind": launcher}
    for row, expected in zip(two["curve"], one["curve"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)
    assert two["held_out_after"]["kl"] == pytest.approx(one["held_out_after"]["kl"], rel=1e-4)
    assert two["zeros"] == one["zeros"]


@pytest.mark.slow
def test_a_batch_that_two_cannot_share_is_refused_by_both(tmp_path):
    case = make_case(TINY["llama"], tmp_path)
    done = launched("copies, DDP", case, tmp_path / "out", tmp_path / "cache", "--batch-tokens=96", fails=True)
    assert "3 sequences of 32 tokens, which 2 process(es) with 1 at once cannot share evenly" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
