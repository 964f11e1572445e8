"""What a step of training does: layouts, precisions, rates, decay, averages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from toy import QUICK, network, same, weights

from zoo.data.batches import DeviceLoader
from zoo.errors import ZooError
from zoo.training import engine
from zoo.training.accelerators import make_accelerator
from zoo.training.averaging import WeightAverage
from zoo.training.finetuning import evaluate, finetune
from zoo.training.optimization import make_optimizer, warmup_cosine


def test_images_and_weights_are_channels_last(toy_images):
    model, seen = network(), []
    model[0].register_forward_hook(lambda layer, given, _: seen.extend([given[0], layer.weight]))
    for data in (toy_images, TensorDataset(torch.zeros(32, 3, 8, 8), torch.arange(32) % 3)):
        seen.clear()
        finetune(model, data, data, recipe=replace(QUICK, epochs=1))
        assert seen
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)


def test_half_precision_is_of_the_training_alone_every_time(toy_images):
    """Neither network's forward is changed: what is measured is what is measured afterwards."""
    model, teacher = network(), network(seed=9)
    seen: dict[bool, set[torch.dtype]] = {}
    taught: set[torch.dtype] = set()
    model[0].register_forward_hook(
        lambda layer, _, output: seen.setdefault(layer.training, set()).add(output.dtype)
    )
    teacher[0].register_forward_hook(lambda _, __, output: taught.add(output.dtype))
    recipe = replace(QUICK, epochs=1, precision="bf16")
    for _ in range(2):
        seen.clear()
        taught.clear()
        result = finetune(model, toy_images, toy_images, teacher=teacher, recipe=recipe, cpu=True)
        assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
        assert taught == {torch.bfloat16}
        assert result.accuracy == evaluate(model, toy_images).accuracy
        assert not {"forward", "_is_accelerate_prepared"} & set(vars(model))


def test_a_cpu_does_not_pretend_to_train_in_fp16(toy_images):
    with pytest.raises(ZooError, match="fp16: choose the precision bf16"):
        finetune(network(), toy_images, None, recipe=replace(QUICK, precision="fp16"), cpu=True)


def test_precision_and_device_may_change_from_run_to_run(toy_images):
    for precision, cpu in (("fp32", False), ("bf16", False), ("fp32", True)):
        model = network()
        recipe = replace(QUICK, epochs=1, precision=precision)
        assert math.isfinite(
            finetune(model, toy_images, toy_images, recipe=recipe, cpu=cpu).accuracy
        )
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        assert (
            model(torch.zeros(1, 3, 8, 8, device=next(model.parameters()).device)).dtype
            == torch.float32
        )


@pytest.mark.parametrize("recipe", [QUICK, replace(QUICK, optimizer="adamw", lr=0.01)])
def test_biases_and_norms_do_not_decay(recipe):
    model = network()
    decays = {
        id(parameter): group["weight_decay"]
        for group in make_optimizer(model, recipe).param_groups
        for parameter in group["params"]
    }
    assert len(decays) == len(list(model.parameters()))
    assert all((decays[id(p)] > 0) == (p.ndim > 1) for p in model.parameters())


def test_without_momentum_every_step_is_the_gradient(toy_images):
    recipe = replace(QUICK, momentum=0, weight_decay=0)
    model = network()
    before = weights(model)
    optimizer = make_optimizer(model, recipe)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 2 * QUICK.lr)
    finetune(model, toy_images, None, recipe=recipe)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [warmup_cosine(10, 100)(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0)


@pytest.mark.gpu
@pytest.mark.parametrize("change", [{}, {"ema": 0.5}, {"mixup": 0.4}])
def test_a_step_waits_for_nothing_on_cuda(toy_images, change):
    recipe = replace(QUICK, precision="bf16", **change)
    accelerator = make_accelerator(recipe, cpu=False)
    loader = DeviceLoader(toy_images, 16, device="cuda", augment=True, shuffle=True)
    model, teacher = network().cuda().train(), network(seed=9).cuda().eval()
    trainer = engine.Engine(model, loader, recipe, accelerator, teacher)
    batches = iter(loader)
    for _ in range(2):  # the first steps look at the labels, and make what is made once
        trainer._loss(*trainer._checked(*next(batches))).backward()
        trainer._step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._loss(*trainer._checked(*next(batches))).backward()
        trainer._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_frozen_batch_norms_keep_their_statistics_and_all_frozen_is_an_error(toy_images):
    model = network()
    model[1].requires_grad_(False)
    before = weights(model)
    finetune(model, toy_images, toy_images, recipe=QUICK)
    after = weights(model)
    own = [name for name in before if name.startswith("1.")]
    assert same({name: before[name] for name in own}, after)
    assert not same({"0.weight": before["0.weight"]}, after)
    with pytest.raises(ZooError, match="all is frozen"):
        finetune(network().requires_grad_(False), toy_images, None, recipe=QUICK)


def test_a_network_that_keeps_a_tensor_of_its_first_pass_can_be_trained(toy_images):
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.grid = network(), None

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.grid is None:
                self.grid = torch.ones_like(images[:1, :1]) * 2
            return self.inner(images * self.grid)

    result = finetune(Keeping(), toy_images, toy_images, recipe=QUICK)
    assert len(result.history) == QUICK.epochs


def test_the_accelerator_of_the_caller_is_left_alone(toy_images):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    before = Accelerator(cpu=True, mixed_precision="bf16")
    finetune(network(), toy_images, None, recipe=replace(QUICK, epochs=1))
    assert before.state.mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune(network(), toy_images, None, recipe=replace(QUICK, epochs=1))
    assert Accelerator(cpu=True, mixed_precision="bf16").state.mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not PartialState._shared_state


def test_a_tied_weight_moves_once_in_the_average():
    model = network()
    model[6].weight = nn.Parameter(torch.zeros(3, 8))
    model.add_module("twin", nn.Linear(8, 3))
    model.twin.weight = model[6].weight
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model[6].weight.fill_(1.0)
        average.apply_update_(model, 0.75)
    assert torch.allclose(average.module.twin.weight, torch.full((3, 8), 0.25))
    assert average.module.twin.weight is average.module[6].weight


class Tutorial(nn.Module):
    """The network of most tutorials: maps are viewed as rows, which only contiguous ones can be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 8 * 8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(x.view(-1, 8 * 8 * 8))


def test_a_network_that_views_its_maps_as_rows_is_trained_and_stays_usable() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(64, 3, 8, 8, generator=generator), torch.arange(64) % 4
    data = TensorDataset(images, labels)
    torch.manual_seed(0)
    model = Tutorial()
    measured = evaluate(model, data)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).double().mean().item()
    assert measured.accuracy == pytest.approx(right)
    before = measured.loss
    finetune(model, data, data, teacher=Tutorial(), recipe="quick")
    assert evaluate(model, data).loss < before
    assert model(images).shape == (64, 4)  # in the layout that it was left in
