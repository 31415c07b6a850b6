"""Configurations: every YAML composes, and every mistake names its key, value and remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from hiedit.catalogue import choices, config_dir, load_method
from hiedit.config import (
    EvaluateConfig,
    MethodConfig,
    ObjectiveConfig,
    PassesConfig,
    SelectorConfig,
    TrainConfig,
    UpdaterConfig,
    from_mapping,
)
from hiedit.runconfig import DatasetConfig, ModelConfig, RunConfig

compose = pytest.importorskip("hiedit.compose").compose
GROUPS = {group: choices(group) for group in ("method", "model", "dataset")}
NEEDS_PATH = {"dataset": ["dataset.path=records.json"], "model": ["model.path=some/model"]}


@pytest.fixture(autouse=True)
def hydra():
    return pytest.importorskip("hydra", reason="composing needs hydra")


def test_there_are_choices():
    assert {"hiedit", "ultraedit", "rledit", "no-edit", "random"} <= set(GROUPS["method"])
    assert all("world" in GROUPS[group] for group in ("model", "dataset"))


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, names in GROUPS.items() for name in names]
)
def test_every_choice_composes(group, name):
    needs = NEEDS_PATH.get(group, []) if name not in ("world",) else []
    if group == "model" and name != "custom":
        needs = []
    config = compose([f"{group}={name}", *needs])
    assert getattr(config, group).name == name
    assert config.run_dir == (
        f"runs/{config.method.name}-{config.model.name}-{config.dataset.name}-seed0"
    )


@pytest.mark.parametrize("name", GROUPS["method"])
def test_a_method_is_the_same_as_plain_yaml_and_through_hydra(name):
    assert load_method(name) == compose([f"method={name}"]).method
    assert load_method(config_dir() / "method" / f"{name}.yaml") == load_method(name)


@pytest.mark.parametrize("name", GROUPS["method"])
def test_methods_name_themselves_and_survive_the_way_to_json_and_back(name):
    method = load_method(name)
    assert method.name == name
    assert from_mapping(MethodConfig, dataclasses.asdict(method)) == method


def test_a_method_of_ones_own_builds_on_a_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [hiedit, _self_]\nname: mine\nselector: {features: [gain], k: 3}\n"
    )
    (tmp_path / "below.yaml").write_text("name: below\ndefaults: [_self_, mine]\n")
    mine, hiedit = load_method(tmp_path / "mine.yaml"), load_method("hiedit")
    selector = dataclasses.replace(hiedit.selector, features=["gain"], k=3)
    assert mine == dataclasses.replace(hiedit, name="mine", selector=selector)
    assert load_method(tmp_path / "below.yaml") == mine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults: [nothing]", "default 'nothing' is neither beside it nor one of _hiedit, "),
        ("defaults: hiedit", "defaults='hiedit': it must be a list of names"),
        ("defaults: []", "must be a list of names"),
        ("defaults: [one, _self_]", r"in a circle \(one.yaml -> one.yaml\)"),
        ("defaults: [hiedit]\nselector: {kinds: all}", "kinds"),
    ],
)
def test_defaults_that_are_none_are_named(tmp_path, text, said):
    (tmp_path / "one.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_method(tmp_path / "one.yaml")


def test_parts_of_methods_are_no_methods():
    with pytest.raises(ValueError, match="_hiedit"):
        load_method("_hiedit")
    with pytest.raises(ValueError, match="method=_hiedit: valid are best-static"):
        compose(["method=_hiedit"])


def test_hydras_defaults_are_those_of_the_dataclasses():
    plain = RunConfig()
    config = compose([])
    for part in ("stream", "train", "evaluate", "tracking", "seed", "threads"):
        assert getattr(config, part) == getattr(plain, part)


def test_overrides_reach_their_place():
    config = compose(
        [
            "method=hiedit",
            "method.selector.k=5",
            "method.updater.clamp=null",
            "method.updater.eta=2",
            "train.stream_lengths=[3,4]",
            "stream.length=null",
            "model.modules=['model.layers.{2-3}.mlp.up_proj']",
            "seed=7",
        ]
    )
    assert config.method.selector.k == 5 and config.method.updater.clamp is None
    assert config.method.updater.eta == 2.0 and isinstance(config.method.updater.eta, float)
    assert config.train.stream_lengths == [3, 4] and config.stream.length is None
    assert config.model.modules == ["model.layers.{2-3}.mlp.up_proj"]
    assert config.run_dir.endswith("-seed7")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method=hiedt", ["method=hiedt", "ultraedit", "did you mean 'hiedit'"]),
        ("model=qwen2.5-7", ["model=qwen2.5-7", "did you mean 'qwen2.5-7b'"]),
        ("dataset=zsrae", ["dataset=zsrae", "did you mean 'zsre'"]),
        ("experiment=best", ["experiment=best"]),
        ("stream.lenght=3", ["stream.lenght=3", "did you mean stream.length"]),
        ("+stream.lenght=3", ["stream.lenght=3", "did you mean 'length'"]),
        ("method.selector.kk=3", ["method.selector.kk=3", "did you mean method.selector.k"]),
        ("sed=1", ["sed=1", "did you mean seed"]),
        ("stream.length=abc", ["stream.length='abc'", "int or null"]),
        ("stream.length=1.5", ["stream.length=1.5", "int or null"]),
        ("stream.length=true", ["stream.length=True", "int or null"]),
        ("stream.length=0", ["stream.length=0", ">= 1"]),
        ("stream=3", ["stream=3", "n_edits"]),
        ("method.selector=policy", ["method.selector='policy'", "a group of keys (kind, k"]),
        ("train.stream_lengths=5", ["train.stream_lengths=5", "list"]),
        ("train.stream_lengths=[1,a]", ["train.stream_lengths[1]='a'", "int"]),
        ("train.stream_lengths=[]", ["train.stream_lengths=[]", "at least one"]),
        ("model.dtype=fp16", ["model.dtype='fp16'", "float16", "bfloat16"]),
        ("tracking.mode=wandb", ["tracking.mode='wandb'", "auto, mlflow, off"]),
        ("model.path=''", ["model.path is empty", "'world'"]),
        ("dataset=zsre", ["dataset.path is empty", "dataset=zsre"]),
        ("run_dir=''", ["run_dir=''"]),
        ("seed=-1", ["seed=-1", ">= 0"]),
        ("threads=-1", ["threads=-1", ">= 0"]),
        ("stream.length", ["stream.length"]),
        ("model.modules=[a", ["[a"]),
        ("method=null", ["string"]),
    ],
)
def test_mistakes_in_overrides(override, parts):
    with pytest.raises(ValueError) as caught:
        compose([override])
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_hydra_key_is_not_blamed_for_the_mistake_of_another():
    with pytest.raises(ValueError, match="^foo=2: no such key"):
        compose(["hydra.run.dir=x", "foo=2"])


@pytest.mark.parametrize(
    ("cls", "values", "expected"),
    [
        (SelectorConfig, {"kind": "polcy"}, "selector.kind='polcy'.*did you mean 'policy'"),
        (SelectorConfig, {"init": "ones"}, "init='ones': valid are zero, effects, gain"),
        (SelectorConfig, {"estimator": "reinforce"}, "selector.estimator='reinforce': valid are"),
        (SelectorConfig, {"baseline": "mean"}, "selector.baseline='mean': valid are self_critical"),
        (SelectorConfig, {"credit": "sort"}, "selector.credit='sort': valid are regress, rank"),
        (SelectorConfig, {"samples": 1}, "selector.samples=1: it must be >= 2"),
        (SelectorConfig, {"entropy_floor": 1.1}, r"entropy_floor=1.1: it must lie in \[0, 1\]"),
        (SelectorConfig, {"kind": "static_frequency"}, "selector.source=None.*trained editor"),
        (SelectorConfig, {"kind": "shuffled", "every_pass": True}, "every_pass=True.*false"),
        (ObjectiveConfig, {"c_pass": 1, "prompt": False}, "c_pass=1.0.*prompt=true"),
        (SelectorConfig, {"k": 0}, "selector.k=0: it must be >= 1"),
        (SelectorConfig, {"temperature": 0}, "selector.temperature=0.0: it must be > 0"),
        (SelectorConfig, {"lr": -1e-3}, "selector.lr=-0.001: it must be >= 0"),
        (UpdaterConfig, {"kind": "hypernet"}, "updater.kind='hypernet'.*'hypernetwork'"),
        (UpdaterConfig, {"solver": "lstsq"}, "updater.solver='lstsq': valid are outer"),
        (UpdaterConfig, {"normalise": "z"}, "updater.normalise='z'"),
        (UpdaterConfig, {"step": "units"}, "updater.step='units'.*did you mean 'unit'"),
        (UpdaterConfig, {"tokens": "last"}, "updater.tokens='last'"),
        (UpdaterConfig, {"eta": 0}, "updater.eta=0.0: it must be > 0"),
        (UpdaterConfig, {"eta": float("nan")}, "updater.eta=nan: it must be > 0"),
        (UpdaterConfig, {"lam": -1}, "updater.lam=-1.0"),
        (UpdaterConfig, {"rank": 0}, "updater.rank=0: it must be >= 1"),
        (UpdaterConfig, {"clamp": 0}, "updater.clamp=0.0: it must be > 0"),
        (UpdaterConfig, {"lr": -1}, "updater.lr=-1.0: it must be >= 0"),
        (ObjectiveConfig, {"kind": "episode"}, "objective.kind='episode'"),
        (ObjectiveConfig, {"reference": "first"}, "objective.reference='first'"),
        (ObjectiveConfig, {"gamma": 0}, r"objective.gamma=0.0: it must lie in \(0, 1\]"),
        (ObjectiveConfig, {"back_depth": -1}, "objective.back_depth=-1"),
        (PassesConfig, {"max": 0}, "passes.max=0"),
        (PassesConfig, {"target_probability": 1.5}, "passes.target_probability=1.5"),
        (PassesConfig, {"undo": 1}, r"undo=1 \(int\): it must be bool"),
        (TrainConfig, {"edits": -1}, "train.edits=-1"),
        (TrainConfig, {"clip": 0}, "train.clip=0.0: it must be > 0"),
        (TrainConfig, {"stream_lengths": [5, 0]}, "train.stream_lengths="),
        (EvaluateConfig, {"points": 0}, "evaluate.points=0"),
        (EvaluateConfig, {"retention_share": 0}, "evaluate.retention_share=0.0"),
        (MethodConfig, {"objective": {"kind": "edit"}}, "objective.kind='edit'.*nothing to learn"),
        (MethodConfig, {"selector": {"kind": "policy"}}, "objective.kind='none'.*learned part"),
        (MethodConfig, {"selector": None}, "selector=None: it must be a group"),
        (MethodConfig, {"updator": {}}, "updator={}: no such key; did you mean 'updater'"),
        (MethodConfig, {3: 4}, "3=4: no such key"),
        (MethodConfig, ["hiedit"], "it must be a group of keys"),
        (DatasetConfig, {"path": ""}, "dataset.path is empty"),
        (ModelConfig, {"modules": "all"}, r"modules='all' \(str\): it must be list or null"),
        (ModelConfig, {"modules": [1]}, r"modules\[0\]=1 \(int\): it must be str"),
        (ModelConfig, {"trust_remote_code": "yes"}, "trust_remote_code='yes'"),
    ],
)
def test_wrong_values_name_key_value_and_remedy(cls, values, expected):
    with pytest.raises(ValueError, match=expected):
        from_mapping(cls, values)


def test_from_mapping_types():
    assert from_mapping(MethodConfig, None) == MethodConfig()
    assert from_mapping(SelectorConfig, {"k": None, "modules": None}) == SelectorConfig()
    assert from_mapping(SelectorConfig, {"modules": ("a", "b")}).modules == ["a", "b"]
    for value in (2, 2.0):
        eta = from_mapping(UpdaterConfig, {"eta": value}).eta
        assert eta == 2.0 and type(eta) is float
    assert type(from_mapping(UpdaterConfig, {"clamp": 3}).clamp) is float
    for key in ("k", "hidden"):
        with pytest.raises(ValueError, match=f"{key}=True .bool.: it must be int"):
            from_mapping(SelectorConfig, {key: True})
        with pytest.raises(ValueError, match=f"{key}=2.0 .float.: it must be int"):
            from_mapping(SelectorConfig, {key: 2.0})
    with pytest.raises(ValueError, match=r"eta=True \(bool\): it must be float"):
        from_mapping(UpdaterConfig, {"eta": True})
    # YAML 1.1 reads 1e-3 as text; whoever writes it so must be told, not given another number
    with pytest.raises(ValueError, match="eta='1e-3'"):
        from_mapping(UpdaterConfig, yaml.safe_load("eta: 1e-3"))
    with pytest.raises(ValueError, match="method.updater.eta='x'"):
        from_mapping(MethodConfig, {"updater": {"eta": "x"}}, "method")


def test_load_method_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="method='hiedt'.*did you mean 'hiedit'"):
        load_method("hiedt")
    with pytest.raises(ValueError, match="nothing.yaml'.*no such file"):
        load_method(tmp_path / "nothing.yaml")
    with pytest.raises(ValueError, match="neither a YAML file nor a trained editor"):
        load_method(tmp_path)
    for text, expected in (
        ("selector: {kind: all", "mine.yaml'.*no YAML"),
        ("- a\n- b", "it must be a group of keys"),
        ("selector: all", "method.selector='all': it must be a group"),
        ("updater: {solvr: outer}", "method.updater.solvr='outer'.*did you mean 'solver'"),
    ):
        Path(tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=expected):
            load_method(tmp_path / "mine.yaml")
    Path(tmp_path / "mine.yaml").write_text("name: mine\nselector: {kind: top_norm, k: 2}\n")
    assert load_method(tmp_path / "mine.yaml").selector == SelectorConfig("top_norm", 2)
