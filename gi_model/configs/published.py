"""The published configurations' own words: where things are in the tree, and what they are called here.

Only tables and look-ups: a string from a configuration selects an entry or is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gi_model.errors import InputError
from gi_model.published import nearest

GENERATORS = {
    "gi.modules.gi.lama_guided.GIResNetGenerator": "two_stream",
    "gi.modules.gi.lama_guided_ffc.FFCResNetGenerator": "lama",
    "gi.modules.gi.lama_guided_baseline.TrafoResNetGenerator": "transformer",
}

#: All other classes that published files name.
TARGETS = (
    *GENERATORS,
    "gi.models.inpainting.lama_guided.DefaultInpaintingTrainingModule",
    "gi.modules.warp.raft.RAFT",
    "gi.modules.warp.raft.Identity",
    "gi.lr_scheduler.LambdaWarmUpCosineScheduler",
    "gi.main.DataModuleFromConfig",
    "gi.data.inpainting_lama_multiframe.LamaGI",
    "gi.data.inpainting_lama_multiframe.LamaGIValidation",
)

#: ``kind`` by the section it is in.
OTHER_KINDS = {
    "training_model": ("default",),
    "adversarial": ("r1",),
    "generator": tuple(GENERATORS),
    "discriminator": ("pix2pixhd_nlayer",),
    "visualizer": ("directory", "noop"),
    "evaluator": ("default",),
}
OPTIMIZERS = ("adam", "adamw")

#: Known keys of the tree; where None stands, others read on.
SECTIONS: dict[str, Any] = {
    "model": {
        "base_learning_rate": None,
        "target": None,
        "params": {
            **dict.fromkeys(
                (
                    "monitor", "visualize_attn", "visualize_each_iters", "concat_mask",
                    "store_discr_outputs_for_vis", "use_ddp", "validation_keys", "ckpt_path", "ignore_keys",
                    "predict_only", "average_generator", "generator_avg_beta",
                    "average_generator_start_step", "average_generator_period", "fake_fakes_proba",
                    "fake_fakes_generator_kwargs", "rescale_scheduler_kwargs", "const_area_crop_kwargs",
                    "add_noise_kwargs",
                )
            ),
            "flow_cfg": None,
            "scheduler_config": None,
            "config": dict.fromkeys(
                (
                    "training_model", "losses", "optimizers", "visualizer", "generator", "discriminator",
                    "location", "evaluator", "data",
                )
            ),
        },
    },
    "data": None,
    "lightning": None,
}  # fmt: skip

#: Key of a generator section -> (our argument, or None where only one value is supported; published default).
SIZES: dict[str, tuple[str | None, Any]] = {
    "input_nc": ("in_channels", 4),
    "output_nc": ("out_channels", 3),
    "ngf": ("width", 64),
    "n_downsampling": ("downsamplings", 3),
    "max_features": ("max_width", 1024),
    "n_blocks": ("blocks", 9),
}
CROSSING: dict[str, tuple[str | None, Any]] = {
    **SIZES,
    "n_cross": ("crossed", 1000),
    "is_crossattending": ("attends", False),
    "num_heads": ("heads", 8),
}
KEYS: dict[str, dict[str, tuple[str | None, Any]]] = {
    "two_stream": {
        **CROSSING,
        "block_type": ("refine", "conv"),
        "is_deformable": ("aggregates", False),
        "num_latents_sqrt": ("grid", 16),
        "num_groups": ("groups", 4),
        "read_write_heads": ("window_heads", 8),
    },
    "lama": SIZES,
    "transformer": CROSSING,
}

#: Values that are the only ones supported; where None stands, the key says nothing for this kind.
FIXED: dict[str, dict[str, Any]] = {
    "two_stream": {"pre_lama": 0, "post_lama": 0, "padding_type": "reflect", "add_out_act": "sigmoid"},
    "lama": {
        "padding_type": "reflect", "add_out_act": "sigmoid", "is_deformable": None, "n_cross": None,
        "is_crossattending": None,
    },
    "transformer": {
        "pre_lama": 0, "post_lama": 0, "padding_type": "reflect", "add_out_act": "sigmoid",
        "is_deformable": False, "num_latents_sqrt": None, "num_groups": None, "read_write_heads": None,
        "block_type": None,
    },
}  # fmt: skip

#: Sections of convolutions: the ratio of global channels that each kind supports, None for any.
CONVOLUTIONS: dict[str, dict[str, float | None]] = {
    "two_stream": {"resnet_conv_kwargs": None},
    "lama": {"init_conv_kwargs": 0, "downsample_conv_kwargs": 0, "resnet_conv_kwargs": None},
    "transformer": {"resnet_conv_kwargs": None},
}


def find_generator(tree: Mapping[str, Any], kinds: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Kind and published keys of the generator in a published tree, or in a part of one.

    Args:
        tree: a whole configuration, its ``generator`` section, or ``{"target": ..., "params": ...}``.
        kinds: our own, for messages.

    Raises:
        InputError: an unknown key, ``kind`` or ``target``, or an interpolation that leads nowhere.
    """
    if "model" not in tree:
        section = dict(tree)
        if "target" in tree:
            _known_keys(section, {"target": None, "params": None}, "")
            section = {"kind": tree["target"], **_mapping(tree.get("params") or {}, "params")}
        if "kind" not in section:
            raise InputError(
                f"config: expected a 'kind' ({', '.join(kinds)}) or a published configuration with 'model' "
                f"or 'target', got the keys {', '.join(map(repr, tree)) or 'none'}"
            )
        # Interpolations count from the root of a whole configuration.
        tree = {"model": {"params": {"config": {"generator": section}}}}
        _known(str(section["kind"]), [*kinds, *GENERATORS], "kind")
    whole = published_tree(tree)
    section = whole
    for key in ("model", "params", "config", "generator"):
        if not isinstance(section.get(key), dict):
            raise InputError(
                f"config: expected a section model.params.config.generator, got no mapping {key!r}"
            )
        section = section[key]
    if "kind" not in section:
        raise InputError("config: expected a 'kind' in model.params.config.generator, got none")
    return GENERATORS[section["kind"]], {key: value for key, value in section.items() if key != "kind"}


def published_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A whole published configuration, interpolations resolved and all its names known.

    Raises:
        InputError: an unknown key of the outer sections, an unknown ``kind`` or ``target`` anywhere, or
            an interpolation that leads nowhere.
    """
    resolved = _resolved(tree, tree, ())
    _known_keys(resolved, SECTIONS, "")
    _known_names(resolved, ())
    return resolved


def translate(kind: str, section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Our arguments for the published keys of a generator; absent keys take their published default.

    Raises:
        InputError: an unknown key, or a value that is not supported.
    """
    keys, fixed, convolutions = KEYS[kind], FIXED[kind], CONVOLUTIONS[kind]
    known = [*keys, *fixed, *convolutions]
    arguments = {argument: default for argument, default in keys.values() if argument is not None}
    for key, value in {"add_out_act": True, **section}.items():  # the default, tanh, is not supported
        _known(key, known, "key")
        if key in keys:
            argument = keys[key][0]
            assert argument is not None
            arguments[argument] = value
        elif key in convolutions:
            ratio = _global_ratio(key, _mapping(value, key), convolutions[key])
            if key == "resnet_conv_kwargs" and kind != "transformer":
                arguments["global_ratio"] = ratio
        elif fixed[key] is not None and value != fixed[key]:
            raise InputError(f"config: {key}: only {fixed[key]!r} is supported, got {value!r}")
    if kind == "two_stream":
        refinements = {"ffc": "fourier", "conv": "conv"}
        block_type = str(arguments["refine"])
        _known(block_type, refinements, "block_type")
        arguments["refine"] = refinements[block_type]
    return kind, arguments


def _global_ratio(key: str, section: Mapping[str, Any], only: float | None) -> float:
    """The share of global channels that a section of convolutions asks for."""
    for name in section:
        _known(name, ("ratio_gin", "ratio_gout", "enable_lfu"), f"key of {key}")
    if section.get("enable_lfu", True) is not False:  # the published default is true
        raise InputError(
            f"config: {key}.enable_lfu: only false is supported, got {section.get('enable_lfu')!r}"
        )
    ratios = section.get("ratio_gin"), section.get("ratio_gout")
    valid = ratios[0] == ratios[1] and isinstance(ratios[0], int | float) and 0 <= ratios[0] < 1
    if not valid or (only is not None and ratios[0] != only):
        expected = "equal numbers from 0 to below 1" if only is None else f"{only}"
        raise InputError(
            f"config: {key}.ratio_gin, ratio_gout: expected {expected}, got {ratios[0]!r}, {ratios[1]!r}"
        )
    assert ratios[0] is not None
    return ratios[0]


def _resolved(value: Any, root: Mapping[str, Any], followed: tuple[str, ...]) -> Any:
    """``value`` with each ``${path.from.the.root}`` replaced by what is there."""
    if isinstance(value, Mapping):
        return {key: _resolved(item, root, followed) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(item, root, followed) for item in value]
    found = re.fullmatch(r"\$\{([^${}]+)\}", value) if isinstance(value, str) else None
    if not found:
        return value
    path = found[1].strip()
    if path in followed:
        raise InputError(f"config: the interpolation ${{{path}}} leads back to itself")
    target: Any = root
    for key in path.split("."):
        if not isinstance(target, Mapping) or key not in target:
            raise InputError(f"config: the interpolation ${{{path}}} leads nowhere: there is no {key!r}")
        target = target[key]
    return _resolved(target, root, (*followed, path))


def _known_keys(tree: Mapping[str, Any], known: Mapping[str, Any], path: str) -> None:
    for key, value in tree.items():
        _known(key, known, f"key{f' in {path}' if path else ''}")
        if known[key] is not None and isinstance(value, Mapping):
            _known_keys(value, known[key], f"{path}.{key}" if path else key)


def _known_names(tree: Any, path: tuple[str, ...]) -> None:
    """Raise unless every ``target`` and ``kind`` is in the tables."""
    if isinstance(tree, list):
        for item in tree:
            _known_names(item, path)
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        if key == "target":
            _known(value, TARGETS, f"target in {'.'.join(path)}")
        elif key == "kind":
            section = path[-1] if path else ""
            in_optimizers = "optimizers" in path
            _known(
                value,
                OPTIMIZERS if in_optimizers else OTHER_KINDS.get(section, ()),
                f"kind in {'.'.join(path)}",
            )
        else:
            _known_names(value, (*path, str(key)))


def _known(name: Any, known: Iterable[str], what: str) -> None:
    names = list(known)
    if not isinstance(name, str) or name not in names:
        close = nearest(str(name), names)
        raise InputError(f"config: unknown {what}: {name!r}{close}; known: {', '.join(names) or 'none'}")


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"config: {name}: expected a mapping, got {type(value).__name__}")
    return value
