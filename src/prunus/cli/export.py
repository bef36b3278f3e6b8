"""The verb `export` of the command line."""

from typing import Annotated

import typer

from prunus.cli import options as opt

To = Annotated[
    str,
    typer.Option(
        help="gguf:TYPE (f16, q8_0, q4_k_m, ...), vllm:TYPE (bf16, f16, f32), onnx:TYPE (f32, int8, int4), "
        "openvino:TYPE (f32, f16, int8, int4) or sparse:TYPE (bf16, int8)."
    ),
]
Timeout = Annotated[float | None, typer.Option(help="Seconds for each thing asked of the engine. Default: by size.")]


def export(
    model: opt.Model,
    out: opt.Out,
    to: To = "gguf",
    timeout: Timeout = None,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Write MODEL as an engine loads it, proved by that engine: it has loaded it and computes the same.

    Example: `prunus export out-shrunk out-gguf --to gguf:q4_k_m`
    """
    from prunus.steps.export import export as step
    from prunus.terminal.engines import show_exported

    run = step(model, out, to=to, timeout=timeout, trust_remote_code=trust_remote_code)
    show_exported(run)
    opt.emit(run.summary())
