"""Typed configuration. A method is a composition of these in YAML, not a class.

Every dataclass checks its own values when it is built, so that a wrong one stops a run before any
model is loaded. Components take their own sub-config, never the root.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hiedit.checks import at_least, choice
from hiedit.checks import from_mapping as from_mapping  # what builds these from YAML
from hiedit.updaterconfig import UpdaterConfig as UpdaterConfig

SELECTORS = (
    "all", "random", "static", "static_frequency", "best_subset", "gain", "top_norm", "shuffled",
    "policy",
)  # fmt: skip
LEARNED_SELECTORS = ("policy", "shuffled")
FEATURES = ("fullness", "collision", "gain", "cost")
ESTIMATORS = ("straight_through", "plackett_luce", "bernoulli", "counterfactual")
BASELINES = ("self_critical", "leave_one_out")
OBJECTIVES = ("none", "edit", "trajectory")


@dataclass(frozen=True)
class SelectorConfig:
    """The high level: which modules an edit touches.

    kind: ``all``; ``random``; ``static``; ``static_frequency`` (the ``k`` modules that the trained
    policy in the directory ``source`` chose most often); ``best_subset`` (the best fixed ``k``
    found on training edits); ``gain`` (first-order gain over root energy, the ``k`` largest);
    ``top_norm``; ``policy``; ``shuffled`` (a policy, trained as one, that edits with the mask it
    chose for the edit before).
    k: how many (None: half of them). modules: the set of ``static`` (None: found by single-module
    effects on training edits). hidden: width of the policy's encoder. temperature: of the
    straight-through relaxation. init: where the policy's logits start, ``effects`` (single-module
    effects on training edits), ``gain`` (log of what ``kind: gain`` ranks by, from
    features ``gain`` and ``cost``) or ``zero``. init_scale: of ``effects``. lr: of the policy
    (Adam). size_in_gate: whether the size penalty may move the gate (the published policy is
    trained by nothing else). effect_edits: how many training edits the effects are measured on.
    every_pass: choose anew at every pass of an edit, instead of once per edit.
    estimator: of the policy's gradient. ``straight_through`` differentiates the executed top k;
    ``plackett_luce`` and ``bernoulli`` (which learns how many) draw ``samples`` masks and score
    them on the true objective; ``counterfactual`` fits the logits to the scores of ``samples``
    uniform masks (``credit``: ``regress`` or ``rank``), of all masks where there are no more.
    credit_over: what a drawn mask is scored by, one more ``pass`` of the edit, or the whole
    ``option``: as many passes as it would take by itself. A trained policy edits with its mode.
    baseline: of the scores, ``self_critical`` or ``leave_one_out``. entropy_floor: in [0, 1],
    relative to a policy that knows nothing; entropy_weight: of falling below it (nats).
    sparsity: reward of ``bernoulli`` for every module left out (nats).
    features: what the policy sees of every module beside keys and gradients: ``fullness`` (of
    earlier edits), ``collision`` (of the edit's keys with protected ones), first-order ``gain`` of
    its shift, and the shift's ``cost``.
    """

    kind: str = "all"
    k: int | None = None
    modules: list[str] | None = None
    source: str | None = None
    hidden: int = 256
    temperature: float = 1.0
    init: str = "zero"
    init_scale: float = 1.0
    lr: float = 1e-3
    size_in_gate: bool = True
    effect_edits: int = 48
    every_pass: bool = False
    estimator: str = "straight_through"
    samples: int = 8
    baseline: str = "leave_one_out"
    entropy_floor: float = 0.0
    entropy_weight: float = 1.0
    sparsity: float = 0.0
    credit: str = "regress"
    credit_over: str = "pass"
    features: list[str] = field(default_factory=list)

    def __post_init__(self):
        choice("method.selector.kind", self.kind, SELECTORS)
        for feature in self.features:
            choice("method.selector.features", feature, FEATURES)
        if self.features and (not self.learned or len(set(self.features)) < len(self.features)):
            raise ValueError(
                f"method.selector.features={self.features!r}: each once, and only for a policy "
                f"(method.selector.kind={self.kind!r}; valid: {', '.join(LEARNED_SELECTORS)})"
            )
        choice("method.selector.init", self.init, ("zero", "effects", "gain"))
        if self.init == "gain" and not {"gain", "cost"} <= set(self.features):
            wanted = f"add 'gain' and 'cost' to method.selector.features={self.features!r}"
            raise ValueError(f"method.selector.init={self.init!r}: {wanted}")
        if self.k is not None:
            at_least("method.selector.k", self.k, 1)
        at_least("method.selector.temperature", self.temperature, 0, strict=True)
        at_least("method.selector.hidden", self.hidden, 1)
        for key in ("init_scale", "lr", "effect_edits"):
            at_least(f"method.selector.{key}", getattr(self, key), 0)
        self._check_estimator()
        if self.kind == "static_frequency" and not self.source:
            raise ValueError(
                f"method.selector.source={self.source!r}: kind='static_frequency' needs the "
                "directory of a trained editor with a policy (RUN_DIR/editors/...)"
            )
        if self.kind == "shuffled" and self.every_pass:
            raise ValueError(
                f"method.selector.every_pass={self.every_pass!r}: kind='shuffled' takes the mask "
                "of the edit before, not of the pass before; set it to false"
            )

    def _check_estimator(self):
        choice("method.selector.estimator", self.estimator, ESTIMATORS)
        choice("method.selector.baseline", self.baseline, BASELINES)
        choice("method.selector.credit", self.credit, ("regress", "rank"))
        choice("method.selector.credit_over", self.credit_over, ("pass", "option"))
        alone = self.baseline == "self_critical" and self.estimator != "counterfactual"
        at_least("method.selector.samples", self.samples, 1 if alone else 2)
        for key in ("entropy_weight", "sparsity"):
            at_least(f"method.selector.{key}", getattr(self, key), 0)
        if not 0 <= self.entropy_floor <= 1:
            raise ValueError(
                f"method.selector.entropy_floor={self.entropy_floor!r}: it must lie in [0, 1]"
            )

    @property
    def learned(self) -> bool:
        return self.kind in LEARNED_SELECTORS


@dataclass(frozen=True)
class Place:
    """The place where edits act on one model, for methods that leave it to the model.

    tokens, contexts: as in ``UpdaterConfig``.
    """

    tokens: str = "subject"
    contexts: int = 5

    def fill(self, config: MethodConfig) -> MethodConfig:
        """``config`` with what it left to the model."""
        updater = config.updater
        tokens = self.tokens if updater.tokens == "auto" else updater.tokens
        contexts = self.contexts if updater.contexts is None else updater.contexts
        if (tokens, contexts) == (updater.tokens, updater.contexts):
            return config
        return replace(config, updater=replace(updater, tokens=tokens, contexts=contexts))


@dataclass(frozen=True)
class ObjectiveConfig:
    """The negative reward. ``edit`` looks at the current edit alone, ``trajectory`` also at the
    last ``back_depth`` ones, decayed by ``gamma`` per step of age.

    paraphrases, locality: prompts per current edit; earlier edits bring one of each. prompt:
    whether the edit's own prompt counts beside its paraphrases (the publications leave it out).
    reference: locality is measured against the model ``before`` the step or the ``base`` model.
    c_loc: weight of the KL (per nat). c_reg: of the plain squared norm. rho: of the energy.
    at_once: sequences of the reward in one forward and backward pass (0: all of them); fewer hold
    fewer activations, for the same gradient up to the order of sums.
    c_pass: of a pass after which the edit does not hold yet, so that another one is needed (nats);
    it has no gradient, so it matters to estimators that score masks.
    """

    kind: str = "none"
    back_depth: int = 10
    gamma: float = 0.95
    paraphrases: int = 2
    locality: int = 2
    prompt: bool = True
    reference: str = "before"
    c_loc: float = 1.0
    c_reg: float = 0.0
    rho: float = 0.0
    at_once: int = 0
    c_pass: float = 0.0

    def __post_init__(self):
        choice("method.objective.kind", self.kind, OBJECTIVES)
        choice("method.objective.reference", self.reference, ("before", "base"))
        weights = ("c_loc", "c_reg", "rho", "c_pass")
        for key in ("back_depth", "paraphrases", "locality", "at_once", *weights):
            at_least(f"method.objective.{key}", getattr(self, key), 0)
        if not 0 < self.gamma <= 1:
            raise ValueError(f"method.objective.gamma={self.gamma!r}: it must lie in (0, 1]")
        if self.c_pass and not self.prompt:
            raise ValueError(
                f"method.objective.c_pass={self.c_pass!r}: whether an edit holds is seen on its "
                "own prompt; set method.objective.prompt=true"
            )


@dataclass(frozen=True)
class PassesConfig:
    """Several passes per edit: capture, choose, shift again, until the smallest answer-token
    probability exceeds ``target_probability`` or ``max`` is reached; ``undo`` drops a pass that
    raised the loss.

    preserved: prompts that the base model answers, asked with every edit (not in training): the
    smallest probability in their answers has to exceed ``preserved_probability`` as well.
    rehearsed: the same with earlier edits in effect. screened: so many of each are drawn, and those
    that the model is least sure of are asked (0: no more are drawn than are asked).
    """

    max: int = 1
    target_probability: float = 0.5
    undo: bool = True
    preserved: int = 0
    preserved_probability: float = 0.5
    rehearsed: int = 0
    screened: int = 0

    def __post_init__(self):
        at_least("method.passes.max", self.max, 1)
        for key in ("preserved", "rehearsed", "screened"):
            at_least(f"method.passes.{key}", getattr(self, key), 0)
        for key in ("target_probability", "preserved_probability"):
            value = getattr(self, key)
            if not 0 < value <= 1:
                raise ValueError(f"method.passes.{key}={value!r}: it must lie in (0, 1]")


@dataclass(frozen=True)
class MethodConfig:
    """A method: selector + updater + objective + passes."""

    name: str = "closed-form"
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    updater: UpdaterConfig = field(default_factory=UpdaterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    passes: PassesConfig = field(default_factory=PassesConfig)

    @property
    def trains(self) -> bool:
        """Tell whether there is something to train before the first edit."""
        return self.objective.kind != "none"

    def __post_init__(self):
        learns = self.updater.learned or self.selector.learned
        if self.trains and not learns:
            raise ValueError(
                f"method.objective.kind={self.objective.kind!r}: {self.name!r} has nothing to "
                "learn (no hypernetwork, no policy); set it to 'none'"
            )
        if "collision" in self.selector.features and not self.updater.protects:
            raise ValueError(
                f"method.selector.features={self.selector.features!r}: 'collision' is with "
                "protected keys; set method.updater.solver=protected, or leave it out"
            )
        if {"gain", "cost"} & set(self.selector.features) and self.updater.kind == "none":
            raise ValueError(
                f"method.selector.features={self.selector.features!r}: 'gain' and 'cost' are of "
                "an updater's shifts, and method.updater.kind='none' has none; leave them out"
            )
        if learns and not self.trains:
            raise ValueError(
                f"method.objective.kind='none': {self.name!r} has a learned part; "
                "set it to 'edit' or 'trajectory'"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Training: ``edits`` in all, in streams whose lengths grow through ``stream_lengths`` (the
    last one repeats); the learner steps every ``steps_per_update`` edits.

    n_edits: edits per step of the stream. clip: gradient norm. max_seconds: 0 is no limit.
    """

    edits: int = 300
    stream_lengths: list[int] = field(default_factory=lambda: [20, 50, 100, 200])
    steps_per_update: int = 1
    n_edits: int = 1
    clip: float = 1.0
    max_seconds: float = 0.0

    def __post_init__(self):
        for key in ("edits", "max_seconds"):
            at_least(f"train.{key}", getattr(self, key), 0)
        at_least("train.clip", self.clip, 0, strict=True)
        for key in ("steps_per_update", "n_edits"):
            at_least(f"train.{key}", getattr(self, key), 1)
        if not self.stream_lengths or min(self.stream_lengths) < 1:
            raise ValueError(
                f"train.stream_lengths={self.stream_lengths!r}: give at least one length >= 1"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Measuring: at ``points`` moments of the stream; retention looks at the earliest
    ``retention_share`` of the edits; ``batch`` sequences a forward pass. immediate: also ask about
    every edit once it is made. neutral: a file of texts for the perplexity; null: our own. guard:
    keep the default bounds (null: where the model is a real one). everyday: prompts that have
    nothing to do with the edits, asked before the stream and after it, for people to read."""

    points: int = 5
    retention_share: float = 0.25
    batch: int = 128
    examples: int = 3
    immediate: bool = False
    neutral: str | None = None
    guard: bool | None = None
    everyday: list[str] = field(default_factory=list)

    def __post_init__(self):
        for key, least in (("points", 1), ("batch", 1), ("examples", 0)):
            at_least(f"evaluate.{key}", getattr(self, key), least)
        if not 0 < self.retention_share <= 1:
            raise ValueError(
                f"evaluate.retention_share={self.retention_share!r}: it must lie in (0, 1]"
            )
