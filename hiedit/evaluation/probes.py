"""Causal tracing: through which layers does the model say what it says (Meng et al. 2022, ROME)?

The subject's embeddings are corrupted with noise, one layer's MLP output is put back to what it
was in the clean run, at the subject's tokens or at the prompt's last one, and the answer's
probability is watched. All runs of one edit are rows of one batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hiedit.backbone.model import Backbone
from hiedit.data.tokens import encode
from hiedit.types import EditRequest, TokenBatch

PLACES = ("subject", "last")  # the tokens at which an output is restored


@torch.no_grad()
def causal_tracing(
    backbone: Backbone,
    requests: Sequence[EditRequest],
    samples: int = 5,
    noise: float = 3.0,
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
) -> Tensor:
    """[E, L, 2]: the indirect effect of the MLP that each editable module belongs to, at
    ``PLACES``: by how much restoring its output raises the probability of the first token of the
    answer that the model knows (``old_target``), mean over ``samples`` of noise.

    noise: standard deviation of what is added to the subject's embeddings, in units of that of all
    embeddings (the publication takes 3). NaN rows for a request whose subject does not stand in
    its prompt, or that has no old answer. The model is asked as it is, edits included.
    """
    generator = torch.Generator().manual_seed(seed)
    owners = {name: name.rpartition(".")[0] for name in backbone.names}
    mlps = list(dict.fromkeys(owners.values()))
    rows = []
    for request in requests:
        found = _trace(backbone, request, mlps, samples, noise, generator)
        if found is None:
            found = torch.full((len(mlps), len(PLACES)), float("nan"))
        rows.append(torch.stack([found[mlps.index(owners[name])] for name in backbone.names]))
        done()
    return torch.stack(rows) if rows else torch.zeros(0, len(backbone.names), len(PLACES))


def _trace(backbone, request, mlps, samples, noise, generator) -> Tensor | None:
    """[number of MLPs, 2] for one request."""
    if not request.subject or not request.old_target:
        return None
    batch = encode(backbone.tokenizer, [(request.prompt, request.old_target)])
    subject = subject_tokens(backbone.tokenizer, request, batch)
    if not subject:
        return None
    first = int((batch.labels[0] != -100).nonzero()[0])  # of the answer
    answer = int(batch.ids[0, first])
    places = (subject, [first - 1])
    # Row 0 is the clean run; each sample then has its corrupted run and one per MLP and place.
    runs = 1 + len(mlps) * len(places)
    ids = batch.ids[:, :first].expand(1 + samples * runs, -1).to(backbone.device)
    weight = backbone.model.get_input_embeddings().weight
    size = noise * float(weight.float().std())
    drawn = size * torch.randn(samples, len(subject), weight.shape[1], generator=generator)
    drawn = drawn.repeat_interleave(runs, 0).to(weight)

    def corrupt(_, __, out):
        out = out.clone()
        out[1:, subject] += drawn
        return out

    def restore(index: int):
        def hook(_, __, out):
            wide = out.reshape(len(ids), -1, out.shape[-1]).clone()  # OPT's MLP is flat
            for place, tokens in enumerate(places):
                start = 2 + index * len(places) + place
                wide[start::runs, tokens] = wide[0, tokens]
            return wide.view(out.shape)

        return hook

    hooks = {backbone.model.get_input_embeddings(): corrupt}
    hooks |= {backbone.model.get_submodule(mlp): restore(i) for i, mlp in enumerate(mlps)}
    with _hooked(hooks):
        logits = backbone.model(input_ids=ids, use_cache=False).logits[:, -1]
    said = logits.float().softmax(-1)[1:, answer].view(samples, runs).mean(0).cpu()
    return (said[1:] - said[0]).view(len(mlps), len(places))


@contextlib.contextmanager
def _hooked(hooks: dict) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def subject_tokens(tokenizer, request: EditRequest, batch: TokenBatch) -> list[int]:
    """Positions in the one sequence of ``batch`` of the tokens that hold any of the subject; empty
    where it does not stand in the prompt."""
    at = request.prompt.find(request.subject)
    if at < 0:
        return []
    text = f"{request.prompt} {request.old_target}"
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    front = batch.ids.shape[1] - len(spans["input_ids"])
    end = at + len(request.subject)
    return [
        front + i
        for i, (low, high) in enumerate(spans["offset_mapping"])
        if low < end and high > at
    ]
