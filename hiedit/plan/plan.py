"""The bytes of a run by place, whether they fit, and the cheapest change that makes them fit.

With ``R`` ranks (one a device) ZeRO-3 keeps ``1/R`` of the weights on each device, or, offloaded,
on its host; so is the ledger, whose commits write to those shards. The learner and what it looks
at are the same on every rank. The reward's sequences are split over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hiedit.checks import at_least
from hiedit.config import MethodConfig
from hiedit.experiment import check_modules, model_path
from hiedit.plan.shapes import Shape, protection_bytes, step_bytes
from hiedit.runconfig import ModelConfig

GIB = 1 << 30
SPARE = 0.05  # of a device or a host is left for fragments of the allocator
# Measured, per process: Python, torch, transformers and DeepSpeed on the host, and on a GPU the
# context with its kernels and the communication buffers.
RUNTIME_HOST, RUNTIME_DEVICE = int(0.7 * GIB), int(1.0 * GIB)
WORDS = 19  # tokens of one sequence of the reward
ANSWER = 3  # of them, those of the answer


@dataclass(frozen=True)
class Facts:
    """Facts of a model that the plan needs; from its config alone.

    parameters: elements, tied ones once. largest: elements of the largest weight. first: the lowest
    editable layer. editable: (I, O) of every editable module.
    """

    name: str
    parameters: int
    largest: int
    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    first: int
    editable: tuple[tuple[int, int], ...]
    bytes: int


@dataclass(frozen=True)
class Machines:
    """devices: in all, one rank each. memory: bytes of one. hosts: that they are on. host_memory:
    bytes of one. gpu: whether devices have memory of their own; else a device is a process that
    shares the host's. offload: shards in the hosts' memory."""

    devices: int = 1
    memory: int = 80 * GIB
    hosts: int = 1
    host_memory: int = 1024 * GIB
    gpu: bool = True
    offload: bool = False

    def __post_init__(self):
        for key in ("devices", "hosts"):
            at_least(f"--{key}", getattr(self, key), 1)
        for key, value in (("memory", self.memory), ("host-memory", self.host_memory)):
            at_least(f"--{key}", value, 0, strict=True)
        if self.devices % self.hosts:
            raise ValueError(
                f"--devices={self.devices}: it does not divide over --hosts={self.hosts}"
            )


@dataclass(frozen=True)
class Plan:
    """Bytes by part. device: of each. host: of each, of all its ranks together.

    need_device, need_host: at the peak, with what is spare. change: what was changed in
    words to make it fit, empty for the plan as asked for.
    """

    machines: Machines
    back_depth: int
    rank: int
    dtype_bytes: int
    device: dict[str, int]
    host: dict[str, int]
    change: str = ""

    @property
    def need_device(self) -> int:
        return _peak(self.device)

    @property
    def need_host(self) -> int:
        return _peak(self.host)

    @property
    def fits(self) -> bool:
        m = self.machines
        device = self.need_device * (1 + SPARE) <= m.memory or not m.gpu
        return device and self.need_host * (1 + SPARE) <= m.host_memory


TRANSIENT = ("protection, being fitted", "step: activations", "step: factors", "step: logits")


def _peak(parts: dict[str, int]) -> int:
    """Return what stays, and the larger of fitting the protection and of a step."""
    stays = sum(v for k, v in parts.items() if k not in TRANSIENT)
    fitting = parts.get(TRANSIENT[0], 0)
    return stays + max(fitting, sum(parts.get(k, 0) for k in TRANSIENT[1:]))


def facts_of(config: ModelConfig) -> Facts:
    """Read facts from ``config.json`` alone: tensors without storage.

    Raises:
        ValueError: if the path holds no model, or a module is unknown.
    """
    import re

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hiedit.backbone.modules import resolve_modules

    check_modules(config)
    trust = config.trust_remote_code
    architecture = AutoConfig.from_pretrained(model_path(config.path), trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=trust)
    modules = resolve_modules(model, config.modules)
    sizes = [p.numel() for p in model.parameters()]
    layer = re.compile(r"\.(\d+)\.")
    places = [int(m[1]) for name in modules if (m := layer.search(name))]
    c = architecture.get_text_config()
    dtype = config.dtype if config.dtype != "auto" else str(c.dtype or torch.float32)
    heads = c.num_attention_heads
    hidden = c.hidden_size
    widest = max(o for _, o in (m.shape for m in modules.values()))
    inner = next(
        (v for k in ("intermediate_size", "ffn_dim", "n_inner") if (v := getattr(c, k, None))),
        widest,
    )
    return Facts(
        config.name, sum(sizes), max(sizes), hidden, inner, c.num_hidden_layers, c.vocab_size,
        heads, getattr(c, "num_key_value_heads", None) or heads, min(places, default=0),
        tuple(m.shape for m in modules.values()),
        torch.finfo(getattr(torch, dtype.removeprefix("torch."))).bits // 8,
    )  # fmt: skip


def plan(facts: Facts, method: MethodConfig, machines: Machines, **seen: int) -> Plan:
    """Return what is where.

    seen: tokens, answers and edit_tokens of the reward and the edit, where they are known.
    """
    m, ranks = machines, machines.devices
    shape = _shape(facts, method, m.gpu, ranks, **seen)
    parts = step_bytes(shape)
    learned = method.trains
    shard = -(-facts.parameters * facts.bytes // ranks)
    ledger = sum(i * o for i, o in facts.editable) * (4 + facts.bytes) // ranks
    protects = method.updater.protects
    curved = [o for _, o in facts.editable] if method.updater.step == "natural" else ()
    kept, fitted = (
        protection_bytes([i for i, _ in facts.editable], bool(method.updater.phrasing), curved)
        if protects
        else (0, 0)
    )
    device = {
        "gathered layer": 2 * facts.largest * facts.bytes if ranks > 1 or m.offload else 0,
        "learner": parts["learner"] if learned else 0,
        "protection": kept,
        "protection, being fitted": fitted,
        "step: activations": parts["activations"],
        "step: factors": parts["factors"],
        "step: logits": parts["logits"],
        "runtime": RUNTIME_DEVICE if m.gpu else 0,
    }
    shards = {"weights (shard)": shard, "ledger (shard)": ledger}
    local = ranks // m.hosts
    host = {"runtime": RUNTIME_HOST * local}
    if m.gpu and not m.offload:
        device = shards | device
        host["loading (one tensor's rows)"] = local * 2 * facts.largest * facts.bytes // ranks
    elif m.gpu:
        host = {k: v * local for k, v in shards.items()} | host
        host["gather buffers"] = local * facts.largest * facts.bytes
    else:
        device = shards | device
        host = {k: v * local for k, v in device.items() if v} | host
    return Plan(
        m, method.objective.back_depth, method.updater.rank, facts.bytes,
        {k: v for k, v in device.items() if v}, {k: v for k, v in host.items() if v},
    )  # fmt: skip


def cheapest(facts: Facts, method: MethodConfig, machines: Machines) -> Plan | None:
    """The first plan that fits, from the change that costs least to the one that costs most;
    None if none does."""
    for change, f, how, m in _changes(facts, method, machines):
        found = replace(plan(f, how, m), change=change)
        if found.fits:
            return found
    return None


def _changes(facts, method, machines) -> Iterator[tuple]:
    """(in words, facts, method, machines): the same results first, then slower, then other ones,
    then more hardware."""
    yield "", facts, method, machines
    half = replace(facts, bytes=2)
    if facts.bytes > 2:
        yield "model.dtype=bfloat16", half, method, machines
    offloaded = replace(machines, offload=True)
    if machines.gpu and not machines.offload:
        words = "distribution.deepspeed=zero3-offload (weights on the hosts; slower)"
        yield words, facts, method, offloaded
    for depth in (5, 2, 0):
        if method.objective.kind == "trajectory" and depth < method.objective.back_depth:
            shallow = replace(method, objective=replace(method.objective, back_depth=depth))
            yield f"method.objective.back_depth={depth}", facts, shallow, machines
            if machines.gpu:
                words = f"zero3-offload and method.objective.back_depth={depth}"
                yield words, facts, shallow, offloaded
    if method.updater.learned and method.updater.rank > 64:
        narrow = replace(method, updater=replace(method.updater, rank=64))
        yield "method.updater.rank=64", facts, narrow, machines
    count = machines.devices
    per_host = max(1, machines.devices // machines.hosts)
    for _ in range(8):
        count *= 2
        hosts = max(machines.hosts, math.ceil(count / max(per_host, 8)))
        more = replace(machines, devices=count, hosts=hosts if count % hosts == 0 else count)
        yield f"{count} devices (on {more.hosts} hosts)", facts, method, more
        if machines.gpu:
            words = f"{count} devices (on {more.hosts} hosts) with zero3-offload"
            yield words, facts, method, replace(more, offload=True)


def _shape(facts: Facts, method: MethodConfig, gpu: bool, ranks: int, **seen: int) -> Shape:
    o, updater = method.objective, method.updater
    depth = o.back_depth if o.kind == "trajectory" else 0
    sequences = o.paraphrases + o.locality + int(o.prompt) + 2 * depth
    mine = -(-sequences // ranks)
    if o.kind == "none":  # nothing is rewarded: the edit itself, its signals
        mine = 1
    edit = {"edit_tokens": ANSWER if updater.tokens == "answer" else WORDS}
    tokens = {"tokens": max(mine, 1) * WORDS, "answers": max(mine, 1) * ANSWER}
    if "tokens" in seen:
        seen = seen | {k: -(-seen[k] // ranks) for k in ("tokens", "answers")}
    return Shape(
        facts.hidden, facts.intermediate, facts.layers, facts.vocab, facts.first, facts.heads,
        facts.kv_heads, len(facts.editable), facts.bytes, updater.rank,
        updater.blocks if updater.learned else 0,
        method.selector.hidden if method.selector.kind == "policy" else 0,
        fused=not gpu and facts.bytes == 4, **(tokens | edit | seen),
    )  # fmt: skip
