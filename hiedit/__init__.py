"""HiEdit: lifelong model editing by hierarchical reinforcement learning."""

_HOMES = {"EditRequest": "types", "Locality": "types", "Editor": "editor", "Guard": "guard"}
__all__ = ["EditRequest", "Editor", "Guard", "Locality"]


def __getattr__(name: str):
    """The public names, imported when first asked for: reading results must not load torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"hiedit.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
