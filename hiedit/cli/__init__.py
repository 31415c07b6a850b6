"""`hiedit`: the command line. Every command is a thin shell over a room of the library.

shared: what the commands have in common. train: training, comparing runs. runs: the demo,
measuring. plan: what a run needs.
edits: editing a model of one's own, with input and reports. ledgers: looking at edits, taking them
back, handing them on. models: which there are, and bringing one here. calibrate: measuring one.
"""

import sys

try:
    import typer  # noqa: F401
except ImportError:  # the core works without the command line
    sys.exit("the `hiedit` command needs typer and rich: pip install 'hiedit[cli]'")

from hiedit.cli import (  # noqa: E402, F401  (they add their commands)
    calibrate,
    edits,
    ledgers,
    models,
    plan,
    runs,
    train,
)
from hiedit.cli.shared import app  # noqa: E402

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `hiedit` command."""
    app()
