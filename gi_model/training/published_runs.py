"""Published training configurations in our own keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gi_model.configs.published import published_tree
from gi_model.errors import InputError
from gi_model.evaluation.scores import reference_key
from gi_model.published import nearest
from gi_model.training.trainer_options import of_trainer

#: Where the published weights of the perceptual encoder are, below ``weights_path``.
ENCODER = "ade20k/ade20k-resnet50dilated-ppm_deepsup/encoder_epoch_20.pth"

#: Published options that change nothing here.
IGNORED = {
    "model.params": {
        "monitor", "visualize_attn", "visualize_each_iters", "concat_mask", "store_discr_outputs_for_vis",
        "use_ddp", "validation_keys", "predict_only", "fake_fakes_proba", "fake_fakes_generator_kwargs",
        "rescale_scheduler_kwargs", "const_area_crop_kwargs", "add_noise_kwargs", "ignore_keys",
    },
    "model.params.config": {"training_model", "visualizer", "location", "evaluator", "data"},
    "lightning": {"logger", "modelcheckpoint", "callbacks"},
    "data": set(),
    "data.params": {
        "predict", "wrap", "combined_val_batches", "combined_test_batches",
        "use_worker_init_fn",
    },
}  # fmt: skip


def translated(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Our own tree for a whole published one.

    Raises:
        InputError: unknown keys, names that are not in our tables, or options that are not supported.
    """
    tree = published_tree(tree)
    ours: dict[str, Any] = {}
    model = tree.get("model")
    if not isinstance(model, Mapping):
        raise InputError("config: expected a section model beside the other published ones, got none")
    params = _section(
        model.get("params"),
        "model.params",
        (
            "flow_cfg", "scheduler_config", "config", "ckpt_path", "average_generator",
            "generator_avg_beta", "average_generator_start_step", "average_generator_period",
        ),
    )  # fmt: skip
    ours["base_learning_rate"] = model.get("base_learning_rate", 1e-5)
    if params.get("ckpt_path"):
        ours["weights"] = params["ckpt_path"]
    if params.get("average_generator"):
        ours["averaging"] = {
            "decay": params.get("generator_avg_beta", 0.999),
            "start": params.get("average_generator_start_step", 30000),
            "period": params.get("average_generator_period", 10),
        }
    ours["flow"] = _flow(params.get("flow_cfg"))
    scheduler = params.get("scheduler_config")
    if scheduler:
        ours["schedule"] = dict(scheduler.get("params") or {})
    else:  # constant
        ours["schedule"] = {"warm_up_steps": 0, "lr_max": 1.0, "lr_min": 1.0}
    config = _section(
        params.get("config"), "model.params.config", ("losses", "optimizers", "generator", "discriminator")
    )
    ours["generator"] = dict(config["generator"]) if "generator" in config else "ours"
    discriminator = _section(
        config.get("discriminator"), "discriminator", ("kind", "input_nc", "ndf", "n_layers")
    )
    ours["discriminator"] = {
        "width": discriminator.get("ndf", 64),
        "layers": discriminator.get("n_layers", 3),
    }
    ours["losses"] = _losses(config.get("losses"))
    for network, options in _section(
        config.get("optimizers"), "optimizers", ("generator", "discriminator")
    ).items():
        ours[f"{network}_optimizer"] = _optimizer(options, network)
    ours["data"] = _data(tree.get("data"))
    return ours | _trainer(tree.get("lightning"))


def _flow(section: Any) -> dict[str, Any]:
    if not section:
        return {"kind": "none"}
    if str(section.get("target", "")).endswith("Identity"):
        return {"kind": "none"}
    params = _section(
        section.get("params"), "flow_cfg.params", ("resolution", "input_range", "return_err", "ckpt_path")
    )
    found = {"resolution": params.get("resolution", [256, 256]), "checkpoint": params.get("ckpt_path")}
    return {key: value for key, value in found.items() if value is not None}


def _losses(section: Any) -> dict[str, Any]:
    losses = _section(
        section, "losses", ("l1", "mse", "perceptual", "adversarial", "feature_matching", "resnet_pl")
    )
    if (losses.get("perceptual") or {}).get("weight"):
        raise InputError("config: losses.perceptual.weight: only 0 is supported, see resnet_pl")
    l1 = _section(losses.get("l1"), "losses.l1", ("weight_missing", "weight_known"))
    given = _section(
        losses.get("adversarial"),
        "losses.adversarial",
        (
            "kind", "weight", "gp_coef", "mask_as_fake_target", "allow_scale_mask", "mask_scale_mode",
            "extra_mask_weight_for_gen", "use_unmasked_for_gen", "use_unmasked_for_discr",
        ),
    )  # fmt: skip
    matching = _section(losses.get("feature_matching"), "losses.feature_matching", ("weight", "pass_mask"))
    perceptual = _section(
        losses.get("resnet_pl"), "losses.resnet_pl", ("weight", "weights_path", "arch", "segmentation")
    )
    found = {
        "l1_known": l1.get("weight_known", 10),
        "l1_missing": l1.get("weight_missing", 0),
        "adversarial": {
            "weight": given.get("weight", 1),
            "penalty": given.get("gp_coef", 5),
            "mask_as_target": given.get("mask_as_fake_target", False),
            "masked_generator": not given.get("use_unmasked_for_gen", True),
            "masked_discriminator": not given.get("use_unmasked_for_discr", True),
            "extra": given.get("extra_mask_weight_for_gen", 0),
            "scaling": given.get("mask_scale_mode", "nearest"),
        },
        "feature_matching": matching.get("weight", 0),
        "feature_matching_masked": matching.get("pass_mask", False),
        "perceptual": perceptual.get("weight", 0),
    }
    if perceptual.get("weights_path"):
        found["perceptual_weights"] = f"{str(perceptual['weights_path']).rstrip('/')}/{ENCODER}"
    return found


def _optimizer(section: Any, network: str) -> dict[str, Any]:
    options = _section(
        section, f"optimizers.{network}", ("kind", "lr_factor", "lr", "betas", "eps", "weight_decay")
    )
    found = {"kind": options.get("kind", "adamw"), "factor": options.get("lr_factor", 1)}
    if found["kind"] == "adamw":
        found["weight_decay"] = 0.01  # the library's default
    return found | {key: options[key] for key in ("betas", "eps", "weight_decay") if key in options}


def _data(section: Any) -> dict[str, Any]:
    data = _section(section, "data", ("target", "params"))
    keys = ("batch_size", "num_workers", "train", "validation", "test")
    params = _section(data.get("params"), "data.params", keys)
    if "batch_size" not in params:
        raise InputError("config: data.params: expected a batch_size, got none")
    batch_size = params["batch_size"]
    train = (params.get("train") or {}).get("params")
    if not isinstance(train, Mapping):
        raise InputError("config: data.params.train.params: expected a mapping, got none")
    train = _section(
        train,
        "data.params.train.params",
        (
            "root", "filelist", "out_size", "n_references", "mask_gen_kwargs", "transform_variant",
            "mask_generator_kind", "easy", "kind", "clean_prob",
        ),
    )  # fmt: skip
    for key, known in (("transform_variant", "distortions"), ("kind", "default")):
        if train.get(key, known) != known:
            raise InputError(f"config: data: {key}: only {known!r} is supported, got {train[key]!r}")
    for key in ("root", "n_references"):
        if key not in train:
            raise InputError(f"config: data.params.train.params: expected a {key}, got none")
    return {
        "photos": train["root"],
        "list": train.get("filelist"),
        "size": train.get("out_size", 512),
        "references": train["n_references"],
        "masks": train.get("mask_gen_kwargs"),
        "mask_kind": train.get("mask_generator_kind") or "mixed",
        "easy": train.get("easy", False),
        "batch_size": batch_size,
        "workers": params["num_workers"] if params.get("num_workers") is not None else min(8, 2 * batch_size),
        "validation": _sets(params.get("validation")),
        "test": _sets(params.get("test")),
    }


def _sets(section: Any) -> dict[str, Any]:
    """Validation sets by name: ``0_two`` is ``two``; one without a name is called by its references."""
    sets = section or {}
    if "target" in sets:
        sets = {reference_key((sets.get("params") or {}).get("n_references", 2)): sets}
    found = {}
    for key in sorted(sets):
        given = sets[key].get("params") or {}
        name = key.partition("_")[2] if key[:1].isdigit() and "_" in key else key
        found[name] = {"data": given.get("filenames", ""), "references": given.get("n_references", 2)}
    return found


def _trainer(section: Any) -> dict[str, Any]:
    lightning = _section(section, "lightning", ("trainer",))
    given = lightning.get("trainer")
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"config: lightning.trainer: expected a mapping, got {type(given).__name__}")
    found = {"accumulate": 1, "precision": "32-true"}
    return found | of_trainer(given or {}, "config: lightning.trainer.")


def _section(section: Any, path: str, known: tuple[str, ...]) -> dict[str, Any]:
    """A section of which all keys are known; those that change nothing are left out."""
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise InputError(f"config: {path}: expected a mapping, got {type(section).__name__}")
    ignored = IGNORED.get(path, set())
    for key in section:
        if key not in known and key not in ignored:
            everything = [*known, *sorted(ignored)]
            raise InputError(
                f"config: unknown key in {path}: {key!r}{nearest(str(key), everything)}; "
                f"known: {', '.join(everything)}"
            )
    return {key: value for key, value in section.items() if key in known}
