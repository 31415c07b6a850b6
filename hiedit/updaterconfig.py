"""The low level's configuration: what the shift of each chosen module is made of."""

from __future__ import annotations

from dataclasses import dataclass

from hiedit.checks import at_least, choice

UPDATERS = ("none", "closed_form", "hypernetwork")
SOLVERS = ("outer", "least_squares", "protected")
STEPS = ("gradient", "unit", "relative", "natural")


@dataclass(frozen=True)
class UpdaterConfig:
    """The low level: the shift of each chosen module.

    normalise: ``running`` gives the solver standardised signals (RLEdit, MALMEN, UltraEdit),
    ``none`` raw ones. step: ``gradient`` wants the output change ``-eta G'``; ``relative`` one
    whose longest is ``eta`` times as long as the module's typical output, the median one; ``unit``
    is the same with a mean for the protected solver, and ``gradient`` for the others; ``natural``
    (protected solver only) follows the natural gradient of all modules together, whose changes are
    ``eta`` of a typical output in the root mean square over modules: see updaters/natural.py for
    that and for ``damping`` and ``freedom``.
    average_gradients, average_keys: how far (0 to 1) what the sequences of an edit say at the last
    token of the subject is moved to its mean over them, see updaters/averaging.py; half as far
    after the first ``average_passes`` passes of an edit (null: never).
    trust_region: most that one pass may be expected to cost elsewhere, in nats per token, for each
    token of the edit's answer, because a longer one has more to say (step ``natural``; null: no
    bound): a pass that would cost more is made that much shorter.
    tokens: where keys and gradients are taken: ``answer``, the positions that predict the answer;
    ``all`` up to there; ``subject``, the last token of the subject (found in the prompt where the
    request names none; ``answer`` where none is found). contexts: random texts of the model's own
    before which the edit is made too, and, with ``subject_alone``, behind which the subject alone
    is given the same change. ``auto`` and null leave either to the model's ``Place``.
    clamp: of normalised signals, in standard deviations.
    eps, absorb: of the protection (see updaters/protection.py), fitted on ``preserve`` sentences,
    at the positions that predict their answers or at all up to there (``preserve_tokens``), and on
    ``own_text`` texts that the model writes by itself; ``preserve_subjects``: how much more the
    last tokens of the subjects in them weigh than all tokens together, and ``own_weight`` the same
    of the own texts.
    absorb_in: the modules that protect the keys of an edit once it is committed: those that it
    ``touched``, or ``all``, because later edits that shift others disturb it there.
    lr: of the hypernetwork (Adam); lr_step: of the log step sizes and log ridges.
    phrasing: weight of the keys' scatter between phrasings of one fact in what the protection keeps
    away from, so that a shift rests on what phrasings share (0: none), measured on
    ``phrasing_edits`` training edits.
    """

    kind: str = "closed_form"
    solver: str = "protected"
    normalise: str = "none"
    step: str = "unit"
    tokens: str = "all"
    eta: float = 1.0
    lam: float = 0.1
    clamp: float | None = 8.0
    rank: int = 64
    blocks: int = 2
    per_module: bool = False
    eps: float = 0.02
    absorb: float = 0.05
    absorb_in: str = "touched"
    preserve: int = 1000
    preserve_tokens: str = "answer"
    lr: float = 1e-4
    lr_step: float = 1e-2
    phrasing: float = 0.0
    phrasing_edits: int = 200
    contexts: int | None = 0
    own_text: int = 0
    subject_alone: bool = False
    preserve_subjects: float = 0.0
    damping: float = 0.1
    freedom: float = 1.0
    average_gradients: float = 0.0
    average_keys: float = 0.0
    average_passes: int | None = None
    trust_region: float | None = None
    own_weight: float = 0.0

    @property
    def learned(self) -> bool:
        """Tell whether it has parameters to train."""
        return self.kind == "hypernetwork"

    @property
    def protects(self) -> bool:
        """Tell whether its shifts keep away from the keys of preserved knowledge and earlier
        edits."""
        return self.kind != "none" and self.solver == "protected"

    def __post_init__(self):
        choice("method.updater.kind", self.kind, UPDATERS)
        choice("method.updater.solver", self.solver, SOLVERS)
        choice("method.updater.normalise", self.normalise, ("running", "none"))
        choice("method.updater.step", self.step, STEPS)
        choice("method.updater.tokens", self.tokens, ("answer", "all", "subject", "auto"))
        choice("method.updater.absorb_in", self.absorb_in, ("touched", "all"))
        choice("method.updater.preserve_tokens", self.preserve_tokens, ("answer", "all"))
        for key in ("eta", "lam", "eps", "damping"):
            at_least(f"method.updater.{key}", getattr(self, key), 0, strict=True)
        for key in ("rank", "blocks", "phrasing_edits"):
            at_least(f"method.updater.{key}", getattr(self, key), 1)
        if self.clamp is not None:
            at_least("method.updater.clamp", self.clamp, 0, strict=True)
        if self.contexts is not None:
            at_least("method.updater.contexts", self.contexts, 0)
        for key in (
            "absorb",
            "preserve",
            "lr",
            "lr_step",
            "phrasing",
            "own_text",
            "preserve_subjects",
            "own_weight",
            "freedom",
        ):
            at_least(f"method.updater.{key}", getattr(self, key), 0)
        if self.average_passes is not None:
            at_least("method.updater.average_passes", self.average_passes, 0)
        if self.trust_region is not None:
            at_least("method.updater.trust_region", self.trust_region, 0, strict=True)
        for key in ("average_gradients", "average_keys"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(
                    f"method.updater.{key}={getattr(self, key)!r}: it must lie in [0, 1]"
                )
        if self.step == "natural" and self.solver != "protected":
            raise ValueError(
                f"method.updater.step='natural': the solver {self.solver!r} knows no protected "
                "keys to weigh it against; set method.updater.solver=protected, or step to "
                "relative"
            )
        if self.trust_region is not None and self.step != "natural":
            raise ValueError(
                f"method.updater.trust_region={self.trust_region!r}: what a pass costs is expected "
                "of natural gradients alone; set method.updater.step=natural, or trust_region=null"
            )
        if self.phrasing and self.solver != "protected":
            raise ValueError(
                f"method.updater.phrasing={self.phrasing!r}: it is part of the protection; set "
                "method.updater.solver=protected, or phrasing to 0"
            )
