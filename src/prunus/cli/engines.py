"""The verb `engines` of the command line: which there are, and how one comes."""

from typing import Annotated

import typer

from prunus.cli import options as opt

engines = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown", add_completion=False)


@engines.callback()
def show(context: typer.Context) -> None:
    """List the engines: installed or not, what they take, what pruning gains in them. Example: `prunus engines`."""
    if context.invoked_subcommand is not None:
        return
    from prunus.terminal.engines import engine_rows, show_engines

    rows = engine_rows()
    show_engines(rows)
    opt.emit({"engines": rows})


@engines.command()
def install(
    name: Annotated[str, typer.Argument(help="As in the list: llama.cpp, vllm or onnxruntime.")],
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
