"""A model by name where no hub answers: told at once, or read from the cache without asking."""

from __future__ import annotations

import time

import pytest
from commands import call, mistake
from huggingface_hub import constants
from rays import free_ports

from hiedit import hub


@pytest.fixture
def silent(monkeypatch):
    """Online as far as the settings say, and nobody listens at the hub's address."""
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    return endpoint


def test_a_plan_by_name_says_what_is_missing(silent):
    began = time.monotonic()
    result = call("plan", "--model", "llama-3-70b")
    assert time.monotonic() - began < 10
    name = "model.path='meta-llama/Meta-Llama-3-70B'"
    mistake(result, name, silent, "give a directory", "config.json", "online")
    assert "Retrying" not in result.stderr


def test_a_model_in_the_cache_is_not_asked_for_again(silent, monkeypatch):
    found = {"org/model": "/cache/config.json"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: found[name])
    hub.check_hub("org/model")
    assert constants.HF_HUB_OFFLINE is True


def test_a_directory_and_a_hub_that_answers_are_left_alone(silent, tmp_path, monkeypatch):
    hub.check_hub(str(tmp_path))
    monkeypatch.setattr(hub, "answers", lambda endpoint: True)
    hub.check_hub("org/model")
    assert constants.HF_HUB_OFFLINE is False
