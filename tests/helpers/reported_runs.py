"""Run folders for the tests of reports, and a reader of the page."""

import itertools
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.processes import QUICKSTART
from itop_prune_tools.run_folder import folder as run_folder
from itop_prune_tools.run_folder.metrics import Metrics
from itop_prune_tools.training import loop as runner

KINDS: dict[str, tuple[str, ...]] = {
    "moving": ("epochs=3", "regrow={every: 7, grow: gradient, survival: true}"),
    "static": ("epochs=2", "regrow=null"),
    "dense": ("epochs=2", "regrow=null", "masks=null"),
    "without validation": ("epochs=2", "data.validation=0", "regrow.every=7"),
    "one epoch": ("epochs=1", "regrow.every=30"),
    "no update": ("epochs=2", "regrow.every=1000"),
}


def train(folder: Path, *arguments: str) -> int:
    """Train the quickstart into a folder; return the exit status."""
    return runner.main([QUICKSTART, *arguments, "--out", str(folder)])


def stop_at(question: int, folder: Path, *arguments: str) -> None:
    """Train until the run asks for the so-manieth time whether to stop.

    It asks 39 times an epoch: after each of 38 steps, and in the evaluation.
    """
    asked = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.StopRequest, "wanted", lambda self: next(asked) == question)
        assert train(folder, *arguments) == 130


class Page(HTMLParser):
    """The parts of a report that the tests look at."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.text = (folder / "report.html").read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        """By the id, the class."""
        self.content: dict[str, str] = {}
        """By the id of a section, or by the key of a number after shown: or number:."""
        self._open: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "section":
            self.sections[str(found["id"])] = str(found["class"])

        name = ""
        for key, prefix in (("id", ""), ("data-shown", "shown:"), ("data-number", "number:")):
            if key in found:
                name = f"{prefix}{found[key]}"
                self.content[name] = ""
        if tag not in ("meta", "img"):  # these have no end
            self._open.append(name)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for name in self._open:
            if name:
                self.content[name] += data


def write_deep_run(folder: Path, layers: int = 300, updates: int = 20) -> Path:
    """Write the files of a run of so many layers, of which every 50th has no mask."""
    folder.mkdir(parents=True)
    names, weights, masked, active = [], [], [], []
    for place in range(layers):
        block = f"stages.{place // 30}.blocks.{place % 30}"
        names.append(f"{block}.conv_of_a_rather_long_name.weight")
        count = 64 * (place + 1)
        weights.append(count)
        masked.append(place % 50 != 0)
        active.append(count // 10 if masked[-1] else count)

    first = {"names": names, "masked": masked, "weights": weights, "active": active}
    first |= {"epoch": 0, "step": 0, "image": [3, 32, 32], "made_with": {"torch": "2"}}
    log = Metrics(folder, "layers.jsonl")
    log.append(first)
    metrics = Metrics(folder)
    for update in range(1, updates + 1):
        line = {"epoch": update, "step": 10 * update, "rate": 1 / update}
        explored = [
            min(count, some * (1 + update)) for count, some in zip(weights, active, strict=True)
        ]
        entered = [some // (1 + update) for some in active]
        log.append({**line, "active": active, "explored": explored, "entered": entered})
        numbers = {"train_loss": 1 / update, "lr": 0.1, "sparsity": 0.9, "exploration_rate": 0.5}
        metrics.append({**line, **numbers, "val_top1": 50.0 + update})

    recipe = "model: {model_name: deep}\nregrow: {every: 10}\nepochs: 20\n"
    (folder / "recipe.yaml").write_text(recipe)
    return folder
