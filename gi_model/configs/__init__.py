"""Configurations of generators: by name, as arguments, or as published YAML files.

No name in a configuration is ever imported: published ``target`` and ``kind`` strings are looked up in
fixed tables, and what is not in them is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gi_model.baselines import LamaGenerator, TransformerGenerator
from gi_model.configs.published import find_generator, translate
from gi_model.errors import InputError
from gi_model.generator import Generator, TwoStreamGenerator
from gi_model.published import nearest

#: Classes by the ``kind`` of our own configurations; all other keys are their arguments.
KINDS: dict[str, type[Generator]] = {
    "two_stream": TwoStreamGenerator,
    "lama": LamaGenerator,
    "transformer": TransformerGenerator,
}

#: The published configurations, and a small one of our own.
NAMED: dict[str, dict[str, Any]] = {
    "ours": {"kind": "two_stream", "blocks": 4},
    "ours_big": {"kind": "two_stream", "blocks": 12},
    "ours_no_ffc": {"kind": "two_stream", "blocks": 6, "refine": "conv"},
    "lama": {"kind": "lama"},
    "transformer": {"kind": "transformer"},
    # Not published: learns on a CPU within minutes, see tiny.yaml.
    "tiny": {
        "kind": "two_stream", "width": 16, "downsamplings": 2, "blocks": 2, "refine": "conv", "grid": 8,
        "heads": 4, "window_heads": 4, "pixels": 32,
    },
}  # fmt: skip


def build_generator(config: str | Path | Mapping[str, Any]) -> Generator:
    """A generator with fresh weights, in training mode.

    Args:
        config: one of

            - a name in ``NAMED``: ``ours``, ``ours_big``, ``ours_no_ffc``, ``lama``, ``transformer``,
              ``tiny``;
            - our arguments: ``{"kind": "two_stream", "blocks": 4, ...}``, see ``KINDS``;
            - a published configuration as a tree: all of it, its ``generator`` section, or
              ``{"target": ..., "params": {...}}``;
            - the path of a YAML file with any of these; reading it needs PyYAML.

    Raises:
        InputError: an unknown name, key, ``kind`` or ``target``; values that do not go together; a file
            that cannot be read, or PyYAML missing.
    """
    kind, arguments = generator_arguments(config)
    try:
        return KINDS[kind](**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"config: {error}") from error


def generator_arguments(config: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """``kind`` and constructor arguments of a configuration; as ``build_generator``, but builds nothing."""
    tree = _tree(config)
    if tree.get("kind") in tuple(KINDS):
        kind, arguments = tree["kind"], {key: value for key, value in tree.items() if key != "kind"}
    else:
        kind, arguments = translate(*find_generator(tree, [*KINDS]))
    known = [name for name in inspect.signature(KINDS[kind].__init__).parameters if name != "self"]
    for key in arguments:
        if key not in known:
            raise InputError(
                f"config: unknown key for kind {kind!r}: {key!r}{nearest(str(key), known)}; "
                f"known: {', '.join(known)}"
            )
    return kind, arguments


def load_yaml(path: str | Path) -> Any:
    """The tree in a YAML file; only plain data is made from it.

    Raises:
        InputError: not readable, not YAML, or PyYAML is missing.
    """
    try:
        import yaml
    except ImportError:
        raise InputError(
            f"config: reading {path} needs PyYAML: pip install pyyaml; or give the configuration as a dict"
        ) from None
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config: cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"config: {path} is not YAML: {error}") from error


def _tree(config: object) -> Mapping[str, Any]:
    """The configuration as a mapping."""
    origin = ""
    if isinstance(config, str | Path):
        if str(config) in NAMED:
            return NAMED[str(config)]
        if Path(config).suffix not in (".yaml", ".yml"):
            raise InputError(
                f"config: unknown name: {str(config)!r}{nearest(str(config), NAMED)}; "
                f"known: {', '.join(NAMED)}, or the path of a .yaml file"
            )
        origin = f" in {config}"
        config = load_yaml(config)
    if not isinstance(config, Mapping):
        raise InputError(f"config: expected a name, a path or a mapping{origin}, got {type(config).__name__}")
    return config
