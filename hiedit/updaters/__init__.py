"""The low level: one low-rank shift for each module that is touched.

    Signals, mask -> hypernetwork or closed form -> solver (keeps off protected keys) -> Shifts

updater: all modules together. group: those of one shape. solvers: the systems that are solved.
natural: steps along the natural gradient and the trust region. protection: what must not be
forgotten. memory: what editing itself learns.
"""
