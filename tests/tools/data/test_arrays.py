"""Small sets as arrays: normalised, cropped and flipped as by hand; damaged files are refused."""

import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from itop_prune_tools.data.arrays import Arrays, Augmentation, read_arrays, read_digits
from itop_prune_tools.data.source import CPU, DataError, MissingData
from torch.nn import functional as F

NEEDS_DATA = pytest.mark.skipif(
    "ITOP_DATA" not in os.environ, reason="needs FashionMNIST: set ITOP_DATA to its folder"
)


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(path: Path, **changes: Any) -> str:
    """Write a file of arrays that is right but for the changes; None leaves an array out."""
    images = changes.get("x_train", noise(20, 6, 5))
    shape = (6, 5) if images is None else images.shape[1:]
    arrays = {
        "x_train": images,
        "y_train": np.arange(20) % 4,
        "x_test": noise(8, *shape),
        "y_test": np.arange(8) % 4,
    }
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def read(
    root: str, augmentation: Augmentation | None = None, seed: int = 0
) -> tuple[Arrays, Arrays, int]:
    return read_arrays("npz", root, False, CPU, seed, augmentation or Augmentation())


def every(arrays: Arrays, epoch: int | None) -> torch.Tensor:
    """Return all images, in order."""
    ((images, _),) = arrays.load([torch.arange(len(arrays))], epoch)
    return images


def augmented(
    tmp_path: Path, count: int = 300, epoch: int = 0, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of three channels, plain and augmented."""
    root = write(tmp_path / "a.npz", x_train=noise(count, 6, 5, 3), y_train=np.arange(count) % 4)
    arrays = read(root, Augmentation(**settings))[0]
    return every(arrays, None), every(arrays, epoch)


# Normalisation


def test_training_images_have_mean_0_and_deviation_1_in_every_channel(tmp_path: Path) -> None:
    images = noise(50, 6, 5, 3) // np.array([1, 2, 4], dtype=np.uint8)
    train, _, _ = read(write(tmp_path / "a.npz", x_train=images, y_train=np.zeros(50, int)))
    plain = every(train, None)
    torch.testing.assert_close(plain.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_test_images_are_normalised_by_the_training_images(tmp_path: Path) -> None:
    images, tests = noise(50, 6, 5), noise(9, 6, 5, seed=1) // 2
    _, test, _ = read(
        write(
            tmp_path / "a.npz",
            x_train=images,
            y_train=np.zeros(50, int),
            x_test=tests,
            y_test=np.zeros(9, int),
        )
    )
    expected = (tests.astype(np.float64) - images.mean()) / images.std()
    torch.testing.assert_close(
        every(test, None)[:, 0], torch.from_numpy(expected).float(), atol=1e-4, rtol=1e-4
    )


def test_a_channel_without_contrast_stays_finite(tmp_path: Path) -> None:
    train, _, _ = read(write(tmp_path / "a.npz", x_train=np.full((20, 6, 5), 7, dtype=np.uint8)))
    torch.testing.assert_close(every(train, None), torch.zeros(20, 1, 6, 5))


def test_a_part_is_normalised_as_the_whole(tmp_path: Path) -> None:
    train, _, _ = read(write(tmp_path / "a.npz"))
    chosen = torch.tensor([7, 3])
    assert torch.equal(every(train.take(chosen), None), every(train, None)[chosen])


# Augmentation


def test_a_padding_crop_equals_a_crop_by_hand_at_an_offset_of_its_own(tmp_path: Path) -> None:
    plain, images = augmented(tmp_path, padding=2)
    padded = F.pad(plain, (2, 2, 2, 2))
    offsets = set()
    for wide, image in zip(padded, images, strict=True):
        crops = {(d, r): wide[:, d : d + 6, r : r + 5] for d in range(5) for r in range(5)}
        (found,) = [offset for offset, crop in crops.items() if torch.equal(crop, image)]
        offsets.add(found)
    assert len(offsets) == 25


def test_without_padding_nothing_is_cropped(tmp_path: Path) -> None:
    plain, images = augmented(tmp_path, hflip=1e-9)
    assert torch.equal(plain, images)


def test_a_certain_flip_mirrors_every_image_left_to_right(tmp_path: Path) -> None:
    plain, images = augmented(tmp_path, hflip=1.0)
    assert torch.equal(images, plain.flip(3))


def test_a_flip_of_a_quarter_mirrors_about_a_quarter_and_leaves_the_rest(tmp_path: Path) -> None:
    plain, images = augmented(tmp_path, count=1000, hflip=0.25)
    flipped = (images == plain.flip(3)).flatten(1).all(1)
    same = (images == plain).flatten(1).all(1)
    assert torch.equal(flipped, ~same)
    assert 190 < int(flipped.sum()) < 310


def test_crop_and_flip_are_drawn_apart(tmp_path: Path) -> None:
    plain, images = augmented(tmp_path, padding=1, hflip=0.5)
    cropped = augmented(tmp_path, padding=1)[1]
    flipped = (images == cropped.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped, ~(images == cropped).flatten(1).all(1))
    assert 0 < int(flipped.sum()) < len(plain)


def found(plain: torch.Tensor, images: torch.Tensor, padding: int) -> torch.Tensor:
    """Return which of the crops by hand, mirrored or not, each image is: [crops, images]."""
    padded = F.pad(plain, (padding,) * 4)
    offsets = itertools.product(range(2 * padding + 1), repeat=2)
    crops = torch.stack(
        [padded[:, :, down : down + 6, right : right + 5] for down, right in offsets]
    )
    return (torch.cat([crops, crops.flip(4)]) == images).flatten(2).all(2)


def test_every_offset_is_as_likely_as_any_other_mirrored_or_not(tmp_path: Path) -> None:
    which = found(*augmented(tmp_path, count=1800, padding=1, hflip=0.5), padding=1)
    assert (which.sum(0) == 1).all()
    assert all(60 < count < 140 for count in which.sum(1).tolist())


def test_a_padding_wider_than_the_image_leaves_crops_without_it(tmp_path: Path) -> None:
    plain, images = augmented(tmp_path, count=100, padding=7, hflip=0.5)
    assert found(plain, images, padding=7).any(0).all()
    assert 0 < (images == 0).flatten(1).all(1).sum() < 100


def test_an_augmented_batch_lies_in_memory_as_a_plain_one(tmp_path: Path) -> None:
    plain, images = augmented(tmp_path, padding=2, hflip=0.5)
    assert images.stride() == plain.stride()


def test_no_augmentation_is_the_default(tmp_path: Path) -> None:
    plain, images = augmented(tmp_path)
    assert torch.equal(plain, images)


def test_an_augmented_image_depends_on_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    root = write(tmp_path / "a.npz")
    arrays = read(root, Augmentation(padding=2, hflip=0.5))[0]
    images = every(arrays, 4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for (part, labels), indices in zip(arrays.load(order.split(3), 4), order.split(3), strict=True):
        assert torch.equal(part, images[indices])
        assert torch.equal(labels, arrays.labels[indices])
    assert not torch.equal(every(arrays, 5), images)
    assert not torch.equal(
        every(read(root, Augmentation(padding=2, hflip=0.5), seed=1)[0], 4), images
    )


# Files of arrays


def test_a_file_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    train, test, classes = read(write(tmp_path / "a.npz"))
    assert (train.images.shape, test.images.shape, classes) == ((20, 1, 6, 5), (8, 1, 6, 5), 4)


def test_a_file_of_colour_images_keeps_channels_rows_and_columns(tmp_path: Path) -> None:
    images = noise(20, 6, 5, 3)
    train, _, _ = read(write(tmp_path / "a.npz", x_train=images, x_test=noise(8, 6, 5, 3)))
    assert train.images.shape == (20, 3, 6, 5)
    assert np.array_equal(train.images[4, 2].numpy(), images[4, :, :, 2])


def test_labels_belong_to_their_images(tmp_path: Path) -> None:
    images, labels = noise(20, 6, 5), np.arange(20)[::-1]
    train, _, classes = read(
        write(tmp_path / "a.npz", x_train=images, y_train=labels.astype(np.uint8))
    )
    assert train.labels.tolist() == labels.tolist()
    assert train.labels.dtype == torch.int64
    assert np.array_equal(train.images[3, 0].numpy(), images[3])
    assert classes == 20


@pytest.mark.parametrize("split", ["test", "val"])
def test_test_images_are_called_test_or_val(tmp_path: Path, split: str) -> None:
    images = noise(3, 6, 5, seed=9)
    arrays = {"x_test": None, "y_test": None, f"x_{split}": images, f"y_{split}": np.arange(3)}
    _, test, _ = read(write(tmp_path / "a.npz", **arrays))
    assert np.array_equal(test.images[:, 0].numpy(), images)


def test_of_test_and_val_images_those_called_test_are_taken(tmp_path: Path) -> None:
    _, test, _ = read(write(tmp_path / "a.npz", x_val=noise(3, 6, 5), y_val=np.arange(3)))
    assert len(test) == 8


def test_the_highest_label_of_both_splits_counts_the_classes(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.npz", y_test=np.arange(8)))[2] == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"x_train": noise(20, 6, 5).astype(np.float32)},
        {"x_test": noise(8, 6, 5).astype(np.int64)},
        {"x_train": noise(20, 30)},
        {"x_train": noise(20, 6, 5, 3, 2)},
        {"y_train": np.arange(19)},
        {"y_train": np.arange(20)[:, None]},
        {"y_train": np.arange(20) - 1},
        {"y_train": np.arange(20) / 2},
        {"y_train": np.array(["cat"] * 20)},
        {"y_test": np.array([{}] * 8, dtype=object)},
        {"x_train": noise(0, 6, 5), "y_train": np.arange(0)},
        {"x_test": noise(0, 6, 5), "y_test": np.arange(0)},
        {"x_test": noise(8, 7, 5)},
        {"x_test": noise(8, 6, 5, 3)},
        {"y_train": None},
        {"x_test": None},
    ],
    ids=lambda changes: " ".join(
        f"{k}={v if v is None else (str(v.dtype), v.shape)}" for k, v in changes.items()
    ),
)
def test_arrays_that_do_not_fit_are_an_error_that_names_the_file(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    root = write(tmp_path / "broken.npz", **changes)
    with pytest.raises(DataError, match=r"broken\.npz") as caught:
        read(root)
    assert "\n" not in str(caught.value)


def test_images_of_another_type_are_answered_with_what_was_seen_and_is_allowed(
    tmp_path: Path,
) -> None:
    root = write(tmp_path / "a.npz", x_train=noise(20, 6, 5).astype(np.float32))
    with pytest.raises(
        DataError, match=r"training images are float32 \(20, 6, 5\), .*; not N uint8 images"
    ):
        read(root)


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "flipped":
        at = whole.index(b"NUMPY") + 200
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a file of arrays")
    elif how == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "text", "one array"])
def test_a_damaged_file_is_an_error_that_names_the_file(tmp_path: Path, how: str) -> None:
    path = tmp_path / "broken.npz"
    write(path)
    damaged(path, how)
    with pytest.raises(DataError, match=r"broken\.npz"):
        read(str(path))


def test_a_missing_file_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz"):
        read(str(tmp_path / "nothing.npz"))


def test_a_pickle_in_a_file_of_arrays_is_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    path = tmp_path / "a.npz"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError):
        read(str(path))
    assert not trace.exists()


# Digits and FashionMNIST


def test_every_fifth_digit_is_for_testing() -> None:
    images, labels, test_images, test_labels, classes = read_digits("", False)
    assert (images.shape, test_images.shape, classes) == ((1438, 8, 8), (359, 8, 8), 10)
    assert labels[:9].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 0]
    assert test_labels[:3].tolist() == [4, 9, 4]


def test_digits_have_17_grey_levels() -> None:
    images = read_digits("", False)[0]
    assert (images.min(), images.max(), images.dtype) == (0, 16, np.uint8)


@NEEDS_DATA
def test_fashion_mnist_is_60000_and_10000_images_of_10_classes() -> None:
    train, test, classes = read_arrays(
        "fashion_mnist", os.environ["ITOP_DATA"], False, CPU, 0, Augmentation()
    )
    assert (train.images.shape, test.images.shape, classes) == (
        (60000, 1, 28, 28),
        (10000, 1, 28, 28),
        10,
    )
    assert test.labels.bincount().tolist() == [1000] * 10
    assert train.labels.bincount().tolist() == [6000] * 10


@NEEDS_DATA
@pytest.mark.parametrize("download", [False, True])
def test_a_truncated_part_of_fashion_mnist_is_an_error_that_names_it(
    tmp_path: Path, download: bool
) -> None:
    whole = Path(os.environ["ITOP_DATA"]) / "FashionMNIST" / "raw"
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    broken = "train-images-idx3-ubyte"
    for path in whole.glob("*-ubyte"):
        if path.name != broken:
            (raw / path.name).symlink_to(path)
    with (whole / broken).open("rb") as file:
        (raw / broken).write_bytes(file.read(100_000))
    with pytest.raises(DataError, match="fashion_mnist") as caught:
        read_arrays("fashion_mnist", str(tmp_path), download, CPU, 0, Augmentation())
    message = str(caught.value)
    assert str(tmp_path) in message
    assert (
        "remove" in message or "delete" in message
    )  # torchvision fetches nothing over a file that is there


@NEEDS_DATA
def test_a_truncated_archive_of_fashion_mnist_is_an_error_that_names_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(os.environ["ITOP_DATA"]) / "FashionMNIST" / "raw"
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in whole.glob("*.gz"):
        with path.open("rb") as file:
            (raw / path.name).write_bytes(file.read(5_000))
    # its checksum tells torchvision to fetch it again, and there is no network here
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataError, match="fashion_mnist can't be read from") as caught:
        read_arrays("fashion_mnist", str(tmp_path), True, CPU, 0, Augmentation())
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_a_missing_folder_is_an_error_that_names_it_and_offers_to_fetch(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_arrays(name, str(tmp_path / "nowhere"), False, CPU, 0, Augmentation())
    message = str(caught.value)
    assert message.startswith(f"{name} can't be read from {tmp_path / 'nowhere'}: ")
    assert message.endswith("; data.download=true fetches it")


@pytest.mark.parametrize(
    ("name", "where"), [("cifar10", "CIFAR10.url"), ("fashion_mnist", "FashionMNIST.mirrors")]
)
def test_a_download_that_fails_offers_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    nobody = "http://127.0.0.1:9/"
    monkeypatch.setattr(
        f"torchvision.datasets.{where}", [nobody] if where.endswith("mirrors") else nobody
    )
    with pytest.raises(MissingData, match=f"{name} can't be read from .* [eE]rror") as caught:
        read_arrays(name, str(tmp_path), True, CPU, 0, Augmentation())
    assert "data.download" not in str(caught.value)
