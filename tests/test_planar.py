"""Flow from homographies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")

from gi_model.flow import DISStage, PlanarStage  # noqa: E402
from gi_model.flow.planar import _Features  # noqa: E402

SIDE = 96
# Turned by 30 degrees, enlarged by a fifth, moved, a little tilted.
MATRIX = np.array([[1.04, -0.6, 25.0], [0.6, 1.04, -28.0], [4e-4, 2e-4, 1.0]])


def textured(seed: int = 3) -> np.ndarray:
    """``[H,W,3]`` uint8 with corners of several sizes."""
    rng = np.random.default_rng(seed)
    layers = [
        cv2.resize(rng.random((n, n, 3)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for n in (8, 16, 32)
    ]
    return np.clip(255 * sum(layers) / len(layers), 0, 255).astype(np.uint8)


def frame(pixels: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """``[1,4,H,W]``."""
    rgba = np.concatenate([pixels / 255, mask[..., None]], axis=2)
    return torch.from_numpy(rgba).permute(2, 0, 1)[None].float()


def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A target, a source to which ``MATRIX`` leads, and their masks."""
    target = textured()
    source = cv2.warpPerspective(target, MATRIX, (SIDE, SIDE))
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, 30:60, 36:66] = True
    masks[1, 20:45, 10:30] = True
    return target, source, masks[0], masks[1]


def test_a_known_homography_is_found_inside_the_mask_too() -> None:
    target, source, hidden, hidden_source = pair()
    flow, error = PlanarStage()(frame(target, hidden), [frame(source, hidden_source)])
    assert flow.shape == (1, 1, 2, SIDE, SIDE) and error.shape == (1, 1, 1, SIDE, SIDE)
    assert flow.dtype == error.dtype == torch.float32
    y, x = np.mgrid[:SIDE, :SIDE]
    moved = np.stack([x, y, np.ones_like(x)], axis=-1) @ MATRIX.T
    expected = moved[..., :2] / moved[..., 2:] - np.stack([x, y], axis=-1)
    off = np.linalg.norm(flow[0, 0].permute(1, 2, 0).numpy() - expected, axis=2)
    assert off[hidden].max() < 0.5 and np.median(off) < 0.25
    assert 0 < error[0, 0, 0, 0, 0] < 0.5 and (error == error[0, 0, 0, 0, 0]).all()


def test_what_is_hidden_has_no_influence() -> None:
    target, source, hidden, hidden_source = pair()
    noise = textured(4)
    others = [np.where(m[..., None], noise, f) for f, m in ((target, hidden), (source, hidden_source))]
    stage = PlanarStage()
    # The second source is found by DIS.
    flat = np.full_like(source, 90)
    seen = stage(frame(target, hidden), [frame(source, hidden_source), frame(flat, hidden_source)])
    flat = np.where(hidden_source[..., None], noise, flat)
    changed = stage(frame(others[0], hidden), [frame(others[1], hidden_source), frame(flat, hidden_source)])
    for a, b in zip(seen, changed, strict=True):
        assert torch.equal(a, b)


def test_a_pair_without_features_is_left_to_dis_and_others_are_not() -> None:
    target, source, hidden, _ = pair()
    nothing = np.zeros_like(hidden)
    smooth = np.broadcast_to(np.arange(60, 60 + SIDE, dtype=np.uint8)[:, None], (SIDE, SIDE, 3)).copy()
    first = torch.cat([frame(smooth, nothing), frame(target, nothing)])
    second = torch.cat([frame(smooth + np.uint8(2), nothing), frame(source, nothing)])
    flow, error = PlanarStage()(first, [second, second.flip(0)])
    dis, dis_error = DISStage()(first, [second, second.flip(0)])
    for i, t in ((0, 0), (0, 1), (1, 1)):
        assert torch.equal(flow[i, t], dis[i, t]) and torch.equal(error[i, t], dis_error[i, t])
    alone, alone_error = PlanarStage()(first[1:], [second[1:]])
    assert torch.equal(flow[1, 0], alone[0, 0]) and torch.equal(error[1, 0], alone_error[0, 0])
    assert not torch.allclose(alone[0, 0], dis[1, 0], atol=2)


def test_few_matches_are_enough_for_a_similarity() -> None:
    stage = PlanarStage()
    points = np.array([[10.0, 12], [70, 20], [60, 80], [15, 66], [40, 41]])
    matrix = np.array([[0.9, -0.5, 30], [0.5, 0.9, -9], [0, 0, 1]])
    moved = points @ matrix[:2, :2].T + matrix[:2, 2]
    looks = 100 * np.eye(5, 128, dtype=np.float32)  # each like nothing else

    def found(first: np.ndarray, second: np.ndarray, n: int) -> tuple[np.ndarray, float] | None:
        return stage._homography(
            _Features(first[:n], looks[:n]), _Features(second[:n], looks[:n]), SIDE, SIDE
        )

    for n in (4, 5):
        result = found(points, moved, n)
        assert result is not None and result[1] < 1e-4
        np.testing.assert_allclose(result[0], matrix, atol=1e-4)
    assert found(points, moved, 3) is None
    assert found(points, points[[1, 3, 0, 4, 2]] * (1, 0.3), 5) is None, "four do not agree"
    assert found(points, 3 * points, 5) is None, "scales too much"


def test_encodings_stand_for_frames_and_errors_are_those_of_dis() -> None:
    target, source, hidden, hidden_source = pair()
    stage = PlanarStage()
    frames = frame(target, hidden), frame(source, hidden_source)
    kept = [stage.encode(one) for one in frames]
    for a, b in zip(stage(kept[0], kept[1:]), stage(frames[0], torch.stack(frames[1:], dim=1)), strict=True):
        assert torch.equal(a, b)
    wrong = (
        lambda s: s(frames[0], []),
        lambda s: s(frames[0], [frames[1][..., 1:]]),
        lambda s: s(frames[0][:, :3], list(frames[1:])),
        lambda s: s(frames[0], 3),
        lambda s: s.encode(frames[0][:, :3]),
    )
    for call in wrong:
        messages = []
        for one in (stage, DISStage()):
            with pytest.raises((TypeError, ValueError)) as raised:
                call(one)
            messages.append((raised.type, str(raised.value)))
        assert messages[0] == messages[1]


def test_it_is_what_training_and_evaluation_are_given(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the [training] extra is not installed")
    from gi_model.configs import build_generator
    from gi_model.evaluation.filling import load_filler
    from gi_model.training import run
    from gi_model.training.configuration import configuration

    generator = build_generator("tiny")
    read = configuration({"generator": "tiny", "flow": {"kind": "planar"}})
    assert isinstance(run.build_stage(read, generator), PlanarStage)
    state = generator.state_dict()
    names = generator.published_names()
    weights = {f"generator.{name}": state[own] for own, published in names.items() for name in published}
    torch.save({"state_dict": weights}, tmp_path / "tiny.ckpt")
    filler = load_filler("tiny", tmp_path / "tiny.ckpt", flow="planar")
    assert isinstance(filler.stage, PlanarStage)
