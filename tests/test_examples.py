"""The examples run as they stand: with small settings, to the table and the picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(program: str, out: Path, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{program}.py"), "--fast", "--out", str(out), *options]
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows(table: str) -> list[tuple[int, float, float]]:
    """Each line ``steps   value ± half-width``."""
    found = re.findall(r"^\s*(\d+)\s+(\d+\.\d+) ± (\d+\.\d+)", table, re.MULTILINE)
    return [(int(step), float(value), float(half)) for step, value, half in found]


@pytest.mark.parametrize("method", ["maml", "fomaml", "meta-sgd"])
def test_sinusoid_learns_to_learn(method: str, tmp_path: Path) -> None:
    """After 300 meta-steps one inner step already helps on new waves."""
    table = rows(run("sinusoid", tmp_path, "--method", method, "--steps", "300"))
    assert [step for step, _, _ in table] == list(range(11))
    assert table[1][1] < table[0][1] - table[0][2]
    assert [picture.suffix for picture in tmp_path.iterdir()] == [".png"]


def test_implicit_learns_strengths_and_initial_weights(tmp_path: Path) -> None:
    out = run("implicit", tmp_path)
    common, learned = re.findall(r"^(?:best common|learned ) .*?(\d\.\d{3})\s+(\d\.\d{3})$", out, re.MULTILINE)
    assert float(learned[0]) < float(common[0])  # on validation data; and on test data:
    assert float(learned[1]) < float(common[1])
    table = [float(value) for value in re.findall(r"^\s+\d+   (\d+\.\d+)$", out, re.MULTILINE)]
    assert len(table) == 11
    assert table[-1] < table[0] / 2
    assert [picture.suffix for picture in tmp_path.iterdir()] == [".png"]


def test_few_shot_on_the_bundled_digits(tmp_path: Path) -> None:
    out = run("few_shot", tmp_path, "--meta-steps", "30", "--test-tasks", "40")
    table = rows(out)
    assert [step for step, _, _ in table] == list(range(6))
    assert table[-1][1] > 40  # chance is 20 %
    assert [picture.suffix for picture in tmp_path.iterdir()] == [".png"]


def test_few_shot_reads_omniglot_from_zips_and_folders(tmp_path: Path) -> None:
    """Alphabets of the second set that the first one has are left out of the test."""
    draw = np.random.default_rng(0)
    for name, alphabets in {"small1": ["Greek", "Latin"], "small2": ["Greek", "Tagalog"]}.items():
        for alphabet in alphabets:
            for character in range(2):
                folder = tmp_path / f"images_background_{name}" / alphabet / f"character{character:02d}"
                folder.mkdir(parents=True)
                for image in range(20):
                    pixels = draw.random((105, 105)) > 0.1
                    Image.fromarray(pixels).save(folder / f"{image:02d}.png")
    folders = run("few_shot", tmp_path / "a", "--data", str(tmp_path), "--meta-steps", "2", "--test-tasks", "5")
    assert "tests on Tagalog (8 classes)" in folders
    zips = tmp_path / "zips"
    zips.mkdir()
    for name in ("images_background_small1", "images_background_small2"):
        with zipfile.ZipFile(zips / f"{name}.zip", "w") as archive:
            for folder in sorted((tmp_path / name).rglob("*")):
                archive.write(folder, folder.relative_to(tmp_path))
    from_zips = run("few_shot", tmp_path / "b", "--data", str(zips), "--meta-steps", "2", "--test-tasks", "5")
    assert rows(from_zips) == rows(folders)
