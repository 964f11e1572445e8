"""Recipes as data, and that each ingredient does what its paper says."""

from __future__ import annotations

import re
from dataclasses import fields, make_dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, strategies
from torch.utils.data import TensorDataset
from torchvision.transforms import v2
from toy import QUICK, network, same, weights

import zoo
from zoo.cli import main
from zoo.data.batches import Augmentation, DeviceLoader
from zoo.data.rand_augment import KINDS, rand_augmented
from zoo.errors import DataError, DocumentError, ZooError
from zoo.search import fidelities
from zoo.search.fidelities import FineTuning
from zoo.training.accelerators import make_accelerator
from zoo.training.engine import Engine
from zoo.training.finetuning import finetune
from zoo.training.recipes import RECIPES, Recipe, read_recipe

EVERYTHING = Recipe(
    epochs=3, batch_size=32, optimizer="adamw", lr=1, momentum=0.5, weight_decay=0.1, warmup=0.5,
    label_smoothing=0.1, clip_norm=float("inf"), augment=False, distill=0.5, precision="bf16",
    accumulate=2, ema=0.9, mixup=0.2, cutmix=1, rand_augment=7, crop_scale=0.2,
    compile=True,
)  # fmt: skip


def test_a_toml_file_holds_every_field(tmp_path):
    lines = [f"{f.name} = {getattr(EVERYTHING, f.name)!r}" for f in fields(Recipe)]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines).replace("True", "true").replace("False", "false"))
    assert read_recipe(path) == read_recipe(str(path)) == EVERYTHING
    assert all(getattr(EVERYTHING, f.name) != f.default for f in fields(Recipe))


def test_a_name_a_file_and_a_recipe_train_alike(toy_images, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("epochs = 2\nlr = 0.05\n")
    results = []
    for recipe in ("quick", path, RECIPES["quick"]):
        model = network()
        finetune(model, toy_images, toy_images, recipe=recipe, cpu=True)
        results.append(weights(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epoch = 3", r"unknown key 'epoch'. Did you mean 'epochs'\?"),
        ("epochs = 1.5", "epochs: expected an integer, got 1.5"),
        ("augment = 1", "augment: expected bool"),
        ("lr = true", "lr: expected a number"),
        ('optimizer = "adam"', r"'adam'. Did you mean 'adamw'\? Known: sgd, adamw"),
        ("epochs = 0", "epochs must be at least 1, got 0"),
        ("distill = 1.2", r"distill must be from 0 to 1, got 1\.2"),
        ("lr = nan", "lr must be at least 0, got nan"),
        ("epochs 3", "is not valid TOML"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, text, told):
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DocumentError, match=rf"mine\.toml.*{told}"):
        read_recipe(path)


@pytest.mark.parametrize(
    "wrong",
    [{"optimizer": "sdg"}, {"precision": "fp8"}, {"accumulate": 0}, {"epochs": 2.5}, {"lr": "0.1"}],
)
def test_a_bad_value_is_refused_in_python_too(wrong):
    with pytest.raises(ZooError, match=next(iter(wrong))):
        Recipe(**wrong)


@pytest.mark.parametrize("wrong", [{"epochs": 1}, None, 3])
def test_what_is_no_recipe_is_told_what_is(toy_images, wrong):
    told = rf"or a zoo\.Recipe, as .*; got {type(wrong).__name__} {re.escape(repr(wrong))}"
    with pytest.raises(ZooError, match=told):
        finetune(network(), toy_images, None, recipe=wrong)
    with pytest.raises(ZooError, match=told):
        zoo.prune_iteratively(network(), toy_images, None, zoo.Schedule(2, recipe=wrong))


def test_the_command_line_takes_a_file(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text("epochs = 1\nbatch_size = 500\nrand_augmen = 1\n")
    train = ["train", "--arch", "cnet", "--data", "digits", "--size", "8"]
    flags = ["--recipe", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "x.safetensors")]
    assert main([*train, *flags]) == 2
    assert "Did you mean 'rand_augment'?" in capsys.readouterr().err
    (tmp_path / "mine.toml").write_text("epochs = 1\nbatch_size = 500\n")
    assert main([*train, *flags]) == 0


def test_a_ledger_answers_for_no_other_default_and_no_other_training_code(monkeypatch):
    """Every field is in the key, those that have their default too, and so is the code."""
    names = {FineTuning(Recipe(epochs=1)).name, FineTuning(Recipe(epochs=1, ema=0.9)).name}
    explicit = FineTuning(Recipe(epochs=1, warmup=0.2)).name
    assert explicit in names
    changed = make_dataclass("Changed", [("warmup", float, 0.5)], bases=(Recipe,), frozen=True)
    assert Recipe().warmup != changed().warmup
    names.add(FineTuning(changed(epochs=1)).name)
    assert FineTuning(changed(epochs=1, warmup=0.2)).name == explicit
    monkeypatch.setattr(fidelities, "TRAINING", fidelities.TRAINING + 1)
    names.add(FineTuning(Recipe(epochs=1)).name)
    assert len(names) == 4


# --- ingredients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [False, True])
def test_accumulating_equals_the_larger_batch_unless_statistics_are_per_batch(
    toy_images, batch_norm
):
    """96 images in micro-batches of 20 with three to a step: the last step has fewer."""
    losses = []
    for size, accumulate in ((20, 3), (60, 1)):
        model = network()
        del model[5]  # dropout draws per batch
        if not batch_norm:
            del model[1]
        recipe = replace(QUICK, batch_size=size, accumulate=accumulate, clip_norm=0.1)
        toys = toy_images.subset(torch.arange(60))
        history = finetune(model, toys, None, recipe=recipe, cpu=True).history
        losses.append([record.loss for record in history])
    close = losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert close != batch_norm


def test_a_step_that_is_cut_short_weighs_its_batches_alike():
    """Five batches, two to a step: the gradients that steps see, on a network of one weight."""
    model = torch.nn.Linear(1, 2, bias=False)
    images = torch.arange(1.0, 6).reshape(5, 1, 1, 1)
    model = torch.nn.Sequential(torch.nn.Flatten(), model)
    batches = [(image[None], torch.tensor([0])) for image in images]
    recipe = Recipe(epochs=1, accumulate=2, lr=0, clip_norm=None)
    engine = Engine(model, batches, recipe, make_accelerator(recipe, cpu=True), None)
    seen = []
    step = engine._step

    def noted() -> None:
        seen.append(model[1].weight.grad.clone())
        step()

    engine._step = noted
    engine.train(lambda *_: None)
    each = []
    for image, label in batches:
        loss = torch.nn.functional.cross_entropy(model(image), label)
        each.append(torch.autograd.grad(loss, model[1].weight)[0])
    wanted = [(each[0] + each[1]) / 2, (each[2] + each[3]) / 2, each[4]]
    for own, other in zip(seen, wanted, strict=True):
        assert torch.allclose(own, other, atol=1e-7)


def one_step(teacher=None, **options) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, logits before it, labels and the gradient of a step, on a network of one layer."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 4, 1, 1, generator=generator)
    labels = torch.tensor([0, 2, 1, 1, 0])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3, bias=False))
    logits = model(images).detach()
    recipe = Recipe(epochs=1, **{"clip_norm": None} | options)
    engine = Engine(model, [(images, labels)], recipe, make_accelerator(recipe, cpu=True), teacher)
    seen = []
    engine._optimizer.register_step_pre_hook(lambda *_: seen.append(model[1].weight.grad.clone()))
    return engine.train(lambda *_: None), logits, labels, seen[0]


def test_a_gradient_beyond_the_norm_is_scaled_to_it_and_no_other():
    *_, whole = one_step()
    norm = whole.norm().item()
    *_, clipped = one_step(clip_norm=norm / 3)
    *_, left = one_step(clip_norm=norm * 1.01)
    assert torch.allclose(clipped, whole / 3, rtol=1e-4)
    assert torch.equal(left, whole)


def test_smoothed_labels_share_out_their_part_among_all_classes():
    loss, logits, labels, _ = one_step(label_smoothing=0.3)
    shares = torch.full((5, 3), 0.1)
    shares[range(5), labels] += 0.7
    expected = -(shares * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_distillation_is_hintons_at_temperature_four():
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    plain, logits, _, _ = one_step()
    generator = torch.Generator().manual_seed(0)
    wanted = teacher(torch.randn(5, 4, 1, 1, generator=generator)).detach()
    p, q = ((z / 4).exp() / (z / 4).exp().sum(1, keepdim=True) for z in (wanted, logits))
    divergence = (p * (p / q).log()).sum(1).mean().item()
    loss, *_ = one_step(teacher, distill=0.25)
    assert loss == pytest.approx(0.75 * plain + 0.25 * 16 * divergence, rel=1e-5)


def test_averaged_weights_are_what_is_measured_and_kept(toy_images):
    """Against an average taken by hand of the same run's weights, statistics included."""
    recipe = replace(QUICK, epochs=2, ema=0.5)
    snapshots = []
    original = Engine._step

    def noted(self: Engine) -> None:
        original(self)
        snapshots.append(weights(self.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_step", noted)
        model = network()
        finetune(model, toy_images, None, recipe=recipe, cpu=True)
    average = snapshots[0]
    for number, state in enumerate(snapshots[1:], 1):
        decay = min(0.5, 1 - (1 + number) ** (-2 / 3))
        average = {
            name: average[name] * decay + tensor * (1 - decay) if tensor.is_floating_point()
            else tensor
            for name, tensor in state.items()
        }  # fmt: skip
    assert len(snapshots) == 12
    for name, tensor in weights(model).items():
        assert torch.allclose(tensor, average[name], atol=1e-6)
    assert not same(weights(model), snapshots[-1])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_are_of_two_and_their_labels_weigh_them(kind):
    """Constant images: the share of each pixel value is the probability of its label."""
    labels = torch.arange(6) % 3
    images = labels.float().view(6, 1, 1, 1).expand(6, 3, 8, 8).contiguous()
    recipe = Recipe(**{kind: 1.0})
    model = network()
    engine = Engine(model, [(images, labels)], recipe, make_accelerator(recipe, cpu=True), None)
    batch = engine._checked((images, labels))
    torch.manual_seed(0)
    mixed, targets = engine._mixed(*batch)
    values = torch.arange(3.0)
    assert targets.shape == (6, 3)
    assert torch.allclose(targets.sum(1), torch.ones(6))
    assert torch.allclose(mixed.mean((1, 2, 3)), targets @ values, atol=1e-6)
    assert (targets.max(1).values < 1).any()
    if kind == "cutmix":
        assert set(mixed.unique().tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("recipe", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_trains_and_still_refuses_labels_that_do_not_fit(toy_images, recipe):
    model = network()
    recipe = replace(QUICK, epochs=8, label_smoothing=0.1, **recipe)
    assert finetune(model, toy_images, toy_images, recipe=recipe, cpu=True).accuracy > 0.95
    wrong = replace(toy_images, labels=toy_images.labels + 1)
    with pytest.raises(DataError, match="has 3 outputs"):
        finetune(network(), wrong, None, recipe=recipe)


def test_each_image_is_changed_by_torchvisions_operations_that_it_drew(toy_images, monkeypatch):
    draws = torch.randint(KINDS, (96, 2), generator=torch.Generator().manual_seed(0))
    changed = rand_augmented(toy_images.images, 12, draws)
    assert draws.unique().tolist() == list(range(KINDS))
    script: list[int] = []
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(script[0] // 2))
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(1.0 - script[0] % 2))
    for image, kinds, result in zip(toy_images.images, draws.tolist(), changed, strict=True):
        for script[:] in ([kind] for kind in kinds):
            image = v2.RandAugment(num_ops=1, magnitude=12)(image)
        assert torch.equal(result, image)


@given(data=strategies.data(), magnitude=strategies.integers(1, 30))
def test_what_rand_augment_does_to_an_image_does_not_depend_on_the_others(data, magnitude):
    count = data.draw(strategies.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(strategies.integers(0, 99)))
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    draws = torch.randint(KINDS, (count, 2), generator=generator)
    before = images.clone()
    together = rand_augmented(images, magnitude, draws)
    order = torch.randperm(count, generator=generator)
    assert torch.equal(rand_augmented(images[order], magnitude, draws[order]), together[order])
    for image, own, changed in zip(images, draws, together, strict=True):
        assert torch.equal(rand_augmented(image[None], magnitude, own[None])[0], changed)
    assert torch.equal(images, before)


def test_rand_augment_changes_most_images_and_no_generator(toy_images):
    loader = DeviceLoader(toy_images, 32, augment=Augmentation(crop=False, rand_augment=12), seed=3)
    before = torch.random.get_rng_state()
    first, second = (torch.cat([batch for batch, _ in loader]) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    plain = toy_images.normalise(toy_images.images)
    assert (first != plain).flatten(1).any(1).float().mean() > 0.7
    assert not torch.equal(first, second)


def test_rand_augment_refuses_data_that_it_cannot_change(toy_images):
    tensors = TensorDataset(toy_images.normalise(toy_images.images), toy_images.labels)
    with pytest.raises(DataError, match=r"rand_augment=5.*TensorDataset"):
        finetune(network(), tensors, None, recipe=replace(QUICK, rand_augment=5))


def test_a_compiled_step_gives_the_same_weights_and_leaves_an_ordinary_network(
    toy_images, monkeypatch
):
    graphs, original = [], torch.compile

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    def eager(model: torch.nn.Module, **options: object) -> object:
        return original(model, **options | {"backend": backend})

    results = []
    for compiled in (False, True):
        monkeypatch.setattr(torch, "compile", eager if compiled else partial(pytest.fail, "asked"))
        model = network()
        recipe = replace(QUICK, epochs=2, compile=compiled)
        finetune(model, toy_images, toy_images, recipe=recipe, cpu=True)
        results.append(weights(model))
        assert type(model) is torch.nn.Sequential
    assert graphs
    assert same(*results)
