"""The verb `engines` of the command line: which there are, and how one comes."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prunus.cli import options as opt

ASK = "for"  # the command that a run's path stands for


class RunOrCommand(TyperGroup):
    """`engines RUN` beside `engines install NAME`: what is no command is a run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else [ASK, *args])


engines = typer.Typer(
    cls=RunOrCommand,
    invoke_without_command=True,
    rich_markup_mode="markdown",
    add_completion=False,
    subcommand_metavar="[RUN] | install NAME",
)


@engines.callback()
def show(context: typer.Context) -> None:
    """List the engines: installed or not, what they take, what pruning gains; of a RUN, what each can load of it.

    Example: `prunus engines out-shrunk`
    """
    if context.invoked_subcommand is not None:
        return
    from prunus.terminal.engines import engine_rows, show_engines

    rows = engine_rows()
    show_engines(rows)
    opt.emit({"engines": rows})


@engines.command(ASK)
def show_fit(run: opt.Model, trust_remote_code: opt.Trust = False) -> None:
    """What each engine can load of one run, as what, and what the run gains there; reads no weights.

    Example: `prunus engines out-shrunk`
    """
    from prunus.steps.engine_fit import engine_fit
    from prunus.terminal.engines import show_engine_fit

    rows = engine_fit(run, trust_remote_code=trust_remote_code)
    show_engine_fit(run, rows)
    opt.emit({"step": "engines", "model": run, "engines": rows})


@engines.command()
def install(
    name: Annotated[str, typer.Argument(help="As in the list: llama.cpp, vllm, onnxruntime or openvino.")],
) -> None:
    """Install an engine into an environment of its own in the user's cache. Interrupted, it goes on.

    Example: `prunus engines install llama.cpp`
    """
    from prunus.engines import engine_named
    from prunus.engines import install as step
    from prunus.terminal.engines import show_installed

    installed = step(engine_named(name))
    show_installed(name, installed)
    opt.emit({"step": "engines install", "engine": name, "home": str(installed.home), "versions": installed.versions})
