"""The model that is edited: its modules, and what an edit looks like at them.

    model + names -> Backbone -> Probe (forward pass) -> Signals (keys, value gradients)

model, modules: the editable linear layers and shifts on top of them. signals, losses: what is read
off a pass. packing, past, prefix, fused: the same numbers in less time. moments, curvature: what
keys and outputs are like on text that edits must leave alone. normalise: running statistics.
"""
