"""A few edits of a stream in words, and a few prompts that have nothing to do with it, before and
after."""

from __future__ import annotations

from collections.abc import Sequence

from hiedit.backbone.model import Backbone
from hiedit.evaluation.metrics import generate
from hiedit.evaluation.results import Example, Said
from hiedit.evaluation.stream import StreamProbe


class Examples:
    """``count`` requests of the probe's stream, spread over it. Build it while the model is
    unedited; ``found`` then asks the model as it is."""

    def __init__(self, probe: StreamProbe, count: int):
        self._probe = probe
        stride = max(1, len(probe.requests) // count) if count else 1
        self._chosen = list(range(0, len(probe.requests), stride))[:count]
        owners = [n.owner for n in probe.neighbours]
        firsts = {i: owners.index(i) for i in self._chosen if i in owners}
        self._near = {i: probe.neighbours[k] for i, k in firsts.items()}
        self._before = self._said()

    def found(self) -> tuple[Example, ...]:
        """Return what the model says now beside what it said, and whether that is as wanted."""
        after = self._said()
        near = list(self._near)
        agrees = self._probe.agrees([self._near[i] for i in near])
        kept = dict(zip(near, agrees, strict=True))
        examples = []
        for index in self._chosen:
            request = self._probe.requests[index]
            held = request.heldout[0] if request.heldout else None
            aside = self._near[index].pair[0] if index in self._near else None
            examples.append(
                Example(
                    prompt=request.prompt,
                    old=request.old_target,
                    target=request.target,
                    before=self._before[request.prompt],
                    after=after[request.prompt],
                    heldout_prompt=held,
                    heldout_after=after.get(held),
                    locality_prompt=aside,
                    locality_before=self._before.get(aside),
                    locality_after=after.get(aside),
                    locality_kept=kept.get(index),
                )
            )
        return tuple(examples)

    def _said(self) -> dict[str, str]:
        """The model's greedy answer to every prompt of the examples."""
        requests = [self._probe.requests[i] for i in self._chosen]
        prompts = [p for r in requests for p in (r.prompt, *r.heldout[:1])]
        prompts += [n.pair[0] for n in self._near.values()]
        prompts = list(dict.fromkeys(prompts))
        said = generate(self._probe.backbone, prompts, batch=self._probe.batch)
        return dict(zip(prompts, said, strict=True))


class Everyday:
    """``prompts`` asked of the unedited model, when it is built, and by ``found`` as it is then."""

    def __init__(self, backbone: Backbone, prompts: Sequence[str]):
        self._backbone, self._prompts = backbone, tuple(prompts)
        self._before = generate(backbone, self._prompts)

    def found(self) -> tuple[Said, ...]:
        after = generate(self._backbone, self._prompts)
        rows = zip(self._prompts, self._before, after, strict=True)
        return tuple(Said(prompt, before, now) for prompt, before, now in rows)
