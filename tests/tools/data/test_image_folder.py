"""Folders of images: equal batches with and without workers; damaged files are named."""

import multiprocessing
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from itop_prune_tools.data.datasets import Data, open_data
from itop_prune_tools.data.image_folder import read_folder
from itop_prune_tools.data.seeding import seed_everything
from itop_prune_tools.data.source import CPU, DataError
from PIL import Image

NEEDS_DATA = pytest.mark.skipif(
    "ITOP_DATA" not in os.environ, reason="needs the ImageNet sample: set ITOP_DATA to its folder"
)
EACH = 4
SETTINGS: dict[str, Any] = {"image_size": 8, "batch_size": 2, "workers": 0}


def draw(path: Path, seed: int, mode: str = "RGB") -> None:
    """Write an image of noise of 14×12 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (14, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two classes, of which nothing is changed."""
    root = tmp_path_factory.mktemp("images")
    for split, part in enumerate(("train", "val")):
        for label, name in enumerate(("cat", "dog")):
            for index in range(EACH):
                draw(root / part / name / f"{index}.png", seed=100 * split + 10 * label + index)
    return root


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(drawn, tmp_path / "images"))


def open_folder(root: Path, **settings: Any) -> Data:
    return open_data("folder", root=str(root), **{**SETTINGS, **settings})


def batches(data: Data, epoch: int = 0, **place: int) -> tuple[torch.Tensor, list[int]]:
    images, labels = zip(*data.epoch(epoch, **place), strict=True)
    return torch.cat(images), torch.cat(labels).tolist()


# What is read


def test_a_folder_has_a_class_for_each_subfolder(drawn: Path) -> None:
    data = open_folder(drawn)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (8, 8, 2, (3, 8, 8))


def test_labels_follow_the_names_of_the_subfolders(drawn: Path) -> None:
    data = open_folder(drawn)
    labels = [int(label) for _, part in data.evaluation(data.test) for label in part]
    assert labels == [0] * EACH + [1] * EACH


def test_the_subfolders_of_training_and_test_can_be_named(drawn: Path) -> None:
    data = open_folder(drawn, train="val", test="train")
    same = open_folder(drawn)
    ((swapped, _),), ((straight, _),) = (
        list(d.evaluation(s)) for d, s in ((data, data.train), (same, same.test))
    )
    assert torch.equal(swapped, straight)


def test_training_and_test_can_be_one_folder(drawn: Path) -> None:
    assert len(open_folder(drawn, train="val", test="val").train) == 8


def test_val_is_for_every_epoch_and_test_for_the_end(root: Path) -> None:
    without = open_folder(root)
    assert without.validation is without.test

    shutil.copytree(root / "val", root / "test")
    draw(root / "test" / "cat" / "extra.png", seed=1)
    both = open_folder(root)
    assert (len(both.validation or ()), len(both.test)) == (8, 9)
    named = open_folder(root, test="val")
    assert named.validation is named.test

    shutil.rmtree(root / "val")
    only_test = open_folder(root)
    assert (only_test.validation, len(only_test.test)) == (None, 9)
    swapped = open_folder(root, val="test", test="train")
    assert (len(swapped.validation or ()), len(swapped.test)) == (9, 8)


def test_training_images_that_are_held_out_leave_val_for_the_end(drawn: Path) -> None:
    data = open_folder(drawn, validation=3)
    assert (len(data.train), len(data.validation or ()), len(data.test)) == (5, 3, 8)
    with pytest.raises(DataError, match=r"data\.validation holds out 3 .* data\.val names others"):
        open_folder(drawn, validation=3, val="val")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_an_image_of_any_mode_has_three_channels(root: Path, mode: str) -> None:
    name = "cat/odd.jpg" if mode == "CMYK" else "cat/odd.png"
    draw(root / "train" / name, seed=1, mode=mode)
    data = open_folder(root)
    ((images, _),) = data.evaluation(data.train)
    assert images.shape == (9, 3, 8, 8)


def test_an_image_for_evaluation_is_resized_and_not_augmented(drawn: Path) -> None:
    data = open_folder(drawn, augment={"hflip": 1.0, "color_jitter": 0.9})
    plain = open_folder(drawn)
    first, second = ([images for images, _ in d.evaluation(d.test)] for d in (data, plain))
    assert torch.equal(torch.cat(first), torch.cat(second))


def test_augment_is_given_to_timm(drawn: Path) -> None:
    flipped, straight = (
        batches(
            open_folder(
                drawn, augment={"no_aug": False, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]} | extra
            )
        )[0]
        for extra in ({"hflip": 1.0, "color_jitter": None}, {"hflip": 0.0, "color_jitter": None})
    )
    assert torch.equal(flipped, straight.flip(3))
    assert not torch.equal(flipped, straight)


# Every draw is a function of (seed, epoch, image)


def test_worker_processes_give_the_batches_of_none(drawn: Path) -> None:
    alone, helped = batches(open_folder(drawn, workers=0)), batches(open_folder(drawn, workers=2))
    assert alone[1] == helped[1]
    assert torch.equal(alone[0], helped[0])


def test_a_batch_does_not_depend_on_the_global_generators(drawn: Path) -> None:
    seen = []
    for word in ("one", "another"):
        seed_everything(word)
        seen.append(batches(open_folder(drawn))[0])
    assert torch.equal(*seen)


def test_reading_an_augmented_image_leaves_the_global_generators_where_its_words_put_them(
    drawn: Path,
) -> None:
    after = []
    for word in ("one", "another"):
        data = open_folder(drawn)
        seed_everything(word)
        batches(data)
        after.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert after[0] == after[1]


def found(data: Data, expected: torch.Tensor, **place: int) -> list[int]:
    """Find which expected images the batches of epoch 7 hold, sorted; each must be one of them."""
    images, _ = batches(data, 7, **place)
    matches = [
        [i for i, image in enumerate(expected) if torch.equal(image, other)] for other in images
    ]
    assert all(len(match) == 1 for match in matches)
    return sorted(match[0] for match in matches)


def test_an_image_is_the_same_whatever_its_batch_and_rank(drawn: Path) -> None:
    data = open_folder(drawn)
    ((expected, _),) = data.train.load([torch.arange(8)], 7)
    assert found(open_folder(drawn, batch_size=4), expected) == list(range(8))
    shares = [
        found(open_folder(drawn, batch_size=1), expected, rank=rank, ranks=2) for rank in range(2)
    ]
    assert sorted(shares[0] + shares[1]) == list(range(8))


def test_an_epoch_taken_up_in_the_middle_goes_on_as_it_would_have(drawn: Path) -> None:
    data = open_folder(drawn)
    whole, rest = batches(data, 1), batches(data, 1, start=2)
    assert rest[1] == whole[1][4:]
    assert torch.equal(rest[0], whole[0][4:])


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}], ids=str)
def test_another_epoch_or_seed_augments_differently(drawn: Path, change: dict[str, int]) -> None:
    epoch, seed = change.get("epoch", 0), change.get("seed", 0)
    order = [torch.arange(8)]
    ((first, _),) = open_folder(drawn).train.load(order, 0)
    ((second, _),) = open_folder(drawn, seed=seed).train.load(order, epoch)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_held_out_images_are_not_trained_on(drawn: Path) -> None:
    data = open_folder(drawn, validation=3)
    assert data.validation is not None
    everything = torch.cat([images for images, _ in data.evaluation(data.train)])
    held_out = torch.cat([images for images, _ in data.evaluation(data.validation)])
    assert (len(everything), len(held_out)) == (5, 3)
    assert not any(torch.equal(a, b) for a in everything for b in held_out)


# Bad input


def test_a_rank_for_which_no_image_is_left_has_no_batch(drawn: Path) -> None:
    data = open_folder(drawn)
    shares = [
        list(data.evaluation(data.test, rank=rank, ranks=2 * EACH + 1))
        for rank in range(2 * EACH + 1)
    ]
    assert [len(share) for share in shares] == [1] * (2 * EACH) + [0]


def corrupt(path: Path, how: str) -> None:
    whole = path.read_bytes()
    damaged = {
        "text": b"not an image",
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "flipped": b"",
    }
    if how == "flipped":
        at = len(whole) // 2
        damaged["flipped"] = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
    path.write_bytes(damaged[how])


@pytest.mark.parametrize("how", ["text", "empty", "truncated", "flipped"])
def test_a_corrupt_image_is_an_error_that_names_it(root: Path, how: str) -> None:
    broken = root / "train" / "dog" / "2.png"
    corrupt(broken, how)
    with pytest.raises(DataError) as caught:
        batches(open_folder(root))
    assert str(caught.value).startswith(f"{broken} can't be read as an image: ")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_one_line_with_and_without_workers(root: Path, workers: int) -> None:
    broken = root / "train" / "dog" / "2.png"
    corrupt(broken, "text")
    with pytest.raises(DataError) as caught:
        batches(open_folder(root, workers=workers))
    assert str(broken) in str(caught.value)
    assert str(caught.value).strip().count("\n") == 0


def test_no_worker_outlives_a_corrupt_image(root: Path) -> None:
    before = multiprocessing.active_children()
    corrupt(root / "train" / "dog" / "2.png", "text")
    with pytest.raises(DataError):
        batches(open_folder(root, workers=2))
    assert [worker for worker in multiprocessing.active_children() if worker not in before] == []


def test_a_corrupt_image_is_found_in_evaluation_too(root: Path) -> None:
    broken = root / "val" / "dog" / "2.png"
    corrupt(broken, "text")
    data = open_folder(root)
    with pytest.raises(DataError, match=r"val/dog/2\.png can't be read"):
        list(data.evaluation(data.test))


def test_an_image_that_went_away_is_an_error_that_names_it(root: Path) -> None:
    data = open_folder(root)
    (root / "train" / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"train/cat/1\.png can't be read"):
        batches(data)


def empty(root: Path) -> None:
    for path in root.glob("train/*/*"):
        path.unlink()


def without_subfolders(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def without_images(root: Path) -> None:
    empty(root)
    (root / "train" / "cat" / "notes.txt").write_text("no image")


def without_classes(root: Path) -> None:
    for part in ("train", "val"):
        shutil.rmtree(root / part)
        for index in range(EACH):
            draw(root / part / f"{index}.png", seed=index)


@pytest.mark.parametrize("change", [empty, without_subfolders, without_images, without_classes])
def test_a_folder_without_images_in_subfolders_says_what_it_must_hold(
    root: Path, change: Callable[[Path], None]
) -> None:
    change(root)
    with pytest.raises(
        DataError, match="holds no images in subfolders, one subfolder a class"
    ) as caught:
        open_folder(root)
    assert str(caught.value).startswith(str(root / "train"))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_folder_names_itself_and_the_keys(root: Path, part: str) -> None:
    shutil.rmtree(root / part)
    with pytest.raises(DataError) as caught:
        open_folder(root)
    assert str(caught.value) == (
        f"{root / part} is not a folder; data.root, data.train, data.val and data.test say where "
        "the images are"
    )


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("")
    with pytest.raises(DataError, match="train is not a folder"):
        open_folder(tmp_path)


@pytest.mark.parametrize("has_test", [False, True])
def test_splits_with_different_classes_are_an_error(root: Path, has_test: bool) -> None:
    if has_test:
        shutil.copytree(root / "val", root / "test")
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(DataError) as caught:
        open_folder(root)
    assert str(caught.value).startswith(f"{root / 'train'} and {root / 'val'} hold different cla")


@NEEDS_DATA
def test_the_imagenet_sample_reads(tmp_path: Path) -> None:
    sample = Path(os.environ["ITOP_DATA"]) / "imagenet-sample"
    folder = read_folder(sample, 64, 0, CPU, 0, {"color_jitter": None})
    subfolders = sorted(path.name for path in sample.iterdir() if path.is_dir())
    assert folder.classes == subfolders
    ((images, labels),) = folder.load([torch.tensor([0, len(folder) - 1])], 0)
    assert images.shape == (2, 3, 64, 64)
    assert labels.tolist() == [0, len(subfolders) - 1]
