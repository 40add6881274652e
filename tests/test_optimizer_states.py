"""States of optimizers in the published layout: order of parameters, and checkpoints both ways."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gi_model.checkpoints import CheckpointError, load_run
from gi_model.configs import build_generator
from gi_model.discriminator import Discriminator
from gi_model.errors import InputError
from gi_model.published import parameter_order
from gi_model.training import WarmUpCosine
from gi_model.training.optimizer_states import (
    completed,
    for_published,
    numbered_as_own,
    numbered_as_published,
    schedule_state,
    steps_done,
)

FOLDER = Path(__file__).parent / "golden"
KEYS = json.loads(gzip.decompress((FOLDER / "generator_keys.json.gz").read_bytes()))
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SCHEDULE = WarmUpCosine(warm_up_steps=3, max_decay_steps=10)


def trained(keys: Any) -> list[str]:
    return [key for key in keys if not key.endswith(STATISTICS)]


def published_order(network: nn.Module) -> list[str]:
    names = network.published_names()
    return [names[own][0] for own in parameter_order(network)]


@pytest.mark.parametrize("config", KEYS)
def test_parameters_in_the_published_order(config: str) -> None:
    """Published state dicts, and optimizers, have the order in which modules were made."""
    with torch.device("meta"):
        assert published_order(build_generator(config)) == trained(KEYS[config])


def test_parameters_of_the_discriminator_in_the_published_order() -> None:
    keys = json.loads(str(np.load(FOLDER / "discriminator.npz")["meta"]))["state_dict_ndf64_nlayers4"]
    with torch.device("meta"):
        assert published_order(Discriminator()) == trained(keys)


SMALL = {
    "kind": "two_stream", "width": 4, "blocks": 1, "max_width": 16, "downsamplings": 2, "grid": 2,
    "groups": 2, "heads": 2, "window_heads": 2,
}  # fmt: skip


def stepped(parameters: list[nn.Parameter], names: list[str], steps: int = 2) -> torch.optim.Adam:
    """An optimizer after steps with gradients that tell parameters apart by their names."""
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULE)
    for step in range(steps):
        for parameter, name in zip(parameters, names, strict=True):
            parameter.grad = torch.full_like(parameter, (hash_of(name) % 97 + step) / 97)
        optimizer.step()
        schedule.step()
    return optimizer


def hash_of(name: str) -> int:
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(name))


def test_moments_are_at_the_right_parameters() -> None:
    network = build_generator(SMALL)
    names, own = network.published_names(), dict(network.named_parameters())
    published = {
        names[name][0]: nn.Parameter(own[name].detach().clone()) for name in parameter_order(network)
    }
    ours = stepped(list(own.values()), [names[name][0] for name in own]).state_dict()
    theirs = stepped(list(published.values()), list(published)).state_dict()
    assert [len(s["state"]) for s in (ours, theirs)] == [len(own)] * 2
    numbers = [ours["state"][i]["exp_avg"].flatten()[0].item() for i in range(len(own))]
    assert numbers != sorted(numbers) and len(set(numbers)) > 50

    for made, expected in (
        (numbered_as_own(theirs, network), ours),
        (numbered_as_published(ours, network), theirs),
    ):
        assert made["param_groups"] == expected["param_groups"]
        assert made["state"].keys() == expected["state"].keys()
        for i, state in expected["state"].items():
            assert all(torch.equal(made["state"][i][key], value) for key, value in state.items()), i
    optimizer = torch.optim.Adam(network.parameters())
    optimizer.load_state_dict(numbered_as_own(theirs, network))
    for name, parameter in own.items():
        assert optimizer.state[parameter]["exp_avg"].flatten()[0] == pytest.approx(
            0.1 * (0.9 * (hash_of(names[name][0]) % 97) + hash_of(names[name][0]) % 97 + 1) / 97
        )


def published_checkpoint(path: Path, network: nn.Module) -> None:
    """As the published training writes it: NumPy's numbers, whole numbers of steps, objects of a class."""
    names, own = network.published_names(), dict(network.named_parameters())
    parameters = {
        names[name][0]: nn.Parameter(own[name].detach().clone()) for name in parameter_order(network)
    }
    state = stepped(list(parameters.values()), list(parameters)).state_dict()
    group = state["param_groups"][0]
    kept = ("betas", "eps", "weight_decay", "amsgrad", "initial_lr", "params")
    state["param_groups"] = [{**{key: group[key] for key in kept}, "lr": np.float64(group["lr"])}]
    for moments in state["state"].values():
        moments["step"] = int(moments["step"])
    module = types.ModuleType("omegaconf_of_a_test")
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    try:
        torch.save(
            {
                "epoch": 3,
                "global_step": 2,
                "pytorch-lightning_version": "1.4.0",
                "state_dict": {f"generator.{key}": value.detach() for key, value in parameters.items()},
                "callbacks": {module.DictConfig: 1},
                "optimizer_states": [state],
                "lr_schedulers": [{"base_lrs": [1e-2], "last_epoch": 2, "_last_lr": [np.float64(1)]}],
                "hparams_name": "config",
                "hyper_parameters": module.DictConfig(),
                "hparams_type": module.DictConfig,
            },
            path,
        )
    finally:
        del sys.modules[module.__name__]


def test_a_published_run_goes_on_and_back(tmp_path: Path) -> None:
    network = build_generator(SMALL)
    published_checkpoint(tmp_path / "theirs.ckpt", network)
    run = load_run(tmp_path / "theirs.ckpt")
    assert (run["epoch"], run["global_step"], steps_done(run)) == (3, 2, 2)
    assert "lr" not in run["optimizer_states"][0]["param_groups"][0]  # not read: an object of a class
    own = completed(numbered_as_own(run["optimizer_states"][0], network), SCHEDULE, 2)
    names = network.published_names()
    expected = stepped(list(network.parameters()), [names[name][0] for name, _ in network.named_parameters()])
    optimizer = torch.optim.Adam(network.parameters(), lr=5)
    ours = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULE)
    optimizer.load_state_dict(own)
    ours.load_state_dict(schedule_state(own, SCHEDULE, 2))
    assert optimizer.param_groups[0]["lr"] == ours.get_last_lr()[0] == 1e-2 * SCHEDULE(2)
    for parameter in network.parameters():
        for key, value in expected.state[parameter].items():
            assert torch.equal(optimizer.state[parameter][key], value)

    torch.save(for_published(run), tmp_path / "back.ckpt")
    back = load_run(tmp_path / "back.ckpt")
    states = back["optimizer_states"][0]["state"]
    assert all(type(of_one["step"]) is int for of_one in states.values())
    for number, of_one in run["optimizer_states"][0]["state"].items():
        assert torch.equal(states[number]["exp_avg_sq"], of_one["exp_avg_sq"])


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    network = build_generator(SMALL)
    good = numbered_as_published(torch.optim.Adam(network.parameters()).state_dict(), network)
    with pytest.raises(InputError, match="expected states of Adam with one group"):
        numbered_as_own({"state": {}, "param_groups": []}, network)
    with pytest.raises(InputError, match="parameters of Discriminator, got"):
        numbered_as_own(good, Discriminator())
    wrong = {"step": 1, "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    with pytest.raises(
        InputError, match=r"encoder.0.conv.weight: exp_avg: expected \[4, 4, 7, 7\], got \[1\]"
    ):
        numbered_as_own({**good, "state": {0: wrong}}, network)
    torch.save({"state_dict": {"generator.a": torch.zeros(1)}}, tmp_path / "weights.ckpt")
    with pytest.raises(CheckpointError, match="without epoch, global_step, optimizer_states, lr_schedulers"):
        load_run(tmp_path / "weights.ckpt")


def test_states_made_to_cost_much(tmp_path: Path) -> None:
    """Lists that stand in lists many times, and one that holds itself."""
    laughs: list[Any] = [1]
    for _ in range(5):
        laughs = [laughs] * 1000
    endless: list[Any] = []
    endless.append(endless)
    whole = {"state_dict": {}, "epoch": 0, "global_step": 0, "lr_schedulers": [], "optimizer_states": endless}
    torch.save(whole | {"state_dict": {"a": torch.zeros(1)}}, tmp_path / "endless.ckpt")
    assert load_run(tmp_path / "endless.ckpt")["state_dict"]["a"] == 0
    torch.save(whole | {"optimizer_states": laughs}, tmp_path / "laughs.ckpt")
    with pytest.raises(CheckpointError, match="describes too many values"):
        load_run(tmp_path / "laughs.ckpt")
