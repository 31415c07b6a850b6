"""The high level: which modules an edit touches.

    Signals -> gate (logits) -> estimator (training) or the k largest -> Action (layer mask)

selectors: every way to choose, learned or fixed. gate: the network that scores modules. estimators:
how a gradient reaches it through the choice.
"""
