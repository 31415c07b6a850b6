"""Planning what training on a model needs where, before anything of it is loaded.

config.json -> facts (meta tensors, no weights) -> parts by place -> fits or the cheapest change
"""
