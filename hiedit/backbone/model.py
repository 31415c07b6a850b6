"""A frozen causal language model seen through its editable modules.

Two views: ``capture`` records what an edit looks like at every module (signals), ``shifted``
makes low-rank updates part of the forward pass without touching a weight. Both are context
managers over forward hooks: outside of them the model is the plain transformers object.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hiedit.backbone.host import on_host
from hiedit.backbone.losses import AnswerLogits
from hiedit.backbone.modules import EditableModule, resolve_modules
from hiedit.backbone.packing import Packing, active, is_sharded, packed, pays, possible
from hiedit.backbone.past import Past
from hiedit.backbone.prefix import DEFAULT_BYTES, Prefix
from hiedit.config import Place
from hiedit.types import IGNORE, Shift, TokenBatch


class Backbone:
    """A causal LM with its tokenizer and its ``L`` editable modules.

    All parameters are frozen: gradients are wanted for shifts and module outputs alone, so the
    autograd graph begins at the lowest editable module and no dense weight gradient can arise.
    The hidden states below that module are kept, at most ``prefix_bytes`` of them (0: none).
    edits_on_host: what commits need beside the weights is kept in host memory, see ``HostModule``.
    place: where methods that leave it to the model edit.

    Raises:
        ValueError: if ``modules`` names a layer that the model lacks.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        modules: str | Sequence[str] | None = None,
        prefix_bytes: int = DEFAULT_BYTES,
        edits_on_host: bool = False,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.place = tokenizer, Place()
        found = resolve_modules(model, modules)
        kept = {n: on_host(m) for n, m in found.items()} if edits_on_host else found
        self.modules: Mapping[str, EditableModule] = kept
        self.prefix = Prefix(model, self.modules, prefix_bytes)
        accepted = inspect.signature(model.forward).parameters
        self._takes_keep = "logits_to_keep" in accepted
        self._takes_positions = "position_ids" in accepted
        self._edits_last = _edits_last(model, self.modules)

    @property
    def device(self) -> torch.device:
        return next(iter(self.modules.values())).weight.device

    @property
    def names(self) -> list[str]:
        return list(self.modules)

    def shape_groups(self) -> dict[tuple[int, int], list[str]]:
        """Module names by (I, O); the order inside a group is the model's."""
        groups: dict[tuple[int, int], list[str]] = {}
        for name, module in self.modules.items():
            groups.setdefault(module.shape, []).append(name)
        return groups

    def past(self, batch: TokenBatch, first: Tensor) -> Past | None:
        """Return what of ``batch`` stands before the columns ``first`` (int64 [N]), computed with
        the weights as they are, for ``answers`` to go on from; None where there is nothing, where
        an answer's token is predicted there, or where the architecture, the attention in use or
        sharded parameters do not allow it."""
        if not possible(self.model, batch.attention) or is_sharded(self.model):
            return None
        past = Past(batch, first, _positions(batch))
        before = past.before()
        predicts = (batch.labels != IGNORE)[:, 1:]
        if not before.tokens or not bool(past.rest.attention[:, :-1][predicts].all()):
            return None
        if self.prefix.depth:
            past.states = self.prefix.tokens(batch, past.positions)
        inner, places = self.model.model, past.whole.pack(past.positions)
        past.rotary = tuple(x[0].contiguous() for x in inner.rotary_emb(inner.norm.weight, places))
        with torch.no_grad(), self._upper(), packed(self.model, before):
            inner(**self._inputs(past, before), use_cache=False)
        return past

    def _upper(self):
        return self.prefix.upper() if self.prefix.depth else contextlib.nullcontext()

    def _inputs(self, past: Past, part: Packing) -> dict[str, Tensor]:
        """Return what the model is given of the tokens of ``part``."""
        inputs = {"position_ids": part.pack(past.positions)}
        if past.states is None:
            return inputs | {"input_ids": part.pack(past.batch.ids)}
        return inputs | {"inputs_embeds": past.states[past.whole.rank[part.where]][None]}

    def answers(self, batch: TokenBatch, past: Past | None = None) -> AnswerLogits:
        """Logits at the positions that predict the answer's tokens (labels not ``IGNORE``).

        Only the columns between the first and the last such position are sent through the output
        embedding; in a left-padded batch these are as many as the longest answer has tokens.
        past: of ``batch``, what need not be computed again.

        Raises:
            ValueError: if a label stands at position 0, which nothing predicts, or none is set.
        """
        labelled = batch.labels != IGNORE
        columns = labelled.any(0).nonzero().squeeze(-1)
        if columns.numel() == 0 or columns[0] == 0:
            raise ValueError("labels: every batch needs answer tokens, none of them at position 0")
        if past is not None:
            return self._go_on(past, labelled)
        packing = self._packing(batch, labelled)
        if packing is not None:
            row, column = labelled.nonzero(as_tuple=True)
            logits = self._forward_packed(batch, packing, packing.rank[row, column - 1])
            return AnswerLogits(logits, batch.labels[row, column], row, len(batch))
        first, last = int(columns[0]), int(columns[-1])
        keep = torch.arange(first - 1, last, device=batch.ids.device)
        logits = self._forward(batch, keep)
        row, column = labelled[:, first : last + 1].nonzero(as_tuple=True)
        target = batch.labels[:, first : last + 1][row, column]
        return AnswerLogits(logits[row, column], target, row, len(batch))

    def _go_on(self, past: Past, labelled: Tensor) -> AnswerLogits:
        packing = past.after()
        row, column = labelled.nonzero(as_tuple=True)
        keep = packing.rank[row, column - 1]
        with self._upper(), packed(self.model, packing, None if self._edits_last else keep):
            inputs = self._inputs(past, packing)
            logits = self.model(**inputs, logits_to_keep=keep, use_cache=False).logits[0]
        return AnswerLogits(logits, past.batch.labels[row, column], row, len(past.batch))

    @torch.no_grad()
    def next_logits(self, ids: Tensor, attention: Tensor) -> Tensor:
        """[N, V] in fp32 on the host: of what follows ``ids`` [N, S], padded on the left."""
        ids, attention = ids.to(self.device), attention.to(self.device)
        kwargs = {"attention_mask": attention, "use_cache": False}
        if self._takes_positions:
            kwargs["position_ids"] = _counted(attention)
        if self._takes_keep:
            kwargs["logits_to_keep"] = 1
        return self.model(input_ids=ids, **kwargs).logits[:, -1].float().cpu()

    def warm(self, batch: TokenBatch) -> None:
        """Compute in one pass what below the lowest editable module is not known of ``batch``,
        so that the calls that share its sequences find it."""
        if self.prefix.depth:
            self.prefix.states(batch, _positions(batch))

    def _forward(self, batch: TokenBatch, keep: Tensor) -> Tensor:
        kwargs = {"attention_mask": batch.attention, "use_cache": False}
        if self._takes_positions:
            kwargs["position_ids"] = _positions(batch)
        if self._takes_keep:
            kwargs["logits_to_keep"] = keep
        if self.prefix.depth:
            states = self.prefix.states(batch, kwargs["position_ids"])
            with self.prefix.upper():
                out = self.model(inputs_embeds=states, **kwargs).logits
        else:
            out = self.model(input_ids=batch.ids, **kwargs).logits
        return out if self._takes_keep else out[:, keep]

    def _packing(self, batch: TokenBatch, labelled: Tensor) -> Packing | None:
        """Tell how to make one row of ``batch``; None where that gains nothing, or is not
        possible."""
        if not pays(self.model, batch.attention):
            return None
        where = batch.attention.bool()
        # An answer at the start of its sequence is predicted by padding.
        predicted = bool(where[:, :-1][labelled[:, 1:]].all())
        return Packing(where) if predicted else None

    def _forward_packed(self, batch: TokenBatch, packing: Packing, keep: Tensor) -> Tensor:
        """[M, V]: logits at the tokens ``keep`` (int64 [M], among those that are no padding)."""
        positions = _positions(batch)
        kwargs = {"position_ids": packing.pack(positions), "logits_to_keep": keep}
        kwargs |= {"use_cache": False, "attention_mask": None}
        last = None if self._edits_last else keep
        if not self.prefix.depth:
            with packed(self.model, packing, last):
                return self.model(input_ids=packing.pack(batch.ids), **kwargs).logits[0]
        states = self.prefix.tokens(batch, positions)[None]
        with self.prefix.upper(), packed(self.model, packing, last):
            return self.model(inputs_embeds=states, **kwargs).logits[0]

    def captured(self, batch: TokenBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(inputs, outputs) by module of a forward pass over ``batch``, as ``capture`` gives them.
        What lies above the last editable module is not computed, where ranks need not agree."""
        if any(hasattr(p, "ds_id") for p in self.model.parameters()):
            with self.capture() as found:
                self.answers(batch)
            return found
        with self.capture() as found:

            def stop(*_):
                if len(found[0]) == len(self.modules):
                    raise _Captured

            handles = [m.module.register_forward_hook(stop) for m in self.modules.values()]
            try:
                self.answers(batch)
            except _Captured:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        return found

    @contextlib.contextmanager
    def capture(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Yields (inputs, outputs) by module, filled by the forward passes inside.

        inputs: [N, S, I], detached. outputs: [N, S, O], part of the graph; [N*S, I] and [N*S, O]
        where the architecture flattens them (OPT's MLP), [1, T, .] where padding was left out, see
        ``at_tokens``. Differentiate a loss with respect to them by ``torch.autograd.grad``: where
        the graph has not begun, the output itself becomes its leaf.
        """
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def record(name):
            def hook(_, args, out):
                inputs[name] = args[0].detach()
                if not out.requires_grad:
                    out = out.detach().requires_grad_()
                outputs[name] = out
                return out

            return hook

        handles = [m.module.register_forward_hook(record(n)) for n, m in self.modules.items()]
        try:
            yield inputs, outputs
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def shifted(self, shifts: Mapping[str, Sequence[Shift] | Shift]) -> Iterator[None]:
        """Have module ``l`` compute ``y = x W^T + sum_j ((x A_j^T) * scale_j) B_j^T``.

        ``scale`` may be [r] (one mask value per edit's rows) or [N, r] (per sequence as well, so
        that many candidate masks are scored in one batch). Gradients flow to A, B and scale.

        Raises:
            ValueError: if ``shifts`` names a module that is not editable.
        """
        handles = []
        try:
            for name, stack in shifts.items():
                if name not in self.modules:
                    raise ValueError(f"shifts: {name!r} is not one of {self.names}")
                stack = [stack] if isinstance(stack, Shift) else list(stack)
                if stack:
                    module = self.modules[name].module
                    handles.append(module.register_forward_hook(_shift_hook(_fewer(stack))))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Captured(Exception):
    """Every editable module was computed."""


def joined(stack: Sequence[Shift]) -> Shift:
    """Shifts of one module as one, whose rank rows are theirs in order; scales must be [r]."""
    if len(stack) == 1 and stack[0].scale is not None:
        return stack[0]
    ones = [s.A.new_ones(s.rank) if s.scale is None else s.scale for s in stack]
    # Transposed, as the forward pass reads it.
    B = torch.cat([s.B.T for s in stack]).T
    return Shift(torch.cat([s.A for s in stack]), B, torch.cat(ones))


def _positions(batch: TokenBatch) -> Tensor:
    """[N, S], counted from each sequence's first token: left padding must not shift them."""
    return _counted(batch.attention)


def _counted(attention: Tensor) -> Tensor:
    return (attention.cumsum(-1) - 1).clamp(min=0)


def at_tokens(x: Tensor, where: Tensor, attention: Tensor) -> Tensor:
    """[K, D]: the rows of what a module saw or gave where the bool [N, S] ``where`` is set.

    x: [N, S, D], [N*S, D] (OPT's MLP), or [1, T, D] where the forward pass left out padding.
    attention: [N, S], 0 at padding, where ``where`` is never set.
    """
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) != where.numel():
        where = where[attention.bool()]
    return flat[where.reshape(-1)]


def _edits_last(model: nn.Module, names: Iterable[str]) -> bool:
    """Tell whether an editable module belongs to the MLP of the last layer: then every position of
    it is asked for."""
    count = getattr(model.config, "num_hidden_layers", 0)
    return any(f".{count - 1}.mlp." in name for name in names)


def _add_product(out: Tensor, h: Tensor, right: Tensor) -> Tensor:
    """``out + h @ right`` in one operation: the product is never a tensor of its own."""
    added = torch.addmm(out.reshape(-1, out.shape[-1]), h.reshape(-1, h.shape[-1]), right)
    return added.view(out.shape)


def _fewer(stack: list[Shift]) -> list[Shift]:
    """The settled passes of an edit as one shift: two products a module, however many they are. A
    shift that wants a gradient stays on its own, or the others would be differentiated with it."""
    settled = [s for s in stack if not _own(s)]
    if len(settled) < 2:
        return stack
    return [joined(settled), *(s for s in stack if _own(s))]


def _own(shift: Shift) -> bool:
    """Tell whether a shift cannot be joined with others: it has a graph, or a scale by sequence."""
    parts = [t for t in (shift.A, shift.B, shift.scale) if t is not None]
    return any(t.requires_grad for t in parts) or (len(parts) == 3 and shift.scale.dim() > 1)


def _shift_hook(stack: list[Shift]):
    def hook(_, args, out):
        x = args[0]
        for shift in stack:
            h = x @ shift.A.T.to(x.dtype)
            if shift.scale is not None:
                scale = shift.scale.to(h.dtype)
                if scale.dim() == 1:
                    h = h * scale
                elif (packing := active()) is not None:  # [1, T, I]
                    h = h * scale[packing.rows]
                else:  # OPT's MLP sees [N*S, I]
                    h = (h.reshape(len(scale), -1, shift.rank) * scale[:, None]).reshape(h.shape)
            out = _add_product(out, h, shift.B.T.to(h.dtype))
        return out

    return hook
