"""Knowledge that edits must leave alone, and what a model's modules are like on it.

own_text: what the model writes by itself. moments: of the keys on such text and on prompts,
measured once for a model and kept in the cache.
"""
