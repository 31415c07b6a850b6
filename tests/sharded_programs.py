"""The programs of ``launch/`` for sharded models, run by every rank of ``sharded_checks.py``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from hiedit.backbone.model import Backbone
from hiedit.editor import Editor
from hiedit.experiment import load_backbone
from hiedit.ledger import Ledger
from hiedit.methods import build_method, save_editor
from hiedit.runconfig import ModelConfig
from hiedit.sharded.editing import ShardedEditor
from hiedit.sharded.saving import gathered
from hiedit.types import EditRequest
from hiedit.world import world_requests, world_stream
from hiedit.world.preserve import preservation_pairs
from launch.edit_sharded import main as edit_sharded
from launch.train_sharded import main as train_sharded
from tests.worlds import MODULES, quick

CPU = {"dtype": "float32", "device": "cpu"}


def same(one: dict, other: dict) -> bool:
    """Same names and bits."""
    return sorted(one) == sorted(other) and all(torch.equal(one[n], other[n]) for n in one)


def unsharded(config: ModelConfig) -> Backbone:
    """Without the cache below the lowest editable module, which sums in another order."""
    loaded = load_backbone(config)
    return Backbone(loaded.model, loaded.tokenizer, config.modules, prefix_bytes=0)


def trained(ranks, scratch: Path) -> dict:
    """A run from its configuration to the table, by the program that the launcher starts."""
    modules = "[model.layers.3.mlp.gate_proj,model.layers.4.mlp.gate_proj]"
    status = train_sharded(
        ["model=world", "method=hiedit", "stream.length=2", "train.edits=2",
         f"model.modules={modules}", "method.selector.k=1", "evaluate.examples=0",
         "method.selector.effect_edits=2", "method.updater.preserve=40",
         "method.updater.rank=8", "method.passes.max=2", "evaluate.points=1",
         "evaluate.batch=32", "tracking.mode=off", f"run_dir={scratch / 'run'}"]
    )  # fmt: skip
    rows = json.loads((scratch / "run" / "results.json").read_text()) if ranks.main else []
    editor = scratch / "run" / "editors" / "hiedit"
    return {
        "status": status,
        "rows": rows["results"] if isinstance(rows, dict) else rows,
        "editor": sorted(p.name for p in editor.iterdir()) if ranks.main else [],
    }


def edit_command(ranks, scratch: Path) -> dict:
    """`hiedit edit` over the ranks, its ledger opened again over the ranks, and the same edits by
    an editor in one process: what is on disk, and all weights at the end."""
    config = ModelConfig(modules=MODULES, **CPU)
    requests = world_stream("test", 4, seed=0)
    policy, rows = scratch / "policy", scratch / "edits.jsonl"
    options = dict(policy=policy, modules=MODULES, dtype="float32", device="cpu")
    if ranks.main:
        train = world_requests("train", seed=0)[:12]
        pairs, _ = preservation_pairs(seed=0)
        save_editor(build_method(unsharded(config), quick("hiedit"), train, pairs), policy)
        given = [{"prompt": r.prompt, "target": r.target} for r in requests]
        rows.write_text("".join(json.dumps(row) + "\n" for row in given[:2]))
    ranks.barrier()
    arguments = ["--model", "world", "--input", rows, "--ledger", scratch / "ledger",
                 "--policy", policy, "--dtype", "float32", "--timeout", 120]  # fmt: skip
    arguments += [a for pattern in MODULES for a in ("--modules", pattern)]
    status = edit_sharded(list(map(str, arguments)))
    rest = [EditRequest(r.prompt, r.target) for r in requests[1:]]
    with ShardedEditor.over(ranks, "world", ledger=scratch / "ledger", **options) as editor:
        told = [done.status for done in editor.apply(rest)]
        weights = gathered(editor._env.backbone)
    if not ranks.main:
        return {}
    alone = Editor.from_pretrained("world", ledger=scratch / "alone", loader=unsharded, **options)
    with alone:
        ids = alone.edit([EditRequest(r.prompt, r.target) for r in requests[:2]])
    alone = Editor.from_pretrained("world", ledger=scratch / "alone", loader=unsharded, **options)
    with alone:
        ids += alone.edit(rest)
        expected = {n: p.detach() for n, p in alone.model.named_parameters()}
    parts = [
        [p.read_bytes() for p in sorted((scratch / name / "segments").iterdir())]
        for name in ("ledger", "alone")
    ]
    with Ledger.read(scratch / "ledger") as reader:
        sound, history = reader.verify().ok, [r.status for r in reader.history()]
    return {"status": status, "told": told, "ids": ids, "weights": same(weights, expected),
            "factors": [_after_header(p) for p in parts[0]] == [_after_header(p) for p in parts[1]],
            "segments": len(parts[0]), "verified": sound, "history": history}  # fmt: skip


def _after_header(data: bytes) -> str:
    """Of a safetensors file, a digest of all but its header, which has a random identity."""
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
