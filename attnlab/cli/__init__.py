"""The command line. A mistake is one line on stderr and exit code 2; a bug keeps its traceback.

Heavy imports stand inside the commands, so that ``attnlab --help`` does not wait for torch.
"""

import sys
import warnings
from typing import Annotated, Any

import typer

from attnlab.cli import measuring, models, rows, training, workshop
from attnlab.cli.options import PLAIN
from attnlab.errors import InputError

PLAIN_ROOT: Any = PLAIN | {"add_completion": True}  # a shell completes every command through the root
app = typer.Typer(help="What sharing key/value heads buys and costs, predicted and measured.", **PLAIN_ROOT)
for part in (measuring, models, training, rows, workshop):
    app.add_typer(part.app)

STOPPED = 130  # the shell's exit code for Ctrl-C
# typer hands its parser's usage errors out only through BadParameter's bases
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 where a check failed, 2 on a mistake, 130 on Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: print(f"attnlab: note: {message}", file=sys.stderr)
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="attnlab", standalone_mode=False)
    except (_UsageError, InputError) as error:
        text = error.format_message() if isinstance(error, _UsageError) else str(error)  # type: ignore[attr-defined]
        print(f"attnlab: error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    if code == STOPPED:  # what typer makes of Ctrl-C, in some of its versions
        print("attnlab: stopped; run the same command again to go on", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from attnlab import __version__

        print(f"attnlab {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
