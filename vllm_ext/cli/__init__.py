# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-ext`` command: benchmark, verification, diagnosis, and the table of methods.

Importing this package needs neither vLLM nor torch: each command imports the engine only when it
runs, so that ``vllm-ext doctor`` can say what is missing on a machine without it.
"""

import signal
import sys

import typer

from vllm_ext.cli import (
    bench,
    datastore,
    distill,
    doctor,
    head,
    methods,
    model,
    prime,
    report,
    verify,
)

app = typer.Typer(
    name="vllm-ext",
    help="Token-tree speculation and exact constraints for vLLM: measure, verify, diagnose.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("bench")(bench.command)
app.command("report")(report.command)
app.command("verify", epilog=verify.EPILOG)(verify.command)
app.command("doctor")(doctor.command)
app.command("methods")(methods.command)
app.command("prime")(prime.command)
app.command("head")(head.command)
app.command("distill")(distill.command)
app.add_typer(model.app, name="model")
app.add_typer(datastore.app, name="datastore")


def main() -> None:
    """Run the command line; exit codes: 0 success, 1 failed check, 2 usage error."""
    # An exception instead of the default, which would leave the engines that were started behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()
