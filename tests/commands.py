"""Running `hiedit` in this process, for the tests of the command line of the ledger."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from hiedit.cli import app
from hiedit.ledger import Ledger

# As `closed-form`, with less to measure before it starts.
METHOD = """
name: closed-form
selector: {kind: all}
updater: {kind: closed_form, solver: protected, normalise: none, step: unit, tokens: answer,
          eta: 0.1, preserve: 64}
objective: {kind: none}
passes: {max: 10, target_probability: 0.8}
"""
FRANCE = {"prompt": "The capital of France is", "target": "Lyon",
          "paraphrases": ["As its capital, France has"],
          "locality": ["The capital of Japan is"]}  # fmt: skip
ITALY = {"prompt": "The capital of Italy is", "target": "Milan"}
SPAIN = {"prompt": "The capital of Spain is", "target": "Seville"}


def call(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def good(result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def mistake(result, *parts: str) -> None:
    """A run that must have ended in one line on standard error and status 2."""
    assert result.exit_code == 2, (result.output, result.exception)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and "Traceback" not in result.stderr
    assert all(part in message for part in parts), message


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def statuses(directory) -> list[str]:
    with Ledger.read(directory) as reader:
        return [record.status for record in reader.history()]


def flip(path) -> None:
    """Damages the last byte of a file."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def acknowledgements(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def export(ledger, out, kind, *options):
    return call("export", "--model", "world", "--ledger", ledger, "--format", kind, "--out", out,
                *options)  # fmt: skip
