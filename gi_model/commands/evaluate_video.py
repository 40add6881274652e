"""Measure repaired videos as the DEVIL benchmark does: PSNR, SSIM, LPIPS, PVCS, FID, VFID, warp error and
patch consistency, per video and per split.

RESULTS, TRUTH and MASKS hold a folder of images, or a video file, per video; folders of such folders are
splits. Masks are white where a frame was repaired; elsewhere the truth is taken. Without MASKS whole frames
are measured and what needs masks is not computed. Writes videos.csv, splits.csv and results.json. A stopped
run goes on where it was if it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gi_model.errors import InputError
from gi_model.progress import progress

if TYPE_CHECKING:
    from gi_model.evaluation.devil import VideoMeasures
    from gi_model.evaluation.splits import Video

NAME = "evaluate-video"
SUMMARY = "measure repaired videos: PSNR, SSIM, LPIPS, PVCS, FID, VFID, warp error, patch consistency"
EXTRA = "evaluation,video"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("results", metavar="RESULTS", help="repaired videos")
    add("truth", metavar="TRUTH", help="the unharmed ones, under the same names")
    add("masks", metavar="MASKS", nargs="?", help="white where they were repaired")
    add("--lpips", nargs="+", metavar="FILE", help="weights of AlexNet and heads (default: of fetch-lpips)")
    add("--inception", metavar="FILE", help="for FID: pt_inception-2015-12-05-6726825d.pth")
    add("--i3d", metavar="FILE", help="for PVCS and VFID: rgb_imagenet.pt of pytorch-i3d")
    add("-o", "--output", default="video-evaluation", metavar="DIR", help="default video-evaluation")
    add("--restart", action="store_true", help="forget what an earlier run has measured in --output")
    add("--device", metavar="NAME", help="such as cuda or cpu (default: a GPU if there is one)")
    parser.set_defaults(left="what was measured is kept, start again to go on")


def run(options: argparse.Namespace) -> int:
    """``gi-model evaluate-video``."""
    from gi_model.evaluation.devil import random_corners
    from gi_model.evaluation.journal import Journal
    from gi_model.evaluation.loading import chosen_device
    from gi_model.evaluation.splits import find_videos
    from gi_model.evaluation.video_report import print_splits, split_results, write_results

    masks = Path(options.masks) if options.masks else None
    videos = find_videos(Path(options.results), Path(options.truth), masks)
    measures, weights, not_computed = _measures(options)
    measures.device = chosen_device(options.device)
    for network in (measures.lpips, measures.inception, measures.i3d):
        if network is not None:
            network.to(measures.device)
    output = Path(options.output)
    journal = Journal(output / "measured", _settings(videos, weights), options.restart)

    corners: dict[int, list[tuple[int, int]] | None] = {}
    for split in sorted({video.split for video in videos}):
        members = [i for i, video in enumerate(videos) if video.split == split]
        sizes = [videos[i].size() for i in members]
        corners |= dict(zip(members, random_corners(sizes), strict=True))
    left = [i for i in range(len(videos)) if not journal.has(i)]
    for i in progress(left, len(left), "videos"):
        frames = videos[i].frames()
        if len(frames[0]) < 2:
            raise InputError(
                f"RESULTS: expected at least 2 frames, got {len(frames[0])} in {videos[i].result}"
            )
        journal.add(i, measures(*frames, corners[i]))

    results = split_results(videos, [journal.read([i]) for i in range(len(videos))])
    print_splits(results, not_computed)
    write_results(output, results, not_computed)
    print(f"wrote {output / 'videos.csv'}, {output / 'splits.csv'}, {output / 'results.json'}")
    return 0


def _measures(
    options: argparse.Namespace,
) -> tuple[VideoMeasures, dict[str, str | None], dict[str, str]]:
    """What can be measured, hashes of its weights, and what cannot be measured and why."""
    from gi_model.evaluation.devil import NEED_MASKS, VideoMeasures
    from gi_model.evaluation.i3d import i3d
    from gi_model.evaluation.journal import digest
    from gi_model.evaluation.loading import load_measures

    images, weights, missing = load_measures(options.lpips, options.inception, "alexnet")
    not_computed = {name: why for name, why in missing.items() if name in ("lpips", "fid")}
    measures = VideoMeasures(images.lpips, images.inception)
    if options.i3d:
        measures.i3d = i3d(options.i3d)
    else:
        not_computed |= dict.fromkeys(("pvcs", "vfid"), "no weights: give --i3d")
    if not options.masks:
        not_computed |= dict.fromkeys(NEED_MASKS, "needs MASKS")
    return measures, weights | {"i3d": digest(options.i3d) if options.i3d else None}, not_computed


def _settings(videos: list[Video], weights: dict[str, str | None]) -> dict[str, Any]:
    """All that results depend on."""
    lines = []
    for video in videos:
        for path in (video.result, video.truth, video.masks):
            if path is not None:
                files = sorted(path.iterdir()) if path.is_dir() else [path]
                lines += [f"{video.split} {video.name} {f.name} {f.stat().st_size}" for f in files]
    return {"videos": hashlib.sha256("\n".join(lines).encode()).hexdigest(), **weights}
