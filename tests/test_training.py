"""Training: every term of the objective, the schedule and a whole run against the published numbers."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gi_model import export_published, load_published
from gi_model.discriminator import Discriminator
from gi_model.errors import InputError
from gi_model.training import (
    Adversarial,
    Alternation,
    Batch,
    Objective,
    PerceptualLoss,
    SceneEncoder,
    Step,
    WarmUpCosine,
    Weights,
    feature_matching,
    weighted_l1,
)
from gi_model.training.step import frozen

FOLDER = Path(__file__).parent / "golden"
_module = importlib.util.spec_from_file_location("golden_recipe", FOLDER / "recipe.py")
recipe = importlib.util.module_from_spec(_module)
_module.loader.exec_module(recipe)


def read(name: str) -> tuple[Callable[[str], torch.Tensor], dict[str, Any]]:
    """Golden tensors by their names, and what is said about them."""
    stored = np.load(FOLDER / f"{name}.npz")
    return lambda key: torch.from_numpy(stored[key]), json.loads(str(stored["meta"]))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.detach().double(), expected.double(), rtol=rtol, atol=atol)


def published_discriminator(width: int = 64, layers: int = 4) -> Discriminator:
    made = Discriminator(3, width, layers)
    load_published(made, recipe.weights(export_published(made), ""))
    return made


def published_perceptual(frozen: bool) -> PerceptualLoss:
    loss = PerceptualLoss(frozen=frozen)
    loss.load_encoder(recipe.weights(loss.encoder.state_dict(), ""))
    return loss


PIXELS, PIXEL_CASES = read("pixel_losses")


@pytest.mark.parametrize("kind", ["mask", "softmask"])
@pytest.mark.parametrize("case", PIXEL_CASES["cases"])
def test_weighted_l1(case: str, kind: str) -> None:
    predicted = recipe.uniform("pix/pred", 2, 3, 20, 24).requires_grad_()
    mask = PIXELS("mask").float() if kind == "mask" else recipe.uniform("pix/softmask", 2, 1, 20, 24)
    known, missing = PIXEL_CASES["cases"][case].values()
    loss = weighted_l1(predicted, recipe.uniform("pix/target", 2, 3, 20, 24), mask, known, missing)
    assert_near(loss, PIXELS(f"l1/{case}/{kind}"))
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert_near(gradient.norm(), PIXELS(f"l1/{case}/{kind}/grad_norm"), rtol=1e-3)


def test_feature_matching() -> None:
    golden, about = read("feature_matching")
    shapes = [about["inputs"][f"fm/fake{i}"]["shape"] for i in range(3)]
    fake = [recipe.normal(f"fm/fake{i}", *shape).requires_grad_() for i, shape in enumerate(shapes)]
    real = [recipe.normal(f"fm/real{i}", *shape) for i, shape in enumerate(shapes)]
    for mask, suffix in ((None, ""), (golden("mask").float(), "_masked")):
        loss = feature_matching(fake, real, mask)
        assert_near(loss, golden(f"value{suffix}"))
        norms = torch.stack([g.norm() for g in torch.autograd.grad(loss, fake)])
        assert_near(norms, golden(f"grad_norms{suffix}"), rtol=1e-3)
    discriminator = published_discriminator()
    predicted = recipe.uniform("fm/pred_image", 2, 3, 64, 64).requires_grad_()
    features = [discriminator(i)[1] for i in (predicted, recipe.uniform("fm/target_image", 2, 3, 64, 64))]
    loss = feature_matching(*features)
    assert_near(loss, golden("disc/f32/value"))
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert_near(gradient.norm(), golden("disc/f32/grad_norm"), rtol=1e-3)


R1, R1_CASES = read("adversarial_r1")
# Published names of the arguments -> ours; the published defaults differ from the published configuration.
DEFAULTS = {
    "weight": 1, "gp_coef": 5, "mask_as_fake_target": False, "extra_mask_weight_for_gen": 0,
    "use_unmasked_for_gen": True, "use_unmasked_for_discr": True, "mask_scale_mode": "nearest",
}  # fmt: skip


def published_adversarial(options: dict[str, Any]) -> Adversarial:
    given = {**DEFAULTS, **options}
    return Adversarial(
        weight=given["weight"],
        penalty=given["gp_coef"],
        mask_as_target=given["mask_as_fake_target"],
        masked_generator=not given["use_unmasked_for_gen"],
        masked_discriminator=not given["use_unmasked_for_discr"],
        extra=given["extra_mask_weight_for_gen"],
        scaling=given["mask_scale_mode"],
    )


@pytest.mark.parametrize("config", R1_CASES["configs"])
@pytest.mark.parametrize("case", R1_CASES["cases"])
def test_adversarial(case: str, config: str) -> None:
    loss = published_adversarial(R1_CASES["configs"][config])
    shape, name = R1_CASES["cases"][case]["shape"], f"{case}/{config}/f32"
    real, fake = (recipe.uniform(f"r1/{case}/{kind}", *shape) for kind in ("real", "fake"))
    mask = R1(f"{case}/mask").float()
    discriminator = published_discriminator()
    terms = loss.discriminator_terms(discriminator, real, fake, mask)
    assert_near(terms.loss, R1(f"{name}/discr_loss"))
    assert_near(terms.real, R1(f"{name}/metric_discr_real_out"))
    assert_near(terms.fake, R1(f"{name}/metric_discr_fake_out"))
    assert_near(terms.penalty, R1(f"{name}/metric_discr_real_gp"))
    assert not real.requires_grad and not fake.requires_grad
    if config == "ours":
        terms.loss.backward()
        named = export_published(discriminator)
        own = dict(discriminator.named_parameters())
        order = [k for k in named if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        assert order == R1_CASES["param_order"]
        norms = torch.stack([p.grad.double().norm() for p in own.values()])
        # Biases in front of a batch norm have no gradient but rounding.
        assert_near(norms, R1(f"{name}/discr_param_grad_norms"), rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            without = loss.discriminator_terms(published_discriminator(), real, fake, mask)
        assert_near(without.loss, R1(f"{name}/discr_loss_grad_disabled"))
        assert without.penalty == 0

    predicted = fake.clone().requires_grad_()
    value = loss.generator_loss(published_discriminator()(predicted)[0], mask)
    assert_near(value, R1(f"{name}/gen_loss"))
    if config == "ours":
        (gradient,) = torch.autograd.grad(value, predicted)
        assert_near(gradient.norm(), R1(f"{name}/gen_grad_norm"), rtol=1e-3)
        assert_near(gradient[0, :, :4, :4], R1(f"{name}/gen_grad_head"), rtol=1e-3)


def test_adversarial_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="masked_generator"):
        Adversarial(masked_generator=True)
    with pytest.raises(ValueError, match="mask_as_target=False"):
        Adversarial(masked_discriminator=True)
    with pytest.raises(ValueError, match="scaling: expected"):
        Adversarial(scaling="cubic")


PERCEPTUAL, PERCEPTUAL_CASES = read("resnet_pl")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", PERCEPTUAL_CASES["cases"])
def test_perceptual(case: str, mode: str) -> None:
    loss = published_perceptual(frozen=mode == "eval")
    assert [list(v.shape) for v in loss.encoder.state_dict().values()] == list(
        PERCEPTUAL_CASES["encoder_state_dict"].values()
    )
    assert list(loss.encoder.state_dict()) == list(PERCEPTUAL_CASES["encoder_state_dict"])
    shape, name = PERCEPTUAL_CASES["cases"][case]["shape"], f"{case}/{mode}/f32"
    predicted = recipe.uniform(f"resnet_pl/{case}/pred", *shape).requires_grad_()
    value = loss(predicted, recipe.uniform(f"resnet_pl/{case}/target", *shape))
    assert_near(value, PERCEPTUAL(f"{name}/value"))
    (gradient,) = torch.autograd.grad(value, predicted)
    # Statistics of such small maps amplify rounding in training mode.
    assert_near(gradient.norm(), PERCEPTUAL(f"{name}/grad_norm"), rtol=5e-3 if mode == "train" else 1e-3)
    assert loss.encoder.bn1.num_batches_tracked == PERCEPTUAL(f"{name}/bn1.num_batches_tracked_after")
    assert_near(
        loss.encoder.layer1[0].bn1.running_mean[:8],
        PERCEPTUAL(f"{name}/layer1.0.bn1.running_mean_after_head"),
    )
    assert not any(p.requires_grad for p in loss.parameters())


def test_perceptual_frozen_stays_in_eval_mode() -> None:
    loss = PerceptualLoss(frozen=True)
    assert not loss.train().encoder.training and loss.training
    assert PerceptualLoss().encoder.training and not PerceptualLoss().eval().encoder.training


def test_encoder_files_are_checked_before_anything_is_loaded() -> None:
    loss = PerceptualLoss()
    before = {k: v.clone() for k, v in loss.encoder.state_dict().items()}
    state = recipe.weights(before, "")
    extra = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")} | {
        "fc.weight": torch.ones(1)
    }
    loss.load_encoder(extra)
    assert torch.equal(loss.encoder.conv1.weight, state["conv1.weight"])
    loss = PerceptualLoss()
    loss.encoder.load_state_dict(before)
    wrong = dict(state, **{"layer1.0.conv1.weight": torch.ones(3)})
    del wrong["conv2.weight"]
    with pytest.raises(
        InputError, match=r"conv2.weight is missing.*layer1.0.conv1.weight has shape \[3\], expected"
    ):
        loss.load_encoder(wrong)
    assert all(torch.equal(v, before[k]) for k, v in loss.encoder.state_dict().items())


@pytest.mark.parametrize("frozen", [False, True], ids=["train", "eval"])
def test_objective(frozen: bool) -> None:
    golden, _ = read("training_objective")
    name = f"resnet_pl_{'eval' if frozen else 'train'}"
    objective = Objective(perceptual=published_perceptual(frozen))
    image = recipe.uniform("objective/image", 2, 3, 64, 64)
    predicted = recipe.uniform("objective/pred", 2, 3, 64, 64).requires_grad_()
    mask = golden("mask").float()
    terms = objective.generator_terms(published_discriminator(), predicted, image, mask)
    for term, value in terms.items():
        assert_near(value, golden(f"{name}/gen_{term}"))
    total = torch.stack(list(terms.values())).sum()
    assert_near(total, golden(f"{name}/generator_total"))
    (gradient,) = torch.autograd.grad(total, predicted)
    assert_near(gradient.norm(), golden(f"{name}/grad_norm"), rtol=1e-3 if frozen else 5e-3)
    watched = objective.discriminator_terms(published_discriminator(), predicted, image, mask)
    assert_near(watched["adv"], golden("discriminator_total"))
    for term in ("real_out", "fake_out", "real_gp"):
        assert_near(watched[term], golden(f"discr/adv_discr_{term}"))


@pytest.mark.parametrize("case", ["ours", "short"])
def test_schedule(case: str) -> None:
    golden, about = read("lr_schedule")
    factor = WarmUpCosine(**about["cases"][case])
    multipliers = [factor(int(step)) for step in golden(f"{case}/step")]
    np.testing.assert_allclose(multipliers, golden(f"{case}/multiplier"), rtol=1e-12)
    with pytest.raises(ValueError, match="warm_up_steps"):
        WarmUpCosine(10, 10)


class Toy(nn.Module):
    """The generator of the published run of a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.ref = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.norm, self.tail = nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, input: torch.Tensor, srcs: torch.Tensor, flows: None, flow_errs: None) -> torch.Tensor:
        references = torch.stack([self.ref(s) for s in srcs.unbind(1)]).mean(dim=0)
        return torch.sigmoid(self.tail(F.relu(self.norm(self.head(input) + references))))


def toy_step(perceptual: PerceptualLoss | None) -> Step:
    step = Step(Toy(), published_discriminator(16, 3), Objective(perceptual=perceptual))
    recipe.fill(step.generator, "toy.")
    return step


def toy_sample(i: int) -> dict[str, torch.Tensor]:
    """Sample ``i`` of the published run, channels last in [-1, 1]."""

    def up(name: str, *shape: int) -> torch.Tensor:
        small = recipe.uniform(f"traj/{i}/{name}", *shape, 6, 6)
        return F.interpolate(small, (48, 48), mode="bilinear", align_corners=False)

    values = {
        "image": up("image", 1, 3)[0], "srcs": up("srcs", 2, 3),
        "mask": (up("mask", 1, 1)[0] > 0.5).float(), "srcs_masks": (up("srcs_masks", 2, 1) > 0.6).float(),
    }  # fmt: skip
    return {name: value.movedim(-3, -1) * 2 - 1 for name, value in values.items()}


def toy_batch(i: int, dtype: torch.dtype = torch.float32) -> Batch:
    samples = torch.utils.data.default_collate([toy_sample(2 * i), toy_sample(2 * i + 1)])
    return Batch.of_samples({name: value.to(dtype) for name, value in samples.items()})


@pytest.mark.parametrize("run", ["no_resnet_pl", "full"])
def test_published_run(run: str) -> None:
    golden, about = read("training_trajectory")
    torch.testing.assert_close(toy_sample(0)["image"], golden("sample0/image"))
    step = toy_step(published_perceptual(frozen=False) if run == "full" else None)
    # The penalty jumps where a number in front of a leaky ReLU rounds to the other side of zero, which
    # depends on the number of threads; in float64 it does not.
    dtype = torch.float32 if run == "full" else torch.float64
    step.to(dtype)
    rate = about["learning_rate"]
    optimizers = (
        torch.optim.Adam(step.generator.parameters(), rate),
        torch.optim.Adam(step.discriminator.parameters(), 0.1 * rate),
    )
    schedule = WarmUpCosine(**about["scheduler"])
    training = Alternation(step, optimizers, schedule, about["accumulate_grad_batches"])
    records = iter(about["runs"][run]["records"])
    # The whole run amplifies rounding: two runs of the original differ by 2e-3.
    rtol = 1e-2 if run == "full" else 1e-5
    for _ in range(about["epochs"]):
        for number in range(5):
            rates, steps = [o.param_groups[0]["lr"] for o in optimizers], training.global_step
            terms = training.batch(toy_batch(number, dtype), number, last=number == 4)
            for which, prefix in enumerate(("train_gen_", "train_adv_discr_")):
                record = next(records)
                assert (record["opt"], record["global_step"]) == (which, steps)
                np.testing.assert_allclose(rates, record["lr"], rtol=1e-9)
                loss = sum(terms[0].values()) if which == 0 else terms[1]["adv"]
                np.testing.assert_allclose(float(loss), record["loss"], rtol=rtol)
                for term, value in terms[which].items():
                    name = "train_discr_adv" if which and term == "adv" else prefix + term
                    np.testing.assert_allclose(float(value), record[name], rtol=rtol, atol=1e-6)
    assert training.global_step == about["runs"][run]["global_step_end"]
    final = {f"generator.{k}": v for k, v in step.generator.state_dict().items()}
    final |= {f"discriminator.{k}": v for k, v in export_published(step.discriminator).items()}
    for key in about["keys"]:
        name = f"{run}/final/{key}"
        if key.endswith("num_batches_tracked"):
            assert final[key] == golden(name)
        elif run == "no_resnet_pl" and key not in about["keys_with_noise_only_gradient"]:
            stored = name in np.load(FOLDER / "training_trajectory.npz")
            running = key.endswith("running_mean")
            if stored:
                assert_near(final[key], golden(name), rtol=1e-4, atol=2e-3 if running else 1e-5)
            norm = golden(f"{run}/final_norm")[about["keys"].index(key)]
            assert_near(final[key].norm(), norm, rtol=2e-3 if running else 1e-4)
    if run == "full":
        assert step.objective.perceptual.encoder.bn1.num_batches_tracked == 20


def test_passes_give_gradients_to_one_network_only() -> None:
    step = toy_step(None)
    step.generator_pass(toy_batch(0))[0].backward()
    assert all(p.grad is not None for p in step.generator.parameters())
    assert all(p.grad is None and p.requires_grad for p in step.discriminator.parameters())
    step.generator.zero_grad()
    step.discriminator_pass(toy_batch(0))[0].backward()
    assert all(p.grad is None for p in step.generator.parameters())
    assert all(p.grad is not None for p in step.discriminator.parameters())


@pytest.mark.parametrize(("adversarial", "matching"), [(0, 0), (0, 1), (0.1, 0)], ids=str)
def test_a_discriminator_that_nothing_depends_on_does_not_run(adversarial: float, matching: float) -> None:
    step = toy_step(None)
    step.objective = Objective(
        Adversarial(weight=adversarial), weights=Weights(l1_known=1, feature_matching=matching)
    )
    calls: list[int] = []
    step.discriminator.register_forward_hook(lambda *_: calls.append(1))
    before = [[p.clone() for p in network.parameters()] for network in (step.generator, step.discriminator)]
    optimizers = tuple(torch.optim.Adam(n.parameters(), 0.1) for n in (step.generator, step.discriminator))
    training = Alternation(step, optimizers, WarmUpCosine(warm_up_steps=0))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        # A schedule whose optimizer never steps would warn.
        warnings.filterwarnings("error", message=".*lr_scheduler")
        terms = training.batch(toy_batch(0), 0, last=True)
    judged = adversarial + matching > 0
    assert len(calls) == (4 if judged else 0) and training.global_step == 1
    assert ("adv" in terms[0], "adv" in terms[1], "fm" in terms[0]) == (judged, judged, matching > 0)
    networks = (step.generator, step.discriminator)
    for network, weights, learns in zip(networks, before, (True, judged), strict=True):
        same = [torch.equal(p, w) for p, w in zip(network.parameters(), weights, strict=True)]
        assert not all(same) if learns else all(same)


def test_frozen_restores_what_was_trained() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(layer):
        assert not layer.weight.requires_grad
        raise RuntimeError
    assert layer.weight.requires_grad and not layer.bias.requires_grad


def test_the_flow_sees_whole_frames_once() -> None:
    calls = []

    def stage(target: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((target, sources))
        assert not torch.is_grad_enabled()
        return torch.ones(2, 2, 2, 48, 48), torch.ones(2, 2, 1, 48, 48)

    samples = torch.utils.data.default_collate([toy_sample(0), toy_sample(1)])
    before = {name: value.clone() for name, value in samples.items()}
    batch = Batch.of_samples(samples, stage)
    ((target, sources),) = calls
    assert torch.equal(target, torch.cat([batch.image, batch.mask], dim=1))
    assert torch.equal(sources, torch.cat([batch.srcs, batch.srcs_masks], dim=2))
    assert batch.flows.shape == (2, 2, 2, 48, 48) and batch.errors.shape == (2, 2, 1, 48, 48)
    assert (batch.input[:, :3] * batch.mask == 0).all() and (
        batch.references[:, :, :3] * batch.srcs_masks == 0
    ).all()
    assert all(torch.equal(samples[name], before[name]) for name in samples), "the samples are not changed"
    composite = batch.composite(torch.zeros_like(batch.image))
    assert torch.equal(composite, batch.image * (1 - batch.mask))


def test_scene_encoder_is_dilated() -> None:
    maps = SceneEncoder().eval()(torch.rand(1, 3, 64, 48))
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 16, 12), (512, 8, 6), (1024, 8, 6), (2048, 8, 6)]
