"""Data by name: a batch depends only on seed, epoch and images, not on rank or start."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from itop_prune_tools.data.arrays import Augmentation
from itop_prune_tools.data.datasets import Data, augmentation_of, open_data
from itop_prune_tools.data.seeding import seed_everything
from itop_prune_tools.data.source import CPU, Batch, DataError

COUNT = 60


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 60 training and 17 test images of noise, each labelled by its own index."""
    path = tmp_path_factory.mktemp("numbered") / "numbered.npz"
    rng = np.random.default_rng(0)
    np.savez(
        path,
        x_train=rng.integers(0, 256, (COUNT, 6, 5, 3), dtype=np.uint8),
        y_train=np.arange(COUNT),
        x_test=rng.integers(0, 256, (17, 6, 5, 3), dtype=np.uint8),
        y_test=np.arange(17),
    )
    return str(path)


def open_numbered(root: str, batch_size: int = 6, padding: int = 2, **settings: Any) -> Data:
    augment = {"padding": padding, "hflip": 0.5}
    return open_data("npz", root=root, batch_size=batch_size, augment=augment, **settings)


def by_label(batches: Iterable[Batch]) -> dict[int, torch.Tensor]:
    return {
        int(label): image
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    }


def labels_of(batches: Iterable[Batch]) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]


def equal(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[label], b[label]) for label in a)


# Digits


def test_digits_are_1797_images_of_10_classes() -> None:
    data = open_data("digits", batch_size=32)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (1438, 359, 10, (1, 8, 8))


def test_digits_hold_every_class_in_both_splits() -> None:
    data = open_data("digits", batch_size=1)
    assert set(labels_of(data.epoch(0))) == set(range(10))
    assert set(labels_of(data.evaluation(data.test))) == set(range(10))


def test_batches_are_of_the_size_asked_for() -> None:
    data = open_data("digits", batch_size=32)
    images, labels = next(data.epoch(0))
    assert images.shape == (32, 1, 8, 8)
    assert (images.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (32,))


def test_left_out_validation_is_none() -> None:
    assert open_data("digits", batch_size=32).validation is None


# Every draw is a function of (seed, epoch, image)


def test_an_epoch_asked_for_twice_is_the_same(numbered: str) -> None:
    data = open_numbered(numbered)
    first, again = list(data.epoch(3)), list(data.epoch(3))
    assert labels_of(first) == labels_of(again)
    assert equal(by_label(first), by_label(again))


def test_data_opened_twice_give_the_same_epoch(numbered: str) -> None:
    first, again = list(open_numbered(numbered).epoch(3)), list(open_numbered(numbered).epoch(3))
    assert labels_of(first) == labels_of(again)
    assert equal(by_label(first), by_label(again))


@pytest.mark.parametrize("batch_size", [1, 10, 60])
def test_an_image_is_the_same_whatever_the_batch_size(numbered: str, batch_size: int) -> None:
    expected = by_label(open_numbered(numbered, batch_size=6).epoch(1))
    assert len(expected) == COUNT
    assert equal(by_label(open_numbered(numbered, batch_size=batch_size).epoch(1)), expected)


def test_the_order_is_the_same_whatever_the_batch_size(numbered: str) -> None:
    few, many = open_numbered(numbered, batch_size=6), open_numbered(numbered, batch_size=20)
    assert labels_of(few.epoch(1)) == labels_of(many.epoch(1))


@pytest.mark.parametrize("start", [0, 1, 7, 10])
def test_an_epoch_taken_up_in_the_middle_goes_on_as_it_would_have(
    numbered: str, start: int
) -> None:
    data = open_numbered(numbered)
    whole, rest = list(data.epoch(2)), list(data.epoch(2, start=start))
    assert labels_of(rest) == labels_of(whole[start:])
    assert equal(by_label(rest), by_label(whole[start:]))


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_image_is_the_same_on_every_rank(numbered: str, ranks: int) -> None:
    data = open_numbered(numbered, batch_size=5)
    shares = [by_label(data.epoch(1, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert equal({k: v for share in shares for k, v in share.items()}, by_label(data.epoch(1)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_shares_of_the_ranks_partition_an_epoch(numbered: str, ranks: int) -> None:
    data = open_numbered(numbered, batch_size=5)
    shares = [labels_of(data.epoch(0, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert sorted(label for share in shares for label in share) == list(range(COUNT))
    assert {len(share) for share in shares} == {COUNT // ranks}


def test_the_ranks_together_see_the_batches_of_one_rank_with_the_batch_of_all(
    numbered: str,
) -> None:
    two = open_numbered(numbered, batch_size=5)
    one = [labels.tolist() for _, labels in open_numbered(numbered, batch_size=10).epoch(0)]
    pairs = zip(two.epoch(0, rank=0, ranks=2), two.epoch(0, rank=1, ranks=2), strict=True)
    assert [[*a[1].tolist(), *b[1].tolist()] for a, b in pairs] == one


def test_ranks_that_start_in_the_middle_go_on_as_they_would_have(numbered: str) -> None:
    data = open_numbered(numbered, batch_size=5)
    whole = list(data.epoch(0, rank=1, ranks=2))
    assert labels_of(data.epoch(0, start=2, rank=1, ranks=2)) == labels_of(whole[2:])


def test_the_order_is_a_permutation_and_not_the_identity(numbered: str) -> None:
    labels = labels_of(open_numbered(numbered).epoch(0))
    assert sorted(labels) == list(range(COUNT))
    assert labels != list(range(COUNT))


def test_another_epoch_has_another_order_and_another_augmentation(numbered: str) -> None:
    data = open_numbered(numbered)
    first, second = list(data.epoch(0)), list(data.epoch(1))
    assert labels_of(first) != labels_of(second)
    a, b = by_label(first), by_label(second)
    assert sum(not torch.equal(a[label], b[label]) for label in a) > COUNT // 2


def test_another_seed_has_another_order_and_another_augmentation(numbered: str) -> None:
    first, second = (list(open_numbered(numbered, seed=seed).epoch(0)) for seed in (0, 1))
    assert labels_of(first) != labels_of(second)
    a, b = by_label(first), by_label(second)
    assert sum(not torch.equal(a[label], b[label]) for label in a) > COUNT // 2


def test_arrays_neither_read_nor_write_the_global_generators(numbered: str) -> None:
    def global_states() -> tuple[object, ...]:
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()

    seed_everything("before")
    before = global_states()
    first = by_label(open_numbered(numbered, validation=6).epoch(0))
    assert global_states() == before
    seed_everything("something else")
    assert equal(by_label(open_numbered(numbered, validation=6).epoch(0)), first)


# Batches of an epoch


@pytest.mark.parametrize(
    ("batch_size", "ranks", "batches"), [(6, 1, 10), (7, 1, 8), (7, 2, 4), (60, 1, 1), (31, 2, 0)]
)
def test_an_epoch_has_whole_batches_only(
    numbered: str, batch_size: int, ranks: int, batches: int
) -> None:
    data = open_numbered(numbered, batch_size=batch_size)
    assert data.batches_per_epoch(ranks) == batches
    assert [len(labels) for _, labels in data.epoch(0, ranks=ranks)] == [batch_size] * batches


def test_no_image_comes_twice_where_some_are_left_over(numbered: str) -> None:
    data = open_numbered(numbered, batch_size=7)
    labels = labels_of(data.epoch(0, rank=0, ranks=2)) + labels_of(data.epoch(0, rank=1, ranks=2))
    assert len(set(labels)) == len(labels) == 56


def test_what_is_left_over_differs_from_epoch_to_epoch(numbered: str) -> None:
    data = open_numbered(numbered, batch_size=50)
    assert len({frozenset(labels_of(data.epoch(epoch))) for epoch in range(5)}) == 5


# Evaluation


@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
@pytest.mark.parametrize("eval_batch_size", [1, 4, 500])
def test_an_evaluation_covers_every_image_once(
    numbered: str, ranks: int, eval_batch_size: int
) -> None:
    data = open_numbered(numbered, eval_batch_size=eval_batch_size)
    shares = [list(data.evaluation(data.test, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert sorted(label for share in shares for label in labels_of(share)) == list(range(17))
    assert all(len(labels) <= eval_batch_size for share in shares for _, labels in share)


def test_an_evaluation_is_not_augmented(numbered: str) -> None:
    data, plain = open_numbered(numbered), open_data("npz", root=numbered, batch_size=6)
    assert equal(by_label(data.evaluation(data.train)), by_label(plain.evaluation(plain.train)))


# Validation


def test_the_held_out_images_are_not_trained_on(numbered: str) -> None:
    data = open_numbered(numbered, batch_size=5, validation=15)
    assert data.validation is not None
    held_out, trained = labels_of(data.evaluation(data.validation)), labels_of(data.epoch(0))
    assert (len(held_out), len(trained)) == (15, 45)
    assert sorted(held_out + trained) == list(range(COUNT))


def test_the_held_out_images_are_the_same_for_every_seed(numbered: str) -> None:
    held_out = set()
    for seed in (0, 1, 2):
        data = open_numbered(numbered, seed=seed, validation=15)
        assert data.validation is not None
        held_out.add(tuple(sorted(labels_of(data.evaluation(data.validation)))))
    assert len(held_out) == 1


def test_the_held_out_images_are_not_augmented(numbered: str) -> None:
    data, plain = (
        open_numbered(numbered, validation=15),
        open_data("npz", root=numbered, batch_size=6),
    )
    assert data.validation is not None
    everything = by_label(plain.evaluation(plain.train))
    held_out = by_label(data.evaluation(data.validation))
    assert all(torch.equal(image, everything[label]) for label, image in held_out.items())


def test_the_test_images_are_not_touched_by_a_hold_out(numbered: str) -> None:
    data = open_numbered(numbered, validation=15)
    assert labels_of(data.evaluation(data.test)) == list(range(17))


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 61}, "data.batch_size is 61, and there are 60 training images"),
        ({"validation": 60}, "data.validation is 60, and there are 60 training images"),
        (
            {"validation": 58, "batch_size": 6},
            "data.batch_size is 6, and there are 2 training images",
        ),
    ],
    ids=str,
)
def test_more_images_than_there_are_are_answered_with_how_many_there_are(
    numbered: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        open_numbered(numbered, **settings)
    assert str(caught.value) == message


# What `augment` is the arguments of


def test_a_folder_is_augmented_by_timm() -> None:
    assert augmentation_of({"name": "folder"}) is timm.data.create_transform


@pytest.mark.parametrize("section", [{"name": "digits"}, {"name": "cifar10"}, {}])
def test_arrays_are_augmented_in_batches(section: dict[str, Any]) -> None:
    assert augmentation_of(section) is Augmentation


# Seeds made of words


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_same_words_seed_all_three_generators_alike() -> None:
    seed_everything(0, "step", 3)
    first = draws()
    draws()
    seed_everything(0, "step", 3)
    assert draws() == first


@pytest.mark.parametrize(
    "words", [(0, "step", 4), (1, "step", 3), (0, "weights", 3), (0, "step"), ()]
)
def test_other_words_seed_all_three_generators_differently(words: tuple[object, ...]) -> None:
    seed_everything(0, "step", 3)
    first = draws()
    seed_everything(*words)
    assert all(a != b for a, b in zip(first, draws(), strict=True))


def test_the_default_device_is_the_cpu() -> None:
    images, labels = next(open_data("digits", batch_size=2).epoch(0))
    assert images.device == labels.device == CPU
