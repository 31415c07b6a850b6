"""Hands an edited model on: the accumulated delta as a PEFT LoRA adapter, or a merged checkpoint.

The adapter's two files are written by hand, so that exporting needs no peft; the tests compare
them with what peft writes and load them with peft. An adapter belongs on the *unedited* model:
``PeftModel.from_pretrained(base, directory)`` computes ``W_0 x + B (A x)`` where the edited model
has ``W = round(W_0 + acc)``. In fp32 the two agree to rounding. In bf16 and fp16 they do not: peft
keeps the adapter in fp32 (``autocast_adapter_dtype``) and never rounds the sum, so it carries what
the rounding of ``W`` lost; ``merge_and_unload`` then rounds as the ledger does (not with
``safe_merge=True``, which rounds ``B A`` before it adds).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hiedit.backbone.model import Backbone
from hiedit.ledger.directory import check_target, replacing, write_json
from hiedit.ledger.lowrank import LowRank, factorise, measure, rounding_of
from hiedit.ledger.state import DeltaState

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Rows = Mapping[str, tuple[Tensor, Tensor]]  # by module, all active edits': A [R, I], B [O, R]


@dataclass(frozen=True)
class ModuleExport:
    """One module of an adapter. Errors are Frobenius norms over that of the delta, measured.

    shape: (O, I). rank: of the adapter. rows: rank rows of the active edits, None if not known.
    exact: nothing was truncated; ``error`` is then rounding alone.
    error: of ``B A`` from the accumulated delta.
    served_error: of the unrounded ``W_0 + B A``, which peft serves, from the edited weight.
    merged_error: of ``round(W_0 + B A)``, which peft merges, from the edited weight.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    rows: int | None
    exact: bool
    error: float
    served_error: float
    merged_error: float


@dataclass(frozen=True)
class ExportReport:
    """A summary of what ``export_adapter`` wrote; also in the directory, as ``hiedit_export.json``.

    modules: in the model's order. rank, max_error: as asked for, None where not.
    bytes: size of the adapter's weights.
    """

    directory: Path
    base_name: str
    modules: tuple[ModuleExport, ...]
    rank: int | None
    max_error: float | None
    bytes: int

    @property
    def worst(self) -> ModuleExport:
        """The module whose delta is met least."""
        return max(self.modules, key=lambda module: module.error)

    @property
    def exact(self) -> bool:
        return all(module.exact for module in self.modules)

    @property
    def bound_met(self) -> bool:
        """Tell whether every module is within ``max_error``; True if none was asked for."""
        return self.max_error is None or self.worst.error <= self.max_error

    def to_json(self) -> dict:
        """Plain values, without the directory, which may be moved."""
        plain = asdict(self) | {"modules": [asdict(module) for module in self.modules]}
        del plain["directory"]
        return {"exact": self.exact, "bound_met": self.bound_met, "worst": self.worst.name} | plain


@torch.no_grad()
def export_adapter(
    directory: str | Path,
    model: Backbone | nn.Module,
    state: DeltaState,
    factors: Rows | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    base_name: str | None = None,
    *,
    overwrite: bool = False,
) -> ExportReport:
    """Write ``state``'s accumulated delta as a PEFT LoRA adapter; the model is not touched.

    Modules whose delta is zero get no entry. Everything is stored in fp32, and ``lora_alpha`` is
    the rank, so that the scaling is 1 everywhere.

    Args:
        directory: made, parents included; replaced if it holds an earlier export and no more.
        model: the edited causal LM (its module names decide how peft must be told the targets).
        factors: by module, ``(A [R, I], B [O, R])`` of all active edits in order, the masks
            multiplied into B. An adapter of rank R is then exact. None, or modules left out:
            the factors are found from the delta itself.
        rank: of any module, at most.
        max_error: relative Frobenius error of any module's delta, at most: the smallest rank that
            reaches it. If ``rank`` does not allow that, ``ExportReport.bound_met`` is False.
        base_name: path or Hub name of the base model, for ``adapter_config.json``; None: where
            the model says that it came from.
        overwrite: replace whatever plain files the directory holds.

    Raises:
        ValueError: if nothing is edited, ``rank`` or ``max_error`` makes no sense, ``factors`` do
            not multiply to the delta, or the directory holds something else. Nothing is written.
    """
    model = model.model if isinstance(model, Backbone) else model
    if base_name is None:
        base_name = str(getattr(model.config, "_name_or_path", ""))
    directory = Path(directory)
    _check_request(rank, max_error)
    check_target(directory, overwrite)
    names = _edited(model, state)
    _check_factors(state, factors or {})
    tensors, ranks, modules = {}, {}, []
    for name in names:
        low, module = _export_module(name, state, (factors or {}).get(name), rank, max_error)
        tensors[f"base_model.model.{name}.lora_A.weight"] = low.A.cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = low.B.cpu()
        ranks[name] = low.rank
        modules.append(module)
    conv1d = all(state.modules[name].conv1d for name in names)
    written = {"kind": "adapter"}
    with replacing(directory, written, overwrite) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, adapter_config(model, ranks, base_name, conv1d))
        size = (temporary / WEIGHTS).stat().st_size
        report = ExportReport(directory, base_name, tuple(modules), rank, max_error, size)
        written |= report.to_json()
    return report


def adapter_config(
    model: nn.Module, ranks: Mapping[str, int], base_name: str, conv1d: bool
) -> dict:
    """``adapter_config.json`` for modules of the given ranks: what differs from peft's defaults.

    peft reads the keys of ``rank_pattern`` as regular expressions that may match the *end* of a
    module's name, and takes a target for every module whose name ends in ``.target``. So patterns
    are escaped and anchored, and where the model has a module whose name ends in a target's, all
    targets together become one regular expression, which peft matches against the whole name.

    Args:
        conv1d: every target is a ``Conv1D``. In a mixture peft itself decides layer by layer, with
            a warning, whichever value stands here.
    """
    targets: list[str] | str = list(ranks)
    suffixes = tuple(f".{name}" for name in ranks)
    if any(name.endswith(suffixes) for name, _ in model.named_modules()):
        targets = "|".join(re.escape(name) for name in ranks)
    largest = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    return {
        "alpha_pattern": pattern,
        "base_model_name_or_path": base_name or None,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": pattern,
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


@torch.no_grad()
def save_merged(
    directory: str | Path, model: Backbone | nn.Module, tokenizer=None, *, overwrite: bool = False
) -> Path:
    """Write the edited model as an ordinary Hugging Face checkpoint in safetensors.

    ``AutoModelForCausalLM.from_pretrained(directory)`` has the same bits in every weight. Hooks
    and ``requires_grad`` are no part of a checkpoint and stay on the model as they are.

    Args:
        tokenizer: saved beside the model; None takes a Backbone's, else none is saved.
        directory, overwrite: as in ``export_adapter``.

    Raises:
        ValueError: if the directory holds something else than an earlier export, or a parameter
            has another dtype than the model, which loading would change.
    """
    if isinstance(model, Backbone):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    directory = Path(directory)
    check_target(directory, overwrite)
    _check_dtypes(model)
    written = {"kind": "merged", "dtype": str(model.dtype).removeprefix("torch.")}
    with replacing(directory, written, overwrite) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return directory


def _export_module(
    name: str,
    state: DeltaState,
    rows: tuple[Tensor, Tensor] | None,
    rank: int | None,
    max_error: float | None,
) -> tuple[LowRank, ModuleExport]:
    """The factors of one module and what became of them."""
    acc, base = state.acc[name], state.base[name]
    if state.modules[name].conv1d:
        acc, base = acc.T, base.T
    rows = None if rows is None else tuple(t.to(acc.device) for t in rows)
    low = factorise(acc, rows, rank, max_error)
    errors = measure(acc, base, low)
    unexpected = abs(errors.delta - low.predicted)
    if rows is not None and unexpected > 1e-5 + rounding_of(acc, rows):
        raise ValueError(
            f"factors[{name!r}] ({len(rows[0])} rank rows) do not multiply to the delta: relative "
            f"error {errors.delta:.1e}, expected {low.predicted:.1e}; give the rows of exactly the "
            "active edits, masks multiplied into B, or none"
        )
    known = None if rows is None else len(rows[0])
    shape = tuple(acc.shape)
    return low, ModuleExport(
        name, shape, low.rank, known, low.exact, errors.delta, errors.served, errors.merged
    )


def _edited(model: nn.Module, state: DeltaState) -> list[str]:
    """Modules whose delta is not zero, in the model's order.

    Raises:
        ValueError: if there is none, one is not the model's, or a delta is not finite.
    """
    names = [name for name in state.modules if name in state.acc and bool(state.acc[name].any())]
    if not names:
        raise ValueError(
            "export_adapter: no module is edited (no edit was committed, or all were reverted), "
            "and a PEFT adapter needs at least one; commit an edit first, or use the base model"
        )
    own = dict(model.named_modules())
    for name in names:
        if own.get(name) is not state.modules[name].module:
            raise ValueError(f"state: module {name!r} is not the one of that name in the model")
        if not bool(state.acc[name].isfinite().all()):
            raise ValueError(f"state: the delta of {name!r} has NaN or infinite elements")
    return names


def _check_request(rank: int | None, max_error: float | None) -> None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank is {rank!r}: it must be an integer of at least 1, or None")
    number = isinstance(max_error, int | float) and not isinstance(max_error, bool)
    if max_error is not None and not (number and 0 < max_error < 1):
        raise ValueError(
            f"max_error is {max_error!r}: it is a share of the delta's norm, "
            "more than 0 and less than 1, or None"
        )


def _check_factors(state: DeltaState, factors: Rows) -> None:
    for name, (A, B) in factors.items():
        if name not in state.modules:
            raise ValueError(f"factors: {name!r} is not one of {list(state.modules)}")
        i, o = state.modules[name].shape
        fits = A.dim() == B.dim() == 2 and len(A) == B.shape[1]
        if not fits or A.shape[1] != i or len(B) != o:
            raise ValueError(
                f"factors[{name!r}]: A must be [R, {i}] and B [{o}, R], "
                f"got {tuple(A.shape)} and {tuple(B.shape)}"
            )


def _check_dtypes(model: nn.Module) -> None:
    """from_pretrained loads every parameter in the one dtype that the config records, except those
    that the architecture itself keeps in fp32."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if model.dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        stays = parameter.dtype == torch.float32 and kept.intersection(name.split("."))
        if parameter.is_floating_point() and parameter.dtype != model.dtype and not stays:
            raise ValueError(
                f"save_merged: {name} is {parameter.dtype} in a model of {model.dtype}, as which "
                f"from_pretrained would load it; convert the model with `model.to(dtype)`"
            )
