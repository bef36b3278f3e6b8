"""The verb `shrink` of the command line."""

from typing import Annotated, Any

import typer

from prunus.cli import options as opt
from prunus.errors import UserError

Size = Annotated[str | None, typer.Option(help="What stays: a ratio (0.75) or a size (1152).")]
Sublayer = Annotated[
    str | None,
    typer.Option(
        help="How many layers keep theirs: a ratio or a number; it goes alone from the others. Such a result opens in "
        "prunus.load and prunus alone, not in transformers or engines."
    ),
]
Budget = Annotated[float | None, typer.Option(help="In place of sizes: the ratio that stays; prunus finds the mix.")]
Score = Annotated[str, typer.Option(help="Of channels and KV groups; see `prunus methods`.")]
ExpertScore = Annotated[str, typer.Option(help="Of experts: reap, frequency or output-norm.")]
LayerScore = Annotated[
    str, typer.Option(help="Of layers: angular, block-influence, greedy-kl, greedy-kl-folded, taylor+.")
]
Fold = Annotated[bool, typer.Option(help="Fold layers that go into the one before them, by least squares.")]
Refit = Annotated[bool, typer.Option(help="Least squares for what stays, so that it makes up for what goes.")]
PerLayer = Annotated[
    str,
    typer.Option(
        help="Widths of ffn and kv-groups: uniform, global or sensitivity. The last two let layers differ where that "
        "loses less; such a result opens in prunus.load and prunus alone, not in transformers or engines."
    ),
]
Multiple = Annotated[int | None, typer.Option(help="Widths become a multiple of this. Default: 256, 128, 64 or 32.")]


def shrink(
    model: opt.Model,
    out: opt.Out,
    layers: Size = None,
    ffn: Size = None,
    kv_groups: Size = None,
    query_heads: Size = None,
    hidden: Size = None,
    experts: Size = None,
    expert_ffn: Size = None,
    shared_ffn: Size = None,
    attention: Sublayer = None,
    mlp: Sublayer = None,
    parameters: Budget = None,
    decode_bytes: Budget = None,
    score: Score = "second-order",
    expert_score: ExpertScore = "reap",
    layer_score: LayerScore = "angular",
    refit: Refit = True,
    fold: Fold = True,
    protect_first: Annotated[int, typer.Option(help="So many first layers stay.")] = 1,
    protect_last: Annotated[int, typer.Option(help="So many last layers stay.")] = 1,
    judged: Annotated[int, typer.Option(help="Sequences that judge layers, for greedy-kl and taylor+.")] = 8,
    multiple_of: Multiple = None,
    per_layer: PerLayer = "uniform",
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
    """Write a smaller copy of MODEL: fewer layers, channels, heads, dimensions or experts, an ordinary checkpoint.

    Layers that differ (--per-layer, --attention, --mlp) are a tier of their own, which transformers does not open.

    `prunus profile MODEL` lists the axes of a model. Interrupted, the same command goes on where it stopped.

    Example: `prunus shrink org/model out --ffn 0.75 --kv-groups 2 --calibration wiki.txt`
    """
    from prunus.steps.shrink import shrink as step
    from prunus.steps.shrink_estimate import estimate_shrink
    from prunus.terminal.shapes import show_shrink_estimate, show_shrunk

    sizes = {
        "layers": layers,
        "ffn": ffn,
        "kv_groups": kv_groups,
        "query_heads": query_heads,
        "hidden": hidden,
        "experts": experts,
        "expert_ffn": expert_ffn,
        "shared_ffn": shared_ffn,
        "attention": attention,
        "mlp": mlp,
    }
    settings: dict[str, Any] = {
        **{axis: _size(axis, text) for axis, text in sizes.items() if text is not None},
        "parameters": parameters,
        "decode_bytes": decode_bytes,
        "score": score,
        "expert_score": expert_score,
        "layer_score": layer_score,
        "refit": refit,
        "fold": fold,
        "protect_first": protect_first,
        "protect_last": protect_last,
        "judged": judged,
        "multiple_of": multiple_of,
        "per_layer": per_layer,
        "calibration": tuple(calibration or ("self",)),
        "samples": samples,
        **opt.given(length=length),
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "max_memory": max_memory,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        expected = estimate_shrink(model, out, **settings)
        show_shrink_estimate(expected)
        opt.emit(expected.summary())
    else:
        run = step(model, out, **settings)
        show_shrunk(run)
        opt.emit(run.summary())


def _size(axis: str, text: str) -> int | float:
    """A ratio when there is a decimal point, otherwise a size. Raises UserError for what is no number."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        flag = f"--{axis.replace('_', '-')}"
        raise UserError(f"{flag} {text!r} is no number; write a ratio that stays such as 0.75, or a size.") from error
