"""The edited model without an editor: to look at it and to hand it on.

    base model + ledger -> replay -> holding | save_pretrained | export_adapter

It needs no method, writes nothing to the ledger and works beside the process that edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hiedit.backbone.model import Backbone
from hiedit.edited import Holding, holding
from hiedit.experiment import load_backbone
from hiedit.ledger.export import ExportReport, export_adapter, save_merged
from hiedit.ledger.offline import active_rows, replay
from hiedit.ledger.reader import Reader
from hiedit.ledger.records import Record
from hiedit.ledger.state import DeltaState
from hiedit.runconfig import ModelConfig


@dataclass(frozen=True)
class Replayed:
    """A model with the edits of a ledger as they were at one moment; made by ``open``."""

    backbone: Backbone
    state: DeltaState
    records: tuple[Record, ...]
    reader: Reader

    @classmethod
    def open(
        cls,
        model: str,
        ledger: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> Replayed:
        """Load the base model and bring it to the edits in effect.

        Args:
            model: directory, GGUF file or hub name of the base model, or of ``hiedit models``.
            ledger: its directory.
            dtype: of the weights; ``auto``: that of the ledger.

        Raises:
            ValueError: for a path without a model or a ledger, or another base model.
            DamagedError: if a file that is needed is damaged.
        """
        reader = Reader(Path(ledger).expanduser().absolute(), None)
        try:
            if dtype == "auto":
                dtype = next((m.dtype for m in reader.modules.values()), dtype)
            names = list(reader.modules) or None
            source = ModelConfig(
                Path(model).name, str(model), names, dtype, device, trust_remote_code
            )
            backbone = load_backbone(source)
            state = DeltaState(backbone.modules)
            return cls(backbone, state, tuple(replay(reader, state)), reader)
        except BaseException:
            reader.close()
            raise

    def holding(self) -> Holding:
        """Tell whether the edits in effect still hold on the model."""
        return holding(self.backbone, self.records)

    def save_pretrained(self, directory: str | Path, overwrite: bool = False) -> Path:
        """The merged checkpoint; arguments and errors as ``save_merged``."""
        return save_merged(directory, self.backbone, overwrite=overwrite)

    def export_adapter(
        self,
        directory: str | Path,
        rank: int | None = None,
        max_error: float | None = None,
        overwrite: bool = False,
    ) -> ExportReport:
        """The accumulated delta as a PEFT LoRA adapter; arguments and errors as
        ``hiedit.ledger.export.export_adapter``."""
        rows = active_rows(self.records, self.reader.shifts)
        return export_adapter(
            directory, self.backbone, self.state, rows, rank, max_error, overwrite=overwrite
        )

    def close(self) -> None:
        """Done with the ledger; the model keeps its weights."""
        self.reader.close()

    def __enter__(self) -> Replayed:
        return self

    def __exit__(self, *_) -> None:
        self.close()
