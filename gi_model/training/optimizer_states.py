"""States of optimizers and schedules as published checkpoints hold them, both ways.

An optimizer numbers the parameters of its network, and a published one does so in the order in which the
published network has them. All checkpoints of this training have the published numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gi_model.errors import InputError
from gi_model.published import parameter_order

State = dict[str, Any]

#: What PyTorch 1.9 keeps for a group of parameters.
GROUP = ("lr", "betas", "eps", "weight_decay", "amsgrad", "initial_lr", "params")


def numbered_as_published(state: Mapping[str, Any], network: nn.Module) -> State:
    """``optimizer.state_dict()`` of an optimizer of all of ``network`` with the published numbers."""
    own = {name: i for i, (name, _) in enumerate(network.named_parameters())}
    order = [own[name] for name in parameter_order(network)]
    states = {number: state["state"][i] for number, i in enumerate(order) if i in state["state"]}
    return {"state": states, "param_groups": _groups(state, len(order))}


def numbered_as_own(state: Mapping[str, Any], network: nn.Module) -> State:
    """The inverse of :func:`numbered_as_published`.

    Raises:
        InputError: not a state of an optimizer of these parameters.
    """
    parameters = dict(network.named_parameters())
    own = {name: i for i, name in enumerate(parameters)}
    order = parameter_order(network)
    given, groups = state.get("state"), state.get("param_groups")
    if not isinstance(given, dict) or not isinstance(groups, list) or len(groups) != 1:
        raise InputError("optimizer_states: expected states of Adam with one group of parameters")
    count = len(groups[0].get("params") or ())
    if count != len(order):
        raise InputError(
            f"optimizer_states: expected {len(order)} parameters of {type(network).__name__}, got {count}"
        )
    states = {}
    for number, name in enumerate(order):
        if number in given:
            states[own[name]] = _checked(given[number], parameters[name], name)
    return {"state": states, "param_groups": _groups(state, count)}


def completed(state: Mapping[str, Any], schedule: Callable[[int], float], steps: int) -> State:
    """``state`` with the learning rates that follow from ``schedule``.

    Published ones are NumPy's numbers, which are objects of a class and not read.
    """
    groups = []
    for group in state["param_groups"]:
        initial = group.get("initial_lr", group.get("lr"))
        if not isinstance(initial, float):
            raise InputError("optimizer_states: expected a group of parameters with its initial_lr, got none")
        groups.append({**group, "initial_lr": initial, "lr": initial * schedule(steps)})
    return {**state, "param_groups": groups}


def schedule_state(state: Mapping[str, Any], schedule: Callable[[int], float], steps: int) -> State:
    """The state of a ``LambdaLR`` for the optimizer of ``state`` after so many steps."""
    rates = [group["initial_lr"] for group in state["param_groups"]]
    return {
        "base_lrs": rates,
        "last_epoch": steps,
        "_step_count": steps + 1,
        "_get_lr_called_within_step": False,
        "_last_lr": [rate * schedule(steps) for rate in rates],
        "lr_lambdas": [None] * len(rates),  # what the schedule is, is said by the configuration
    }


def steps_done(run: Mapping[str, Any]) -> int:
    """How often the optimizers of a checkpoint have stepped."""
    for state in run["lr_schedulers"]:
        if isinstance(state, Mapping) and type(state.get("last_epoch")) is int:
            return state["last_epoch"]
    return run["global_step"]


def for_published(run: Mapping[str, Any]) -> State:
    """What ``load_run`` returns as a checkpoint that the published training goes on from.

    Its library, PyTorch 1.9 with Lightning 1.4, counts steps in plain numbers and has fewer options.
    """
    states = []
    for state in run["optimizer_states"]:
        moments = {
            number: {key: int(value) if key == "step" else value for key, value in of_one.items()}
            for number, of_one in state["state"].items()
        }
        count = len(state["param_groups"][0]["params"])
        groups = [{key: g[key] for key in GROUP if key in g} for g in _groups(state, count)]
        states.append({"state": moments, "param_groups": groups})
    schedules = [{"verbose": False, **state, "lr_lambdas": [None]} for state in run["lr_schedulers"]]
    known = ("base_lrs", "last_epoch", "_step_count", "verbose", "_get_lr_called_within_step", "_last_lr")
    return {
        "epoch": run["epoch"],
        "global_step": steps_done(run),
        "pytorch-lightning_version": "1.4.0",
        "state_dict": dict(run["state_dict"]),
        "callbacks": {},
        "optimizer_states": states,
        "lr_schedulers": [
            {key: state[key] for key in (*known, "lr_lambdas") if key in state} for state in schedules
        ],
    }


def _groups(state: Mapping[str, Any], count: int) -> list[State]:
    """The groups, of which there is one; betas are a pair, as PyTorch has them."""
    pairs = (
        {"betas": tuple(group["betas"])} if group.get("betas") else {} for group in state["param_groups"]
    )
    numbers = list(range(count))
    return [{**g, **pair, "params": numbers} for g, pair in zip(state["param_groups"], pairs, strict=True)]


def _checked(state: Any, parameter: nn.Parameter, name: str) -> State:
    """The state of one parameter; its count of steps as a tensor."""
    moments = ("exp_avg", "exp_avg_sq")
    if not isinstance(state, Mapping) or not {"step", *moments} <= set(state):
        raise InputError(f"optimizer_states: {name}: expected step, exp_avg and exp_avg_sq")
    for key in moments:
        if not isinstance(state[key], torch.Tensor) or state[key].shape != parameter.shape:
            raise InputError(
                f"optimizer_states: {name}: {key}: expected {list(parameter.shape)}, got {_shape(state[key])}"
            )
    return {**state, "step": torch.as_tensor(float(state["step"]), dtype=torch.float32)}


def _shape(value: Any) -> Sequence[int] | str:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
