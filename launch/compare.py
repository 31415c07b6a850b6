"""Compare ways of choosing layers over worlds, stream lengths and seeds, each tuned for itself.

    python launch/compare.py experiment=selection run_dir=runs/selection
    python launch/compare.py experiment=selection dry_run=true          # what it would run
    python launch/compare.py experiment=selection report=true           # tables and plots again
    python launch/compare.py experiment=selection-small run_dir=runs/small
    python launch/compare.py experiment=selection 'experiment.seeds=[0,1]' \\
        'experiment.horizons=[200]' 'experiment.methods=[random,hiedit]'
    python launch/compare.py --help                                     # every key

Every cell (one method with one setting on one stream) is a file under RUN_DIR/cells; what is
there is not run again, so that the same command goes on after a kill. It ends with the tables:
RUN_DIR/report.md, report.json and plots. docs/selection.md explains the experiment.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Compose, check, run; returns the exit status."""
    try:
        import hydra  # noqa: F401
    except ImportError as error:
        print(f"launch/compare.py needs {error.name}: pip install 'hiedit[cli]'", file=sys.stderr)
        return 2
    import json
    from dataclasses import asdict

    from hiedit.compare.config import CompareConfig
    from hiedit.compare.driver import compare
    from hiedit.compose import compose
    from hiedit.parallel import WorkerDied

    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nKeys and defaults:\n{json.dumps(asdict(CompareConfig()), indent=2)}")
        return 0
    try:
        compare(compose(arguments, CompareConfig, "compare"))
    except (ValueError, ImportError, WorkerDied) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the cells that are missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
