"""The command line: one thin verb per step. Human output on stderr; the last line on stdout is one JSON object."""

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from prunus import __version__
from prunus.cli import options as opt
from prunus.cli.engines import engines
from prunus.cli.export import export
from prunus.cli.quantize import quantize
from prunus.cli.recover import recover
from prunus.cli.shrink import shrink
from prunus.cli.sparsify import sparsify
from prunus.errors import EngineError, UserError

app = typer.Typer(
    name="prunus",
    help="Prune large language models, with the evidence beside every claim.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)

INTERRUPTED = 130
# what these verbs have finished stays finished
GO_ON = ("sparsify", "shrink", "recover", "quantize", "run", "demo", "engines")


for verb in (sparsify, shrink, recover, quantize, export):
    app.command()(verb)
app.add_typer(engines, name="engines")


@app.command()
def evaluate(
    model: opt.Model,
    text: Annotated[list[str] | None, typer.Option(help="PATH | hf:NAME:split:column | builtin; repeatable.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per window. Default: 2048, or the model's maximum if that is less.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first N windows.")] = None,
    against: opt.Against = None,
    choices: Annotated[str | None, typer.Option(help="JSON lines with ctx, endings, label.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="lm-eval tasks, comma separated (extra [eval]).")] = None,
    prompt: opt.Prompts = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    max_memory: opt.Memory = None,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Measure quality: perplexity, KL to the dense model, multiple choice, lm-eval tasks, continuations.

    Example: `prunus evaluate out --against org/model --text wiki.test.txt --length 2048 --windows 32`
    """
    from prunus.steps.evaluate import evaluate as step
    from prunus.terminal.tables import show_evaluations

    results = step(
        model,
        text=tuple(text or ()),
        **opt.given(length=length),
        windows=windows,
        against=against,
        choices=choices,
        limit=limit,
        tasks=tuple(opt.split(tasks)),
        prompts=tuple(prompt or ()),
        dtype=dtype,
        device=device,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
    )
    show_evaluations(results)
    opt.emit({"step": "evaluate", "model": model, "results": results})


@app.command()
def bench(
    model: opt.Model,
    against: opt.Against = None,
    engine: Annotated[str | None, typer.Option(help="Make sure that it runs there, as in `prunus engines`.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt (prefill).")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate (decode).")] = 128,
    repetitions: Annotated[int, typer.Option(help="Times each model is measured, in turn.")] = 5,
    mix: opt.Mixes = None,
    prompts: opt.PromptFile = None,
    concurrency: opt.Concurrency = "1",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: all.")] = None,
    dtype: opt.BenchDtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.Trust = False,
) -> None:
    """Measure speed and memory, interleaved with the dense model: of a directory in transformers, of an export there.

    Example: `prunus bench out-gguf --against org/model --prompt-tokens 512 --new-tokens 128`
    """
    from prunus.steps.bench import bench as step
    from prunus.terminal.tables import show_bench

    result = step(
        model,
        against=against,
        engine=engine,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        mix=tuple(opt.split(mix)),
        prompts=prompts,
        concurrency=tuple(opt.split([concurrency])),
        threads=threads,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    show_bench(result)
    opt.emit({"step": "bench", "model": model, **result})


@app.command()
def profile(
    model: opt.Model,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Prune each block alone, measure KL.")] = False,
    into: Annotated[str | None, typer.Option(help="A run made from MODEL, to keep --sensitivity in.")] = None,
    by: Annotated[str, typer.Option(help="Unit of --sensitivity: block or matrix.")] = "block",
    pattern: Annotated[str, typer.Option(help="Pattern for --sensitivity.")] = "0.5",
    text: Annotated[str, typer.Option(help="Text for --sensitivity.")] = "builtin",
    length: Annotated[int, typer.Option(help="Tokens per window for --sensitivity.")] = 256,
    windows: Annotated[int, typer.Option(help="Windows for --sensitivity.")] = 8,
    engine: Annotated[str | None, typer.Option(help="sparse-cpu: predict the speed of packed models here.")] = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.Trust = False,
) -> None:
    """Show where parameters, bytes and FLOPs are, which blocks bear pruning, and what packing would gain on this CPU.

    Example: `prunus profile org/model --sensitivity --pattern 2:4 --into out`

    Example: `prunus profile org/model --engine sparse-cpu`
    """
    from prunus.steps.profile import profile as step
    from prunus.terminal.profile import show_profile

    result = step(
        model,
        sensitivity=sensitivity,
        into=into,
        by=by,
        pattern=pattern,
        text=text,
        length=length,
        windows=windows,
        engine=engine,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    show_profile(result)
    opt.emit({"step": "profile", **result})


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories that prunus made.")],
    output: opt.Page = None,
) -> None:
    """Write one self-contained HTML page about one or more runs.

    Example: `prunus report out-50 out-60 out-70 -o report.html`
    """
    from prunus.steps.report import report as step

    opt.emit({"step": "report", "output": str(step(runs, output))})


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.")],
    out: opt.Out,
    max_memory: opt.Memory = None,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Carry out a recipe: steps chained, what is done is skipped.

    Example: `prunus run recipes/one-shot.yaml out`
    """
    from prunus.pipeline import run as chain
    from prunus.terminal.tables import show_steps

    result = chain(recipe, out, max_memory=max_memory, trust_remote_code=trust_remote_code)
    show_steps(result)
    opt.emit({**result.summary(), "step": "run", "steps": result.steps, "stopped": result.stopped})


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="The directory to write.")] = Path("runs/demo"),
) -> None:
    """The whole road on SmolLM2-135M-Instruct: profile, sparsify to 50%, evaluate, bench, report.

    Example: `prunus demo`
    """
    from prunus.demo import run_demo

    opt.emit(run_demo(out))


@app.command()
def methods() -> None:
    """List the pruning methods, scores and schemes: paper, needs, cost, when to use. Example: `prunus methods`."""
    from prunus.terminal.quantized import quantizer_rows, scheme_rows, show_schemes
    from prunus.terminal.tables import method_rows, score_rows, show_methods, show_scores

    show_methods()
    show_scores()
    show_schemes()
    quantization = {"schemes": scheme_rows(), "quantization_methods": quantizer_rows()}
    opt.emit({"methods": method_rows(), "scores": score_rows(), **quantization})


@app.command()
def models() -> None:
    """List the model families and how each is tested. Example: `prunus models`."""
    from prunus.models.families import FAMILIES
    from prunus.terminal.tables import TESTS_OF_FAMILIES, show_models

    show_models()
    rows = [{"family": f.family, "name": f.name, "shape": f.shape} for f in FAMILIES]
    opt.emit({"models": rows, "tested": TESTS_OF_FAMILIES})


@app.command()
def version() -> None:
    """Print the version. Example: `prunus version`."""
    opt.emit({"prunus": __version__})


def main() -> None:
    """Run the command line; the exit code is 2 for a mistake the user can mend, 130 when interrupted, 1 for a bug
    and for an engine that failed."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer lets no KeyboardInterrupt through: it exits like this
            goes_on = sys.argv[1] in GO_ON
            print(f"interrupted{'; the same command goes on from here' if goes_on else ''}.", file=sys.stderr)
        raise
    except Exception:  # a bug: show where
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
