"""The verb `quantize` of the command line."""

from typing import Annotated, Any

import typer

from prunus.cli import options as opt


def quantize(
    model: opt.Model,
    out: opt.Out,
    scheme: Annotated[str, typer.Option(help="int8, w8a8, int4-g128, int4-g32 or fp8; see `prunus methods`.")],
    method: Annotated[str, typer.Option(help="rtn (weights alone) or gptq (with calibration text).")] = "rtn",
    joint: Annotated[bool, typer.Option("--joint", help="Choose zeros in the same sweep, by --pattern.")] = False,
    pattern: Annotated[str | None, typer.Option(help="Of those zeros: 0.5 | 2:4 | any N:M | tiles.")] = None,
    calibration: opt.Calibration = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    length: opt.Length = None,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    max_memory: opt.Memory = None,
    dry_run: opt.DryRun = False,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Write MODEL with quantized matrices, as compressed-tensors, which transformers loads. Zeros stay zeros.

    Prune first, recover, then quantize. Interrupted, the same command goes on where it stopped.

    Example: `prunus quantize out-pruned out-int4 --scheme int4-g32 --method gptq --calibration wiki.txt`
    """
    from prunus.steps.quantize import quantize as step
    from prunus.steps.quantize_dry_run import dry_run as rehearse
    from prunus.terminal.quantized import show_estimate, show_quantized

    settings: dict[str, Any] = {
        "scheme": scheme,
        "method": method,
        "joint": joint,
        "pattern": pattern,
        "calibration": tuple(calibration or ()),
        "samples": samples,
        **opt.given(length=length),
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "max_memory": max_memory,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        expected = rehearse(model, out, **settings)
        show_estimate(expected)
        opt.emit(expected)
    else:
        run = step(model, out, **settings)
        show_quantized(run)
        opt.emit(run.summary())
