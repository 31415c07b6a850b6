"""What every rank of a sharded model does in the tests; started by the deepspeed launcher.

    deepspeed --num_accelerators 2 tests/sharded_checks.py OUT.json SCRATCH [CHECK ...]

Rank 0 also holds the model unsharded, compares, and writes what it found; nothing is asserted
here. The number of ranks is the launcher's; names of checks may follow, for those alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hiedit.config import TrainConfig  # noqa: E402
from hiedit.methods import build_method  # noqa: E402
from hiedit.rl.checkpoint import Checkpoints  # noqa: E402
from hiedit.rl.learner import Learner  # noqa: E402
from hiedit.rl.objective import Objective  # noqa: E402
from hiedit.rl.segment import train_edit  # noqa: E402
from hiedit.runconfig import ModelConfig  # noqa: E402
from hiedit.sharded.loading import load_sharded  # noqa: E402
from hiedit.sharded.modules import span  # noqa: E402
from hiedit.sharded.ranks import join  # noqa: E402
from hiedit.sharded.saving import export_sharded_adapter, gathered, save_sharded  # noqa: E402
from hiedit.sharded.split import SplitObjective  # noqa: E402
from hiedit.sharded.traffic import counted, least  # noqa: E402
from hiedit.sharded.training import ShardedTrainer, SharedCheckpoints  # noqa: E402
from hiedit.types import EditBatch, Shift  # noqa: E402
from hiedit.world import world_requests, world_stream  # noqa: E402
from hiedit.world.preserve import preservation_pairs  # noqa: E402
from tests.sharded_programs import CPU, edit_command, same, trained, unsharded  # noqa: E402
from tests.worlds import MODULES, quick  # noqa: E402


def far(one: dict, other: dict) -> float:
    """The largest distance of tensors by name over the largest of their norms (a part that cancels
    to almost nothing has no relative error to speak of); infinite where names differ."""
    if list(one) != list(other) or not one:
        return float("inf")
    largest = max(float(t.norm()) for t in other.values())
    return max(float((one[n] - other[n]).norm()) for n in one) / max(largest, 1e-12)


def one_training_edit(parts, objective, learner, batch) -> dict:
    """Everything that a training edit computes, by kind and name."""
    seen: dict[str, dict[str, torch.Tensor]] = {"signals": {}, "shifts": {}, "masks": {}}
    inner = parts.rollout.updater.forward

    def watched(signals, mask, **options):
        n = len(seen["masks"])
        seen["signals"] |= {f"{n}.k.{k}": v for k, v in signals.keys.items()}
        seen["signals"] |= {f"{n}.g.{k}": v for k, v in signals.grads.items()}
        seen["masks"][str(n)] = mask.detach().clone()
        shifts = inner(signals, mask, **options)
        seen["shifts"] |= {f"{n}.A.{k}": v.A.detach() for k, v in shifts.items()}
        seen["shifts"] |= {f"{n}.B.{k}": v.B.detach() for k, v in shifts.items()}
        return shifts

    parts.rollout.updater.forward = watched
    step = train_edit(parts.rollout, objective, learner.backward, batch)
    del parts.rollout.updater.forward
    seen["gradients"] = {n: g.clone() for n, g in learner.take()[0].items()}
    values = [step.loss, step.paraphrase, step.locality, step.size]
    seen["losses"] = {"all": torch.tensor(values, dtype=torch.float64)}
    return seen


def equality(ranks, sharded, local) -> dict:
    """The same training edits both ways; distances by kind, and how large the numbers are."""
    requests = world_requests("train", seed=0)[:12]
    pairs, _ = preservation_pairs(seed=0)
    method = quick("hiedit")
    found: dict = {}
    recorded = []
    for backbone in (sharded, local):
        if backbone is None:
            continue
        parts = build_method(backbone, method, requests, pairs, seed=0)
        tokenizer = backbone.tokenizer
        if backbone is sharded:
            objective = SplitObjective(method.objective, tokenizer, ranks)
        else:
            objective = Objective(method.objective, tokenizer)
        learner = Learner(parts.rollout.selector, parts.rollout.updater, 1.0, 1)
        steps = [
            one_training_edit(parts, objective, learner, EditBatch((r,), i))
            for i, r in enumerate(requests[:2])
        ]
        recorded.append(steps)
        parts.rollout.reset()
    if len(recorded) == 2:
        for kind in recorded[0][0]:
            found[kind] = max(far(a[kind], b[kind]) for a, b in zip(*recorded, strict=True))
        found["gradient_norm"] = float(sum(g.norm() for g in recorded[1][-1]["gradients"].values()))
        found["parameters"] = len(recorded[1][-1]["gradients"])
    return found


def twenty_edits(ranks, sharded, local, scratch: Path) -> dict:
    """Sequential edits both ways: bits of every weight; then save, export and reset."""
    requests = world_stream("test", 20, seed=0)
    pairs, _ = preservation_pairs(seed=0)
    method = quick("ultraedit")
    method = dataclasses.replace(quick("closed-form"), passes=method.passes)
    # At the answer's tokens: at the subject's, one process alone computes what stands before it
    # once an edit, and its later passes are not those of the whole prompt to the last bit.
    place = dataclasses.replace(method.updater, tokens="answer", contexts=0, own_text=0)
    method = dataclasses.replace(method, updater=place)
    before = gathered(sharded)
    parts = build_method(sharded, method, (), pairs, seed=0)
    committed = []
    for i, request in enumerate(requests):
        committed.append(parts.rollout.step(EditBatch((request,), i)).shifts)
    after = gathered(sharded)
    whole = parts.rollout.env.state.accumulated()
    growth = parts.rollout.env.state.growth()
    save_sharded(scratch / "merged", sharded, max_shard_bytes=2 << 20)
    export_sharded_adapter(scratch / "adapter", sharded, committed)
    with parts.rollout.env.state.base_weights():
        inside = gathered(sharded)
    again = gathered(sharded)
    parts.rollout.reset()
    reset = gathered(sharded)
    if not ranks.main:
        return {}
    twin = build_method(local, method, (), pairs, seed=0)
    for i, request in enumerate(requests):
        twin.rollout.step(EditBatch((request,), i))
    expected = {n: p.detach().clone() for n, p in local.model.named_parameters()}
    state = twin.rollout.env.state
    found = {
        "changed": sum(not torch.equal(before[n], after[n]) for n in before),
        "weights": same(after, expected),
        "accumulators": same(whole, {n: a for n, a in state.acc.items() if bool(a.any())}),
        "growth": max(abs(growth[n] / g - 1) for n, g in state.growth().items()),
        "base_weights": same(inside, before) and same(again, after),
        "reset": same(reset, before),
    }
    twin.rollout.reset()
    found["saved"] = written(scratch, after, before)
    return found


def written(scratch: Path, after: dict, before: dict) -> dict:
    """The checkpoint and the adapter on disk, against the weights that were gathered."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    parts = sorted((scratch / "merged").glob("model-*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(scratch / "merged")
    factors = load_file(scratch / "adapter" / "adapter_model.safetensors")
    distance = 0.0
    for name in [n for n in before if not torch.equal(before[n], after[n])]:
        stem = "base_model.model." + name.removesuffix(".weight")
        delta = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
        change = after[name] - before[name]
        distance = max(distance, float((delta - change).norm() / after[name].norm()))
    return {
        "files": len(parts),
        "largest": max(p.stat().st_size for p in parts[:-1]),
        "tensor": max(t.numel() * t.element_size() for t in after.values()) + 200,  # header
        "merged": same({n: p.detach() for n, p in loaded.named_parameters()}, after),
        "adapter": distance,
    }


def loading(ranks, sharded) -> dict:
    """Bytes that this rank read of the checkpoint, and its part of the model."""
    part = sum(
        p.ds_tensor.ds_numel * p.ds_tensor.element_size() for p in sharded.model.parameters()
    )
    return {"read": sharded.read_bytes, "part": part}


def odd_shapes(ranks, scratch: Path) -> dict:
    """Weights that no number of ranks divides, transposed ones, and half precision."""
    from tests.models import tiny_model, tiny_tokenizer

    found = {}
    cases = (("llama", torch.bfloat16, {"intermediate_size": 77, "hidden_size": 33, "head_dim": 8,
                                        "num_attention_heads": 3, "num_key_value_heads": 3}),
             ("gpt2", torch.float32, {"n_inner": 81, "n_embd": 33, "n_head": 3}))  # fmt: skip
    for name, dtype, sizes in cases:
        place = scratch / f"{name}-base"
        if ranks.main:
            model = tiny_model(name, **sizes).to(dtype)
            model.save_pretrained(place, max_shard_size="20KB")
            tiny_tokenizer().save_pretrained(place)
        ranks.barrier()
        pattern = {
            "llama": ["model.layers.{1-2}.mlp.gate_proj"],
            "gpt2": ["transformer.h.{1-2}.mlp.c_fc"],
        }
        config = ModelConfig(name, str(place), pattern[name], str(dtype)[6:], "cpu")
        sharded = load_sharded(config, ranks)
        from hiedit.rl.environment import Environment

        env, generator = Environment(sharded), torch.Generator().manual_seed(3)
        twin = Environment(unsharded(config)) if ranks.main else None
        for _ in range(7):
            shifts = {
                n: Shift(torch.randn(3, m.in_features, generator=generator),
                         torch.randn(m.out_features, 3, generator=generator) * 0.01)
                for n, m in sharded.modules.items()
            }  # fmt: skip
            for e in (env, twin):
                if e is not None:
                    e.state.commit(shifts)
        after = gathered(sharded)
        whole = env.state.accumulated()
        env.state.rebuild(list(whole), (), start=whole)
        rebuilt = gathered(sharded)
        spans = [span(m.weight) for m in sharded.modules.values()]
        if ranks.main:
            expected = {n: p.detach() for n, p in twin.backbone.model.named_parameters()}
            numel = sharded.modules[sharded.names[0]].weight.ds_numel
            found[name] = {
                "weights": same(after, expected),
                "rebuilt": same(rebuilt, expected),
                "divides": numel % 4 == 0,
                "span": spans[0],
            }
    return found


def resume(ranks, sharded, scratch: Path) -> dict:
    """Training that stops half way and goes on, beside training that does not."""
    requests = world_requests("train", seed=0)[:12]
    pairs, _ = preservation_pairs(seed=0)
    method = quick("hiedit")
    train = TrainConfig(edits=2, stream_lengths=[2], steps_per_update=1)

    def run(config, checkpoints=None):
        parts = build_method(sharded, method, requests, pairs, seed=0)
        trainer = ShardedTrainer(parts, config, ranks)
        history = trainer.run(requests, config, 0, checkpoints=checkpoints)
        return trainer.learner.published(), len(history)

    def checkpoints(resume: bool):
        plain = Checkpoints(scratch / "checkpoints", every=1, keep=9, identity={}, resume=resume)
        return SharedCheckpoints.of(plain, ranks)

    straight, _ = run(train, checkpoints(False))
    if ranks.main:  # as if the run had died after one edit
        import shutil

        shutil.rmtree(scratch / "checkpoints" / "edits-00000002")
    ranks.barrier()
    resumed, edits = run(train, checkpoints(True))
    return {"same": same(straight, resumed), "edits": edits, "tensors": len(straight)}


def traffic(ranks, sharded) -> dict:
    """Bytes of one training edit, and the least for the passes that it made."""
    requests = world_requests("train", seed=0)[:12]
    pairs, _ = preservation_pairs(seed=0)
    method = quick("hiedit")
    parts = build_method(sharded, method, requests, pairs, seed=0)
    trainer = ShardedTrainer(parts, TrainConfig(edits=4), ranks)
    trainer.edit(EditBatch((requests[0],), 0))
    calls = {"forward": 0, "backward": 0}
    handle = sharded.model.register_forward_hook(
        lambda *_: calls.update(forward=calls["forward"] + 1)
    )
    inner = torch.autograd.grad

    def grad(*a, **k):
        calls["backward"] += 1
        return inner(*a, **k)

    backward = trainer.learner.backward

    def learned(loss):
        calls["backward"] += 1
        backward(loss)

    trainer.learner.backward, torch.autograd.grad = learned, grad
    with counted(sharded) as sent:
        trainer.edit(EditBatch((requests[1],), 1))
    torch.autograd.grad = inner
    handle.remove()
    parts.rollout.reset()
    return {
        "sent": sent,
        "least": least(sharded, **{f"{k}s": v for k, v in calls.items()}),
        **calls,
    }


def main(out: Path, scratch: Path, *only: str) -> None:
    torch.set_num_threads(1)
    ranks = join(timeout=120)
    config = ModelConfig(modules=MODULES, **CPU)
    sharded = load_sharded(config, ranks) if set(only) != {"odd_shapes"} else None
    local = unsharded(config) if ranks.main and sharded else None
    found, clock = {"world": ranks.world, "seconds": {}}, time.perf_counter
    for name, check in (
        ("equality", lambda: equality(ranks, sharded, local)),
        ("twenty_edits", lambda: twenty_edits(ranks, sharded, local, scratch)),
        ("odd_shapes", lambda: odd_shapes(ranks, scratch)),
        ("loading", lambda: loading(ranks, sharded)),
        ("resume", lambda: resume(ranks, sharded, scratch)),
        ("traffic", lambda: traffic(ranks, sharded)),
        ("trained", lambda: trained(ranks, scratch)),
        ("edit_command", lambda: edit_command(ranks, scratch)),
    ):
        if only and name not in only:
            continue
        began = clock()
        found[name] = check()
        ranks.barrier()
        found["seconds"][name] = round(clock() - began, 1)
        if ranks.main:
            print(name, found["seconds"][name], json.dumps(found[name]), flush=True)
    if ranks.main:
        found["saved"] = found.get("twenty_edits", {}).pop("saved", None)
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    given = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(Path(given[0]), Path(given[1]), *given[2:])
