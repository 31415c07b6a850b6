"""Comparing methods over worlds, stream lengths and seeds, each with settings tuned for it.

    CompareConfig -> cells (tune) -> chosen settings -> cells (measure) -> tables, tests, plots

A *cell* is one method with one setting on one stream; its result is one file, and a run that was
killed goes on with the cells that it lacks (``launch/compare.py``).
"""
