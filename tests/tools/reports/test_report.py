"""The command that draws reports, and the report at the end of a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import QUICKSTART, ROOT, changed_runner, finished, start
from helpers.reported_runs import KINDS, stop_at, train, write_deep_run
from itop_prune_tools.reports import page, report
from PIL import Image


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.usefixtures("unrendered")
def test_runs_are_drawn_and_folders_without_a_run_are_named(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of seeds stands for all of them."""
    for kind in ("static", "dense"):
        shutil.copytree(made[kind], tmp_path / kind / "seed0")
    (tmp_path / "empty").mkdir()
    given = [tmp_path / "static", tmp_path / "empty", tmp_path / "dense" / "seed0"]
    assert report.main([str(folder) for folder in given]) == 1
    out, err = capsys.readouterr()
    drawn = [tmp_path / kind / "seed0" / "report.html" for kind in ("static", "dense")]
    assert out.splitlines() == [str(path) for path in drawn]
    message = f"error: {tmp_path / 'empty'} holds no run: no recipe.yaml; give a folder such as "
    assert err.startswith(message)


def test_a_report_that_is_drawn_again_is_the_same(made: dict[str, Path], copy: Path) -> None:
    again = report.write(copy).read_bytes()
    before = (made["moving"] / "report.html").read_bytes()
    assert again == before.replace(b"moving, seed 0", b"run")
    assert not list(copy.glob("unfinished-*"))


def test_a_run_stopped_in_its_first_epoch_says_why_there_is_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(1, tmp_path / "run")
    capsys.readouterr()
    assert report.main([str(tmp_path / "run")]) == 1
    message = "holds no finished epoch, so there is nothing to draw; go on with --resume"
    assert message in only_error(capsys)


@pytest.mark.parametrize("name", ["metrics.jsonl", "layers.jsonl"])
@pytest.mark.parametrize(
    "text", ["?", '{"epoch": 1, "st', "5", '{"epoch": 1, "step": 7}', ""], ids=repr
)
def test_a_damaged_file_is_one_clear_line(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    lines = (copy / name).read_text().splitlines()
    for line in (0, 1, 3):
        damaged = [*lines[:line], text, *lines[line + 1 :]]
        (copy / name).write_text("\n".join(damaged) + "\n")
        assert report.main([str(copy)]) == 1
        assert only_error(capsys).startswith(f"error: {copy / name} is damaged")
        assert not (copy / "report.html").exists()


@pytest.mark.parametrize("recipe", ["", "[]", "a: {", "\x00"], ids=repr)
def test_a_damaged_recipe_is_one_clear_line(
    copy: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    (copy / "recipe.yaml").write_text(recipe)
    assert report.main([str(copy)]) == 1
    assert str(copy / "recipe.yaml") in only_error(capsys)


def test_damaged_weights_are_one_clear_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.safetensors").write_bytes(b"no weights")
    assert report.main([str(copy)]) == 1
    assert f"{copy / 'model.safetensors'} can't be read" in only_error(capsys)


# --- a run is not lost for its report ---


@pytest.mark.reports
def test_if_drawing_fails_the_weights_are_saved_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = []

    def fail(folder: Path) -> Path:
        saved.extend(path.name for path in folder.glob("model.safetensors"))
        raise RuntimeError("no\nink")

    monkeypatch.setattr(report, "write", fail)
    assert train(tmp_path / "run", "epochs=1") == 0
    assert saved == ["model.safetensors"]
    said = [line for line in capsys.readouterr().out.splitlines() if "report" in line]
    again = f"the run itself is whole, and itop-prune report {tmp_path / 'run'} tries again"
    assert said == [f"no report: RuntimeError: no ink; {again}"]


@pytest.mark.slow
def test_without_matplotlib_a_run_ends_well_and_says_so(tmp_path: Path) -> None:
    runner = changed_runner(tmp_path / "without.py", "sys.modules['matplotlib'] = None")
    output = finished(start([runner, QUICKSTART, "epochs=1", "--out", str(tmp_path / "run")]))
    assert len([line for line in output.splitlines() if line.startswith("no report: ")]) == 1
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_no_window_system_is_asked_for(copy: Path) -> None:
    program = (
        "import sys\n"
        "from itop_prune_tools.reports.report import main\n"
        f"assert main([{str(copy)!r}]) == 0\n"
        "print(*sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "TkAgg"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "matplotlib.figure" in loaded
    assert not {"matplotlib.pyplot", "tkinter"} & set(loaded)


# --- in a browser ---

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
PROBE = """<script>
const overflow = document.documentElement.scrollWidth - window.innerWidth;
const images = [...document.images];
const broken = images.filter(image => !image.complete || image.naturalWidth < 200).length;
document.title = `images ${images.length} broken ${broken} overflow ${Math.max(0, overflow)}`;
</script></body>"""


DARK, LIGHT = (f"--blink-settings=preferredColorScheme={number}" for number in (0, 1))


def browse(path: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--window-size=1240,1000",
        *flags,
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no browser: install chromium to see the report rendered"
)
@pytest.mark.parametrize("kind", [*KINDS, "deep"])
def test_in_a_browser_the_page_renders_without_errors(
    made: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = made.get(kind)
    if folder is None:
        folder = report.write(write_deep_run(tmp_path / "deep")).parent
    profile, shot = tmp_path / "profile", tmp_path / "shot.png"
    shown = browse(folder / "report.html", profile, f"--screenshot={shot}")
    assert "CONSOLE" not in shown.stderr
    assert np.asarray(Image.open(shot).convert("L")).std() > 10

    text = (folder / "report.html").read_text(encoding="utf-8")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{page.POLICY}">'
    assert policy in text
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace(policy, "").replace("</body>", PROBE), encoding="utf-8")
    for width in (1240, 500):  # a window of Chromium is at least 500 wide
        found = browse(probed, profile, "--dump-dom", f"--window-size={width},900")
        title = f"<title>images {text.count('<img ')} broken 0 overflow 0</title>"
        assert title in found.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no browser: install chromium to see the report rendered"
)
@pytest.mark.parametrize("width", [1240, 400])
def test_in_a_dark_browser_the_page_and_its_pictures_are_dark_on_one_ground(
    made: dict[str, Path], tmp_path: Path, width: int
) -> None:
    """The frame makes the page narrower than a window can be."""
    report_file, size = (made["moving"] / "report.html").as_uri(), f"width:{width}px;height:3000px"
    frame = tmp_path / "frame.html"
    body = f'<body style="margin:0"><iframe src="{report_file}" style="border:0;{size}">'
    frame.write_text(body, encoding="utf-8")

    brightness = {}
    for scheme in (DARK, LIGHT):
        shot = tmp_path / "shot.png"
        flags = (scheme, f"--screenshot={shot}", "--window-size=1240,3000", "--hide-scrollbars")
        browse(frame, tmp_path / "profile", *flags)
        pixels = np.asarray(Image.open(shot).convert("L"))[:, :width]
        ground = pixels[2, 2]
        brightness[scheme] = ground
        assert (pixels == ground).mean() > 0.7  # pictures share the ground of the page
    assert brightness[DARK] < 50
    assert brightness[LIGHT] == 255
