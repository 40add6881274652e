"""Pixels of references, moved along flow: alignment, spreading, the guess, and generators that use it."""

from __future__ import annotations

import pytest
import torch

from gi_model.configs import NAMED, build_generator
from gi_model.errors import InputError
from gi_model.pixels import Guess, PixelPropagation, align, spread

SIDE = 16
SMALL = {
    "kind": "two_stream", "width": 8, "downsamplings": 1, "blocks": 1, "refine": "conv", "grid": 2,
    "heads": 2, "window_heads": 2, "pixels": 8,
}  # fmt: skip


def scene(seed: int = 0, T: int = 2) -> tuple[torch.Tensor, ...]:
    """Targets, references and flow, two of each; what is masked is black."""
    random = torch.Generator().manual_seed(seed)
    frames = torch.rand(2, 1 + T, 3, SIDE, SIDE, generator=random)
    masks = (torch.rand(2, 1 + T, 1, SIDE // 4, SIDE // 4, generator=random) < 0.4).float()
    masks = masks.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)
    frames = torch.cat([frames * (1 - masks), masks], dim=2)
    flows = 2 * torch.randn(2, T, 2, SIDE, SIDE, generator=random)
    return frames[:, 0], frames[:, 1:], flows


def with_hidden(frames: torch.Tensor) -> torch.Tensor:
    """The same with colours where they are masked."""
    mask = frames[..., 3:, :, :]
    return torch.cat([frames[..., :3, :, :] + mask * torch.rand_like(frames[..., :3, :, :]), mask], dim=-3)


def propagation(seed: int = 0) -> PixelPropagation:
    torch.manual_seed(seed)
    return PixelPropagation(8, 2).eval()


def test_references_are_moved_and_only_what_they_show_counts() -> None:
    srcs = torch.zeros(1, 2, 4, 8, 8)
    srcs[:, :, :3] = torch.arange(8.0)  # colours are columns
    srcs[:, 1, 3, :4] = 1
    flows = torch.zeros(1, 2, 2, 8, 8)
    flows[:, :, 0] = 2  # pixels to the right
    flows[:, 1, 1] = 0.25  # a quarter of a pixel down
    colours, seen = align(srcs, flows)
    assert (seen[0, 0, 0, :, :6] == 1).all() and not seen[0, 0, 0, :, 6:].any()
    assert torch.equal(colours[0, 0, 1, :, :6], torch.arange(2.0, 8).expand(8, 6))
    assert not colours[0, 0, :, :, 6:].any(), "zero where nothing is seen"
    # A quarter of the weight in row 3 is on what is shown, three quarters in the last one on the frame.
    assert seen[0, 1, 0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(colours[0, 1, 0, 7, :6], torch.arange(2.0, 8))


def test_flow_on_another_grid_is_that_of_the_frames() -> None:
    _, srcs, _ = scene()
    flows = torch.zeros(2, 2, 2, 4, 4)
    flows[:, :, 0] = 1  # of its own pixels, four of the frames'
    fine = torch.zeros(2, 2, 2, SIDE, SIDE)
    fine[:, :, 0] = 4
    for a, b in zip(align(srcs, flows), align(srcs, fine), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(16, 16), (7, 12), (1, 5)], ids=str)
def test_what_is_known_is_spread_smoothly(size: tuple[int, int]) -> None:
    values = torch.full((1, 2, *size), 0.7)
    known = torch.zeros(1, 1, *size)
    assert not spread(values, known).any(), "zero where nothing is known"
    known[..., -1:, -2:] = 1
    torch.testing.assert_close(spread(values, known), values)
    torch.manual_seed(0)
    values, known = torch.rand(1, 2, *size), (torch.rand(1, 1, *size) < 0.5).float()
    known[..., 0, 0] = 1
    made = spread(values, known)
    assert torch.equal(made * known, values * known)
    assert torch.equal(made, spread(values + (1 - known), known)), "what is not known has no influence"
    inside = (values * known).flatten()[(known.expand_as(values) > 0).flatten()]
    assert made.min() >= inside.min() - 1e-6 and made.max() <= inside.max() + 1e-6


def test_what_is_hidden_has_no_influence() -> None:
    input, srcs, flows = scene()
    layer = propagation()
    with torch.no_grad():
        before = layer(input, srcs, flows)
        after = layer(with_hidden(input), with_hidden(srcs), flows)
    assert torch.equal(before.colours, after.colours) and torch.equal(before.unseen, after.unseen)


def test_what_is_known_stays_and_shares_are_of_colours_that_are_there() -> None:
    input, srcs, flows = scene()
    known = 1 - input[:, 3:]
    with torch.no_grad():
        guess = propagation()(input, srcs, flows)
        blind = propagation()(input, torch.cat([srcs[:, :, :3], torch.ones_like(srcs[:, :, 3:])], 2), flows)
    assert torch.equal(guess.colours * known, input[:, :3]) and not (guess.unseen * known).any()
    assert (guess.unseen >= 0).all() and (guess.unseen <= 1).all()
    # References that show nothing leave the surroundings.
    torch.testing.assert_close(blind.unseen, input[:, 3:])
    torch.testing.assert_close(blind.colours, spread(input[:, :3], known))


def test_training_begins_with_the_mean_of_what_is_seen() -> None:
    input = torch.full((1, 4, 8, 8), 0.5)
    input[:, 3] = 0
    input[..., 2:6, 2:6] = torch.tensor([0.0, 0, 0, 1]).view(4, 1, 1)
    srcs = torch.full((1, 2, 4, 8, 8), 0.5)  # like the target where it is known
    srcs[:, :, 3] = 0
    srcs[:, 0, :3, 2:6, 2:6], srcs[:, 1, :3, 2:6, 2:6] = 0.9, 0.3
    layer = propagation()
    layer.initialise()
    with torch.no_grad():
        colours = layer(input, srcs, torch.zeros(1, 2, 2, 8, 8)).colours
    share = torch.exp(torch.tensor(-4.0)) / (4 + torch.exp(torch.tensor(-4.0)))  # of the surroundings
    expected = (1 - share) * 0.6 + share * 0.5
    torch.testing.assert_close(colours[..., 2:6, 2:6], expected.expand(1, 3, 4, 4))


def test_changes_of_colour_are_matched() -> None:
    """A reference that is brighter everywhere by the same amount can be used without a seam."""
    truth = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 0.8
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 5:11, 5:11] = 1
    input = torch.cat([truth * (1 - mask), mask], dim=1)
    srcs = torch.cat([truth + 0.1, torch.zeros_like(mask)], dim=1)[:, None]
    layer = propagation()
    torch.nn.init.zeros_(layer.shares.weight)
    with torch.no_grad():
        layer.shares.bias.copy_(torch.tensor([-30.0, 0.0, -30.0]))  # the matched colours alone
        made = layer(input, srcs, torch.zeros(1, 1, 2, SIDE, SIDE)).colours
    torch.testing.assert_close(made, truth)


def test_references_may_come_in_any_order() -> None:
    input, srcs, flows = scene(T=3)
    order = [2, 0, 1]
    with torch.no_grad():
        one, other = propagation()(input, srcs, flows), propagation()(input, srcs[:, order], flows[:, order])
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_a_generator_begins_with_the_guess_and_keeps_what_is_known() -> None:
    input, srcs, flows = scene()
    torch.manual_seed(0)
    generator = build_generator(SMALL)
    errors = torch.zeros(2, 2, 1, SIDE, SIDE)
    made = generator(input, srcs, flows, errors)
    guess = generator.train()._guess(input, srcs, flows)
    assert isinstance(guess, Guess)
    torch.testing.assert_close(made, guess.colours)
    torch.nn.init.normal_(generator.decoder.out.weight, std=10)
    for mode in (True, False):
        with torch.no_grad():
            made = generator.train(mode)(input, srcs, flows, errors)
        assert torch.equal(made * (1 - input[:, 3:]), input[:, :3])
        assert ((made < 0) | (made > 1)).any().item() == mode


def test_published_configurations_propagate_no_pixels() -> None:
    for name in ("ours_no_ffc", "lama", "transformer"):
        assert "pixels" not in NAMED[name]
        generator = build_generator({**NAMED[name], "width": 4, "downsamplings": 1, "blocks": 1})
        assert not any("pixels" in key for key in generator.published_names())
    assert not build_generator("lama").needs_flow


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pixels": -1}, "width: expected"),
        ({"in_channels": 5}, "in_channels: expected 4 to propagate pixels, got 5"),
        ({"out_channels": 4}, "out_channels: expected 3 to propagate pixels, got 4"),
    ],
)
def test_wrong_configurations(changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_generator({**SMALL, **changed})


def test_flow_is_needed_without_aggregation_too() -> None:
    generator = build_generator({**SMALL, "aggregates": False})
    input, srcs, flows = scene()
    assert generator.needs_flow and generator(input, srcs, flows).shape == (2, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="flows: expected a tensor"):
        generator(input, srcs)
    other = build_generator({**SMALL, "aggregates": False, "pixels": 0}).eval()
    with pytest.raises(ValueError, match="built otherwise"):
        generator.eval()(input, references=other.encode_references(srcs), flows=flows)
