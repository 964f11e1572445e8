"""What a user gives as data trains and is measured, or is one clear error."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from toy import QUICK, network, same, weights

import zoo
from zoo.data.batches import check_labels
from zoo.data.datasets import load_data
from zoo.errors import DataError
from zoo.models import build_model
from zoo.training import loaders
from zoo.training.finetuning import evaluate, finetune


@pytest.mark.parametrize("kind", ["image set", "dataset", "loader"])
def test_every_kind_of_data_trains(toy_images, kind):
    tensors = TensorDataset(toy_images.normalise(toy_images.images), toy_images.labels)
    data = {
        "image set": toy_images,
        "dataset": tensors,
        "loader": DataLoader(tensors, 16, shuffle=True, generator=torch.Generator().manual_seed(0)),
    }[kind]
    model = network()
    assert finetune(model, data, data, recipe=replace(QUICK, epochs=8)).accuracy > 0.95
    assert evaluate(model, data).images == 96


class Scaled(DataLoader):
    """Batches that are not those of its data set."""

    def __iter__(self):
        for images, labels in super().__iter__():
            yield images / 100, labels


def test_a_loader_with_a_loop_of_its_own_trains_on_what_that_gives(toy_images):
    images = 100 * toy_images.normalise(toy_images.images)
    results = []
    for kind, pixels in ((DataLoader, images / 100), (Scaled, images), (DataLoader, images)):
        order = torch.Generator().manual_seed(0)
        data = kind(TensorDataset(pixels, toy_images.labels), 16, shuffle=True, generator=order)
        model = network()
        result = finetune(model, data, data, recipe=QUICK, cpu=True)
        results.append((weights(model), [record.loss for record in result.history]))
    (plain, losses), (own, own_losses), (raw, _) = results
    assert same(own, plain)
    assert own_losses == losses
    assert not same(own, raw)


def test_a_loop_of_its_own_is_not_divided_between_processes(toy_images):
    data = Scaled(TensorDataset(torch.zeros(96, 3, 8, 8), toy_images.labels), 16)
    two = SimpleNamespace(num_processes=2, process_index=0)
    with pytest.raises(DataError, match=r"Scaled has an __iter__ of its own.* 2 processes"):
        loaders.training_batches(data, QUICK, two, seed=0)


def test_files_train_and_evaluate_as_the_same_images_in_memory_do(image_tree, monkeypatch):
    results = []
    for limit in (2**31, 0):
        monkeypatch.setattr("zoo.data.datasets.IN_MEMORY", limit)
        splits = load_data(f"imagefolder:{image_tree}", size=8)
        model = network(classes=2)
        result = finetune(model, splits.train, splits.val, recipe=replace(QUICK, batch_size=6))
        results.append((weights(model), result.accuracy, evaluate(model, splits.test)))
    assert same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_a_name_stands_for_its_splits(monkeypatch, toy_images):
    from zoo.data.datasets import Splits

    asked = []

    def load(name, root=None, *, size):
        asked.append((name, str(root), size))
        parts = [toy_images.subset(torch.arange(n)) for n in (60, 30, 6)]
        return Splits(*parts)

    monkeypatch.setattr(loaders, "load_data", load)
    model = network()
    finetune(model, "toy@/some/folder", "toy@/some/folder", recipe=replace(QUICK, epochs=1))
    assert evaluate(model, "toy@/some/folder").images == 6  # the test split
    assert set(asked) == {("toy", "/some/folder", 32)}
    asked.clear()
    small = zoo.load("cnet", 2, build_model("cnet", 3, image_size=8), image_size=8)
    for name in ("imagefolder:pets@home", "hf:org/pets@v1"):
        evaluate(small, name)
    assert asked == [("imagefolder:pets@home", "None", 8), ("hf:org/pets@v1", "None", 8)]


@pytest.mark.parametrize("label", [-1, 3, 255])
def test_labels_that_do_not_fit_the_network_are_refused(toy_images, label):
    labels = toy_images.labels.clone()
    labels[5] = label
    wrong = replace(toy_images, labels=labels)
    model = network()
    before = weights(model)
    with pytest.raises(DataError, match=f"{label}.*has 3 outputs"):
        evaluate(model, wrong)
    with pytest.raises(DataError, match="has 3 outputs"):
        finetune(model, toy_images, wrong, recipe=QUICK)
    assert same(weights(model), before)
    with pytest.raises(DataError, match="has 3 outputs"):
        finetune(model, wrong, toy_images, recipe=replace(QUICK, batch_size=96))
    assert same(weights(model), before)


def test_a_wrong_label_in_a_later_batch_is_refused_too(toy_images):
    labels = toy_images.labels.clone()
    labels[-1] = 3
    tensors = TensorDataset(toy_images.normalise(toy_images.images), labels)
    model = network()
    before = weights(model)
    with pytest.raises(DataError, match="has 3 outputs"):
        finetune(model, DataLoader(tensors, 16), toy_images, recipe=QUICK)
    assert same(weights(model), before)


@pytest.mark.parametrize("seed", range(17))
def test_a_wrong_label_is_refused_though_the_first_pass_leaves_it_out(toy_images, seed):
    """Each pass leaves one of 17 images out, with one of the seeds the wrong one."""
    labels = toy_images.labels.clone()
    labels[5] = -100  # what cross-entropy ignores
    wrong = replace(toy_images, labels=labels).subset(torch.arange(17))
    with pytest.raises(DataError, match="labels from -100"):
        finetune(network(), wrong, None, recipe=QUICK, seed=seed)


def test_labels_that_change_from_pass_to_pass_are_checked_in_each():
    class Changing(Dataset):
        asked = 0

        def __len__(self) -> int:
            return 96

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            self.asked += 1
            return torch.zeros(3, 8, 8), -100 if self.asked == 150 else index % 3

    with pytest.raises(DataError, match="labels from -100"):
        finetune(network(), Changing(), None, recipe=QUICK)


class Streamed(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(3, 8, 8), 0)])


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (torch.zeros(32, 3, 8, 8), torch.zeros(32), r"integers \(N,\).*float32 \(16,\)"),
        (torch.zeros(32, 3, 8, 8), torch.zeros(32, 1).long(), r"integers \(N,\).*int64 \(16, 1\)"),
        (torch.zeros(32, 3, 8, 8).byte(), torch.zeros(32).long(), "uint8, not floats.*ToDtype"),
    ],
)
def test_data_of_other_types_is_refused(toy_images, images, labels, told):
    data = TensorDataset(images, labels)
    with pytest.raises(DataError, match=told):
        finetune(network(), data, toy_images, recipe=QUICK)
    with pytest.raises(DataError, match=told):
        evaluate(network(), data, batch_size=16)


@pytest.mark.parametrize("data", [Streamed(), DataLoader(Streamed(), 16)])
def test_data_without_a_length_is_refused(toy_images, data):
    for train, val in ((data, toy_images), (toy_images, data)):
        with pytest.raises(DataError, match="no length"):
            finetune(network(), train, val, recipe=QUICK)


def test_short_integers_are_labels_too(toy_images):
    images = toy_images.normalise(toy_images.images)
    results = []
    for kind in (torch.int64, torch.int32, torch.uint8):
        model = network()
        data = TensorDataset(images, toy_images.labels.to(kind))
        finetune(model, data, data, recipe=replace(QUICK, epochs=1))
        results.append(weights(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("classes", [("r", "g"), ("r", "g", "b", "a")])
def test_a_set_of_more_or_fewer_classes_than_outputs_is_not_trained_on(toy_images, classes):
    other = replace(toy_images.subset(toy_images.labels.argsort()[:64]), classes=classes)
    with pytest.raises(DataError, match=f"toy has {len(classes)} classes, the network 3 outputs"):
        finetune(network(), other, None, recipe=QUICK)


def test_labels_are_checked_against_outputs():
    check_labels(torch.tensor([0, 2]), torch.zeros(2, 3))
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(DataError, match=r"labels from .* to .*, but the network has 3 outputs"):
            check_labels(torch.tensor(labels), torch.zeros(2, 3))
    with pytest.raises(DataError, match=r"Expected logits \(N, classes\).*\(2, 3, 4, 4\)"):
        check_labels(torch.tensor([0, 1]), torch.zeros(2, 3, 4, 4))


def test_empty_data_and_odd_outputs_are_refused(toy_images):
    empty = toy_images.subset(torch.arange(0))
    with pytest.raises(DataError, match="no images"):
        evaluate(network(), empty)
    with pytest.raises(DataError, match="no images"):
        finetune(network(), empty, toy_images)
    with pytest.raises(DataError, match=r"Expected logits \(N, classes\)"):
        evaluate(nn.Conv2d(3, 3, 1), toy_images)


class Samples(Dataset):
    """The given samples, as a data set gives them."""

    def __init__(self, *samples: object) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> object:
        return self.samples[index]


IMAGE = torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([(Image.new("RGB", (8, 8)), 0)] * 4, "images are Image, not tensors: .*ToImage"),
        ([(IMAGE, 0), (torch.zeros(3, 9, 8), 1)] * 2, "several shapes .*Resize"),
        ([{"image": IMAGE, "label": 0}] * 4, "pairs .image, label., it gives dict"),
        ([(IMAGE, 0, "name")] * 4, "pairs .image, label., it gives 3 things"),
        ([(IMAGE[:1], 0)] * 4, r"does not run on images of shape \(\d, 1, 8, 8\)"),
        ([(IMAGE[0], 0)] * 4, r"batches \(N, C, H, W\), the data has \(4, 8, 8\)"),
    ],
)
def test_data_of_another_kind_is_one_clear_error(samples, message):
    before = weights(model := network())
    with pytest.raises(DataError, match=message):
        finetune(model, Samples(*samples), None, recipe=QUICK)
    with pytest.raises(DataError, match=message):
        evaluate(model, Samples(*samples))
    assert same(before, weights(model))


def test_a_network_that_asserts_another_size_is_one_clear_error(toy_images):
    model = zoo.create_model("timm:vit_tiny_patch16_224", 3)
    for call in (evaluate, lambda *given: finetune(*given, None, recipe=QUICK)):
        with pytest.raises(DataError, match=r"\(\d+, 3, 8, 8\): Input height \(8\) doesn't match"):
            call(model, toy_images)


class Auxiliary(nn.Module):
    """Gives a second output in training mode, as torchvision's GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: torch.Tensor) -> object:
        logits = self.inner(images)
        return (logits, logits) if self.training else logits


def test_a_network_of_other_outputs_in_training_mode_is_one_clear_error(toy_images):
    before = weights(model := Auxiliary())
    assert evaluate(model, toy_images).images == len(toy_images)
    with pytest.raises(DataError, match=r"network in training mode gives tuple\. Wrap it"):
        finetune(model, toy_images, None, recipe=QUICK)
    assert same(before, weights(model))
    assert not model.training


@pytest.mark.parametrize("data", [None, 5, "pathlib"])
def test_what_is_no_data_at_all_is_refused(data, tmp_path):
    with pytest.raises(DataError, match="torch Dataset or DataLoader"):
        finetune(network(), tmp_path if data == "pathlib" else data, None, recipe=QUICK)


def test_too_few_images_for_a_batch_are_counted():
    few = DataLoader(Samples(*[(IMAGE, 0)] * 5), 8, drop_last=True)
    with pytest.raises(DataError, match="holds 5 images, less than one batch"):
        finetune(network(), few, None, recipe=QUICK)


def test_a_last_batch_of_one_image_says_what_to_do():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    loader = DataLoader(Samples(*[(IMAGE, 0)] * 5), 4)
    with pytest.raises(DataError, match=r"batch of one image .* drop_last=True"):
        finetune(model, loader, None, recipe=QUICK)
