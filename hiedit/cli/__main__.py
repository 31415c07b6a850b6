"""`python -m hiedit.cli` is `hiedit`."""

from hiedit.cli import main

main()
