"""The ledger: order-exact accumulation, the durable store, export."""

__all__ = [
    "Attachment", "Compaction", "DamagedError", "Entry", "Event", "Ledger", "LedgerError",
    "LedgerLocked", "Reader", "Record", "Verification", "drop_damaged",
]  # fmt: skip

_HOMES = {
    "reader": ("Attachment", "Reader"),
    "compact": ("Compaction",),
    "errors": ("DamagedError", "LedgerError", "LedgerLocked"),
    "records": ("Entry", "Event", "Record"),
    "ledger": ("Ledger",),
    "verify": ("Verification", "drop_damaged"),
}


def __getattr__(name: str):
    """Imported when first asked for: the arithmetic alone must not load the store."""
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"hiedit.ledger.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
