"""Run directories that somebody else wrote: nothing that their configs name is imported, called or written."""

import contextlib
import pickle
import shutil

import composed
import pytest
import torch
from omegaconf import OmegaConf

from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.checks.targets import LIBRARY_TARGETS, target_problems
from tcopilot.app.theorem import main as theorem

CODE = "open({marker!r}, 'w').close()"
HOSTILE = {  # name to the node; {marker} must not come into being, {folder} is the run directory
    "torch.load": {"_target_": "torch.load", "f": "{folder}/bomb.pkl", "weights_only": False},
    "torch.serialization.load": {
        "_target_": "torch.serialization.load",
        "f": "{folder}/bomb.pkl",
        "weights_only": False,
    },
    "joblib.load": {"_target_": "joblib.load", "filename": "{folder}/bomb.pkl"},
    "numpy.load": {"_target_": "numpy.load", "file": "{folder}/bomb.pkl", "allow_pickle": True},
    "pandas.read_pickle": {"_target_": "pandas.read_pickle", "filepath_or_buffer": "{folder}/bomb.pkl"},
    "torch.hub.load": {"_target_": "torch.hub.load", "repo_or_dir": "{folder}", "model": "bomb", "source": "local"},
    "remote code": {
        "_target_": "transformers.AutoModel.from_pretrained",
        "pretrained_model_name_or_path": "{folder}",
        "trust_remote_code": True,
    },
    "Path.write_text": {
        "_target_": "pathlib.Path.write_text",
        "self": {"_target_": "pathlib.Path", "_args_": ["{marker}"]},
        "data": "x",
    },
    "Path.touch": {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": ["{marker}"]}},
    "os.system": {"_target_": "os.system", "command": "touch {marker}"},
    "os.mkdir": {"_target_": "os.mkdir", "path": "{marker}"},
    "subprocess.run": {"_target_": "subprocess.run", "args": ["touch", "{marker}"]},
    "subprocess.Popen": {"_target_": "subprocess.Popen", "args": ["touch", "{marker}"]},
    "exec": {"_target_": "builtins.exec", "_args_": [CODE]},
    "eval": {"_target_": "builtins.eval", "_args_": [CODE]},
    "open": {"_target_": "builtins.open", "file": "{marker}", "mode": "w"},
    "runpy": {"_target_": "runpy.run_path", "path_name": "{folder}/bomb.py"},
    "timeit": {"_target_": "timeit.timeit", "stmt": CODE, "number": 1},
    "shutil.copy": {"_target_": "shutil.copy", "src": "{folder}/config.yaml", "dst": "{marker}"},
    "logging": {"_target_": "logging.FileHandler", "filename": "{marker}"},
    "torch.save": {"_target_": "torch.save", "obj": 1, "f": "{marker}"},
    "numpy.savetxt": {"_target_": "numpy.savetxt", "fname": "{marker}", "X": [1]},
    "OmegaConf.save": {"_target_": "omegaconf.OmegaConf.save", "config": {"a": 1}, "f": "{marker}"},
    "hydra's own": {
        "_target_": "hydra.utils.instantiate",
        "config": {"_target_": "os.system", "command": "touch {marker}"},
    },
    "a function of ours": {"_target_": "tcopilot.run_directory.write_whole", "path": "{marker}", "text": "x"},
    "a module found through ours": {"_target_": "tcopilot.training.checkpoints.os.mkdir", "path": "{marker}"},
    "a class found through ours": {"_target_": "tcopilot.app.sweep.Path.touch", "self": "{marker}"},
    "a method of ours": {"_target_": "tcopilot.TCopilotForCausalLM.from_pretrained", "_args_": ["{folder}"]},
    "a partial": {"_target_": "os.mkdir", "_partial_": True, "path": "{marker}"},
    "made by an interpolation": "${oc.create:{_target_: os.mkdir, path: '{marker}'}}",
    "named by an interpolation": {"_target_": "${oc.decode:os.mkdir}", "path": "{marker}"},
    "in an argument": {
        "_target_": "tcopilot.training.callbacks.RoundCheckpoint",
        "folder": {"_target_": "os.mkdir", "path": "{marker}"},
    },
    "in a list": {"_target_": "lightning.Trainer", "plugins": [{"_target_": "os.mkdir", "path": "{marker}"}]},
    "a module of the run's own": {"_target_": "bomb.Bomb"},
}
PLACES = (
    *("objective", "mistake_log.log.policy", "mistake_log.log.storage", "callbacks.more", "logger.more"),
    *("pilot.optimizer", "copilot.scheduler", "pilot.adapter", "data", "data.benchmarks.more", "trainer.plugins"),
    *("pilot.config", "fusion.rule", "evaluation.more", "trainer.strategy"),
)


class Bomb:
    """What a pickle can do."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return composed.train(tmp_path_factory.mktemp("finished") / "run", *composed.SMALL, "fusion.weight=[0,1]")


@pytest.fixture
def hostile(finished, tmp_path, monkeypatch):
    """A copy of a run whose config names something else in one place; returns the function that makes it."""
    folder, marker = tmp_path / "run", tmp_path / "marker"

    def make(place, node):
        shutil.copytree(finished, folder)
        (folder / "bomb.pkl").write_bytes(pickle.dumps(Bomb(str(marker))))
        for name in ("bomb.py", "hubconf.py"):
            (folder / name).write_text(CODE.format(marker=str(marker)))
        monkeypatch.syspath_prepend(str(folder))
        config = OmegaConf.load(folder / "config.yaml")
        OmegaConf.update(config, place, _filled(node, folder, marker), merge=False, force_add=True)
        OmegaConf.save(config, folder / "config.yaml")
        return folder

    yield make
    assert not marker.exists()


def _filled(node, folder, marker):
    if isinstance(node, dict):
        return {key: _filled(value, folder, marker) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, folder, marker) for value in node]
    names = {"{folder}": str(folder), "{marker}": str(marker), "{marker!r}": repr(str(marker))}
    for name, value in names.items() if isinstance(node, str) else ():
        node = node.replace(name, value)
    return node


def evaluate(folder, tmp_path):
    composed.evaluate(folder, tmp_path / "evaluation")


def resume(folder, tmp_path):
    composed.run.train(composed.compose_config(*composed.QUIET[2:], f"resume={folder}", "rounds=9"))


@pytest.mark.parametrize("program", [evaluate, pytest.param(resume, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_config_from_disk_runs_nothing_but_what_the_package_uses(kind, program, hostile, tmp_path):
    place = PLACES[list(HOSTILE).index(kind) % len(PLACES)]
    folder = hostile(place, HOSTILE[kind])
    with pytest.raises(ConfigError, match=r"trust=\[|cannot be read"):
        program(folder, tmp_path)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_a_config_is_looked_at(place, hostile, tmp_path):
    with pytest.raises(ConfigError, match="may name only classes of this package"):
        evaluate(hostile(place, HOSTILE["os.system"]), tmp_path)


def test_the_theorem_refuses_it_too(hostile, capsys):
    assert theorem([str(hostile("objective", HOSTILE["torch.load"]))]) == 1
    assert "torch.load" in capsys.readouterr().err


@pytest.mark.slow
def test_a_module_is_trusted_only_when_the_command_says_so(hostile, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from tcopilot.training.objectives import MeanSquaredError\nclass Mine(MeanSquaredError): ...\n"
    )
    folder = hostile("objective", {"_target_": "mine.Mine"})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(ConfigError, match=r"objective\._target_=mine\.Mine: .* trust=\[mine\]"):
            evaluate(folder, tmp_path)
        composed.evaluate(folder, tmp_path / "evaluation", "trust=[mine]")
    assert (tmp_path / "evaluation" / "results.json").exists()


def test_the_list_holds_just_what_the_configs_name():
    named = {
        line.split("_target_:")[1].split("#")[0].strip()
        for file in composed.CONFIGS.rglob("*.yaml")
        for line in file.read_text().splitlines()
        if "_target_:" in line
    }
    assert {target for target in named if not target.startswith("tcopilot.")} == LIBRARY_TARGETS
    everything = OmegaConf.create([{"_target_": target} for target in sorted(named)])
    assert target_problems(OmegaConf.create({"all": everything})) == []


def test_the_bomb_works(tmp_path):
    """Otherwise the tests above could not fail."""
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb(str(tmp_path / "marker"))))
    with contextlib.suppress(RuntimeError):  # what the pickle made is no checkpoint
        torch.load(tmp_path / "bomb.pkl", weights_only=False)
    assert (tmp_path / "marker").exists()
