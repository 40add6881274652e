"""What must be reached: by operators against the published formulation, by video on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Floor:
    """One demand on one case.

    ``against`` names the contender. ``speed``: its median over ours is at least ``bound``;
    ``time``: ours over its median is at most ``bound``; ``memory``: our peak over its peak is at
    most ``bound``; ``volume``: our peak over the dense volume is at most ``bound``; ``rate``: frames
    per second, at least ``bound``; ``bytes``: the peak memory of the process, at most ``bound``.
    """

    case: str
    kind: Literal["speed", "time", "memory", "volume", "rate", "bytes"]
    bound: float
    against: str = "published"


@dataclass(frozen=True)
class Verdict:
    """What was measured for a floor: None where the case is missing from the results."""

    floor: Floor
    value: float | None

    @property
    def reached(self) -> bool:
        """Whether the bound is kept."""
        if self.value is None:
            return False
        least = self.floor.kind in ("speed", "rate")
        return self.value >= self.floor.bound if least else self.value <= self.floor.bound

    def __str__(self) -> str:
        sign = "at least" if self.floor.kind in ("speed", "rate") else "at most"
        what = {
            "speed": f"times faster than {self.floor.against}",
            "time": f"times the duration of {self.floor.against}",
            "memory": f"of the peak memory of {self.floor.against}",
            "volume": "of the dense volume at the peak",
            "rate": "frames per second",
            "bytes": "bytes at the peak",
        }[self.floor.kind]
        measured = "not measured" if self.value is None else f"{self.value:.3g}"
        word = "pass" if self.reached else "FAIL"
        return f"{word}  {self.floor.case}: {measured} {what} ({sign} {self.floor.bound:.3g})"


def _both(case: str, kind: Literal["speed", "memory"], bound: float) -> list[Floor]:
    """A layer's floor for features in either memory layout."""
    return [Floor(case.format(layout), kind, bound) for layout in ("channels_last", "contiguous")]


FLOORS: tuple[Floor, ...] = (
    Floor("flow_warp-square_512-channels_last-float32-forward", "speed", 6),
    Floor("flow_warp-square_512-contiguous-float32-forward", "speed", 3),
    Floor("flow_warp-square_512-channels_last-float32-forward", "time", 2, "copy"),
    Floor("aggregate-square_512-contiguous-float32-forward", "speed", 20),
    *_both("DeformableAggregation-square_512-{}-float32-forward", "speed", 3),
    *_both("DeformableAggregation-square_512-{}-float32-training", "speed", 2.2),
    *_both("DeformableAggregation-square_512-{}-float32-forward", "memory", 1 / 3),
    *_both("DeformableAggregation-square_512-{}-float32-training", "memory", 1 / 3),
    *_both("WindowRead-square_512-{}-float32-forward", "speed", 3),
    *_both("WindowWrite-square_512-{}-float32-forward", "speed", 3),
    *(
        Floor(f"LatentAttention-{references}_references_{batch}-contiguous-float32-forward", "speed", bound)
        for batch, bound in (("b1", 1.1), ("b8", 1.5))
        for references in ("two", "four")
    ),
    *(
        Floor(
            f"global_attention-{references}_references_{batch}-contiguous-float32-forward",
            "speed",
            1,
            "nearest",
        )
        for batch in ("b1", "b8")
        for references in ("two", "four")
    ),
    Floor("lookup-dense_32-contiguous-float32-forward", "speed", 3),
    Floor("lookup-dense_64-contiguous-float32-forward", "speed", 3),
    Floor("convex_upsample-square_32-contiguous-float32-forward", "speed", 3),
    Floor("convex_upsample-square_64-contiguous-float32-forward", "speed", 3),
    Floor("flow_stage-t4_256-contiguous-float32-forward", "speed", 2),
    Floor("flow_stage-t4_256-contiguous-bfloat16-forward", "speed", 4),
    Floor("generator-t4_256-contiguous-float32-forward", "speed", 4),
    Floor("generator-t4_256-contiguous-bfloat16-forward", "speed", 8),
    Floor("step-t4_256-contiguous-float32-forward", "speed", 2.5),
    Floor("step-t4_256-contiguous-bfloat16-forward", "speed", 5),
    Floor("training_step-t2_b2_256-contiguous-float32-forward", "speed", 1.3),
    Floor("training_step-t2_b2_256-contiguous-float32-forward", "memory", 0.8),
    Floor("pyramid-on_demand_128-contiguous-float32-forward", "volume", 0.05),
    Floor("propagate-480p", "rate", 3),
    Floor("propagate-1080p", "bytes", 2 * 2**30),
)


def judge(results: Mapping[str, Any]) -> list[Verdict]:
    """A verdict for every floor from one device's results."""
    cases = {entry["id"]: entry for entry in [*results["cases"], *results.get("propagation", ())]}
    return [Verdict(floor, _measured(floor, cases.get(floor.case))) for floor in FLOORS]


def _measured(floor: Floor, entry: Mapping[str, Any] | None) -> float | None:
    if entry is None:
        return None
    if floor.kind in ("rate", "bytes"):
        return entry["frames_per_second"] if floor.kind == "rate" else entry["peak_bytes"]
    contenders = entry["contenders"]
    ours = contenders["ours"]
    if floor.kind == "volume":
        return ours["peak_bytes"] / entry["dense_volume_bytes"]
    theirs = contenders.get(floor.against)
    if theirs is None:
        return None
    if floor.kind == "memory":
        return ours["peak_bytes"] / theirs["peak_bytes"]
    if floor.kind == "time":
        return ours["median"] / theirs["median"]
    return theirs["median"] / ours["median"]
