"""The verb `sparsify` of the command line."""

from typing import Annotated, Any

import typer

from prunus.cli import options as opt


def sparsify(
    model: opt.Model,
    out: opt.Out,
    method: Annotated[str, typer.Option(help="See `prunus methods`.")] = "admm",
    pattern: opt.Pattern = "0.5",
    override: Annotated[list[str] | None, typer.Option(help="GLOB=PATTERN or GLOB=dense; repeatable.")] = None,
    protect: Annotated[list[str] | None, typer.Option(help="GLOB of matrices left dense; repeatable.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE setting of the method; repeatable.")] = None,
    head: Annotated[bool, typer.Option("--head", help="Prune the output head too (not when tied).")] = False,
    polish: Annotated[bool, typer.Option(help="ADMM: refit the kept weights by conjugate gradients.")] = True,
    allocation: opt.Allocation = "uniform",
    calibration: opt.Calibration = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    length: opt.Length = None,
    propagate: opt.Propagate = "sparse",
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    max_memory: opt.Memory = None,
    dry_run: opt.DryRun = False,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Write a copy of MODEL with zeros in it. Interrupted, the same command goes on where it stopped.

    Example: `prunus sparsify org/model out --method admm --pattern 2:4 --calibration wiki.txt=2 --calibration self`
    """
    from prunus.steps.dry_run import dry_run as rehearse
    from prunus.steps.sparsify import sparsify as step
    from prunus.terminal.tables import show_estimate, show_sparsified

    settings: dict[str, Any] = {
        "method": method,
        "pattern": pattern,
        "overrides": opt.pairs(override, "--override"),
        "protect": tuple(protect or ()),
        "options": opt.method_options(method, opt.pairs(option, "--option"), polish),
        "head": head,
        "allocation": allocation,
        "calibration": tuple(calibration or ("self",)),
        "samples": samples,
        **opt.given(length=length),
        "propagate": propagate,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "max_memory": max_memory,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        expected, remarks = rehearse(model, out, **settings)
        show_estimate(expected, remarks)
        opt.emit({**expected.summary(), "remarks": remarks})
    else:
        run = step(model, out, **settings)
        show_sparsified(run)
        opt.emit(run.summary())
