"""What a training run is made of: our own keys, checked one by one; published ones are translated."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gi_model.configs import load_yaml
from gi_model.errors import InputError
from gi_model.published import nearest
from gi_model.training.losses import Adversarial
from gi_model.training.schedule import WarmUpCosine

#: Where a merged tree has its published part.
PUBLISHED = "published"


@dataclass(frozen=True)
class DiscriminatorOptions:
    """Size of the discriminator."""

    width: int = 64
    layers: int = 4


@dataclass(frozen=True)
class FlowOptions:
    """Where flow comes from: ``raft`` with weights, ``dis`` or ``planar`` without, ``none`` for no flow.

    ``resolution`` is the height and width at which RAFT sees the frames. As published, flow is estimated from
    whole frames; with ``sees_hidden`` false, hidden pixels are black.
    """

    kind: str = "raft"
    checkpoint: str | None = None
    resolution: tuple[int, ...] = (256, 256)
    iterations: int = 20
    sees_hidden: bool = True


@dataclass(frozen=True)
class ValidationOptions:
    """A validation set, a folder or a list of files, and how many references of each target are used."""

    data: str = ""
    references: int = 2


@dataclass(frozen=True)
class DataOptions:
    """Training samples.

    ``photos`` is a folder; ``list`` a file that names some of them. Frames of ``size`` pixels are scaled by
    ``scale`` when they are finished. ``masks`` are the published ``mask_gen_kwargs``, ``mask_kind`` the
    published ``mask_generator_kind``. ``batch_size`` and ``workers`` are of one process. What is in ``test``
    is measured when the run is over.
    """

    photos: str = ""
    list: str | None = None
    size: int = 256
    scale: float = 1
    references: int = 2
    masks: dict[str, Any] | None = None
    mask_kind: str = "mixed"
    easy: bool = False
    batch_size: int = 8
    workers: int = 4
    validation: dict[str, ValidationOptions] = field(default_factory=dict)
    test: dict[str, ValidationOptions] = field(default_factory=dict)


@dataclass(frozen=True)
class LossOptions:
    """Terms of the objective; see ``Objective``.

    ``perceptual`` is the weight of the perceptual term, whose encoder's weights are in the file
    ``perceptual_weights``; 0 leaves it out. ``perceptual_eval`` keeps that encoder in eval mode.
    """

    l1_known: float = 10
    l1_missing: float = 0
    adversarial: Adversarial = field(default_factory=Adversarial)
    feature_matching: float = 100
    feature_matching_masked: bool = False
    perceptual: float = 30
    perceptual_weights: str | None = None
    perceptual_eval: bool = False


@dataclass(frozen=True)
class OptimizerOptions:
    """Adam or AdamW of one network; ``factor`` multiplies the learning rate."""

    kind: str = "adam"
    factor: float = 1
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0


@dataclass(frozen=True)
class AveragingOptions:
    """A running average of the generator's weights, used for validation.

    From step ``start`` on, every ``period`` steps: ``average = decay * average + (1 - decay) * weights``.
    """

    decay: float = 0.999
    start: int = 0
    period: int = 1


@dataclass(frozen=True)
class Configuration:
    """A training run.

    The learning rate is ``base_learning_rate * batch_size * processes * accumulate``, unless
    ``learning_rate`` is given; it is multiplied by the schedule and each optimizer's factor.

    As published, the last window of accumulated batches of an epoch, which may be short, is divided by
    ``accumulate``; with ``rescale_last_window`` by its own number of batches.

    ``monitor`` is ``psnr`` or ``ssim``, inside the mask, or ``fid`` of whole composites, as published, of the
    first validation set; by default ``fid`` where ``inception`` names the weights it takes, else ``psnr``.
    ``save_every`` and ``validate_every`` count steps; without the latter and ``validate_every_batches``,
    validation follows every ``validate_every_epochs`` epochs, or such a part of one. ``validation_batches``
    is how many batches of each set a process takes; all by default, 0 for no validation.
    """

    data: DataOptions = field(default_factory=DataOptions)
    generator: Any = "ours"
    discriminator: DiscriminatorOptions = field(default_factory=DiscriminatorOptions)
    flow: FlowOptions = field(default_factory=FlowOptions)
    losses: LossOptions = field(default_factory=LossOptions)
    generator_optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    discriminator_optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(factor=0.1))
    base_learning_rate: float = 1e-5
    learning_rate: float | None = None
    schedule: WarmUpCosine = field(default_factory=WarmUpCosine)
    averaging: AveragingOptions | None = None
    weights: str | None = None
    epochs: int = 1000
    steps: int | None = None
    accumulate: int = 2
    rescale_last_window: bool = False
    precision: str = "32-true"
    devices: tuple[int, ...] | None = None
    nodes: int = 1
    compile: bool = False
    backend: str = "auto"
    seed: int = 23
    monitor: str | None = None
    inception: str | None = None
    save_every: int = 500
    validate_every: int | None = None
    validate_every_batches: int | None = None
    validate_every_epochs: float = 1
    validation_batches: int | None = None
    log_every: int = 50
    pictures_every: int = 750

    def __post_init__(self) -> None:
        averaging = self.averaging or AveragingOptions()
        counts = {
            **{
                name: getattr(self, name)
                for name in ("epochs", "accumulate", "nodes", "save_every", "log_every")
            },
            "steps": self.steps,
            "validate_every": self.validate_every,
            "validate_every_batches": self.validate_every_batches,
            "data.batch_size": self.data.batch_size,
            "averaging.period": averaging.period,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"config: {name}: expected at least 1, got {value}")
        if not 0 <= averaging.decay < 1:
            raise InputError(f"config: averaging.decay: expected 0 to below 1, got {averaging.decay}")
        if self.data.workers < 0:
            raise InputError(f"config: data.workers: expected at least 0, got {self.data.workers}")
        if self.validate_every_epochs <= 0:
            raise InputError(
                f"config: validate_every_epochs: expected a number above 0, got {self.validate_every_epochs}"
            )
        if self.validation_batches is not None and self.validation_batches < 0:
            raise InputError(
                f"config: validation_batches: expected at least 0, got {self.validation_batches}"
            )
        if self.monitored == "fid" and self.inception is None:
            raise InputError(
                "config: monitor: fid needs the weights of its network, such as "
                "inception=pt_inception-2015-12-05-6726825d.pth, got none"
            )
        for name, known in (
            ("monitored", ("psnr", "ssim", "fid")),
            ("precision", ("32-true", "bf16-mixed")),
            ("backend", ("auto", "reference", "cpp", "triton", "cuda")),
        ):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                key = "monitor" if name == "monitored" else name
                raise InputError(f"config: {key}: expected {', '.join(known)}, got {given!r}")
        for which in (self.generator_optimizer, self.discriminator_optimizer):
            if which.kind not in ("adam", "adamw"):
                raise InputError(f"config: optimizer kind: expected adam, adamw, got {which.kind!r}")
            if len(which.betas) != 2:
                raise InputError(f"config: optimizer betas: expected two numbers, got {list(which.betas)}")
        if self.flow.kind not in ("raft", "dis", "planar", "none"):
            raise InputError(f"config: flow.kind: expected raft, dis, planar, none, got {self.flow.kind!r}")

    @property
    def monitored(self) -> str:
        """What the best checkpoints are chosen by."""
        return self.monitor or ("psnr" if self.inception is None else "fid")

    def rate(self, processes: int) -> float:
        """The learning rate of a run of so many processes, before schedule and factors."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.base_learning_rate * self.data.batch_size * processes * self.accumulate


def read_configuration(paths: Sequence[str], overrides: Sequence[str] = ()) -> Configuration:
    """The run that YAML files, merged from left to right, and ``key.sub=value`` describe.

    Files and overrides may be ours or published; our own keys win over published ones.

    Raises:
        InputError: a file cannot be read, unknown keys (the nearest known one is named), or wrong values.
    """
    return configuration(read_tree(paths, overrides))


def read_tree(paths: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The merged tree of :func:`read_configuration`: our keys, and published ones below ``published``."""
    ours: dict[str, Any] = {}
    published: dict[str, Any] = {}
    for path in paths:
        read = load_yaml(path)
        if not isinstance(read, Mapping):
            raise InputError(f"config: expected a mapping in {path}, got {type(read).__name__}")
        if _is_published(read):
            published = merged(published, read)
        else:
            published = merged(published, read.get(PUBLISHED) or {})
            ours = merged(ours, {key: value for key, value in read.items() if key != PUBLISHED})
    for override in overrides:
        tree = _override(override)
        if _is_published(tree):
            published = merged(published, tree)
        else:
            ours = merged(ours, tree)
    return {PUBLISHED: published, **ours} if published else ours


def configuration(tree: Mapping[str, Any]) -> Configuration:
    """A tree of our own keys, of published ones, or of both as a checked configuration.

    Raises:
        InputError: as for :func:`read_configuration`.
    """
    if _is_published(tree):
        tree = {PUBLISHED: tree}
    if PUBLISHED in tree:
        from gi_model.training.published_runs import translated

        ours = {key: value for key, value in tree.items() if key != PUBLISHED}
        tree = merged(translated(tree[PUBLISHED]), ours)
    return _built(Configuration, tree, "")


def _is_published(tree: Mapping[str, Any]) -> bool:
    data = tree.get("data")
    return bool({"model", "lightning"} & set(tree)) or (
        isinstance(data, Mapping) and bool({"target", "params"} & set(data))
    )


def as_tree(value: Any) -> Any:
    """A configuration as plain data, which ``configuration`` takes back."""
    if dataclasses.is_dataclass(value):
        return {f.name: as_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: as_tree(item) for key, item in value.items()}
    return [as_tree(item) for item in value] if isinstance(value, list | tuple) else value


def merged(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with what ``other`` says instead; mappings are merged, all else is replaced."""
    result = dict(tree)
    for key, value in other.items():
        earlier = result.get(key)
        both = isinstance(value, Mapping) and isinstance(earlier, Mapping)
        result[key] = merged(earlier, value) if both else value  # type: ignore[arg-type]
    return result


def _override(text: str) -> dict[str, Any]:
    """``a.b=value`` as a tree; the value is YAML."""
    import yaml

    path, equals, value = text.partition("=")
    if not (equals and all(path.split("."))):
        raise InputError(f"override: expected key.sub=value, got {text!r}")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"override: {text!r}: the value is not YAML") from error
    for key in reversed(path.split(".")):
        tree = {key: tree}
    return tree


def _built(kind: type, tree: Any, path: str) -> Any:
    """An object of a dataclass from a tree of its fields."""
    if not isinstance(tree, Mapping):
        raise InputError(f"config: {path or 'file'}: expected a mapping, got {_shown(tree)}")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise InputError(
                f"config: unknown key {name!r}{nearest(str(key), hints)}; known: {', '.join(hints)}"
            )
        arguments[key] = _value(hints[key], value, name)
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"config: {path or 'file'}: {error}") from error


def _value(kind: Any, value: Any, name: str) -> Any:
    """``value`` as what a field's annotation asks for."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = (one for one in inner if one is not type(None))
        return _value(kind, value, name)
    if dataclasses.is_dataclass(kind):
        return _built(typing.cast(type, kind), value, name)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"config: {name}: expected a mapping, got {_shown(value)}")
        return {str(key): _value(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"config: {name}: expected a list, got {_shown(value)}")
        return tuple(_value(inner[0], item, name) for item in value)
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5, without a point, as text
        except ValueError:
            pass
    if kind is str and isinstance(value, Path):
        return str(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise InputError(f"config: {name}: expected {names[kind]}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]
