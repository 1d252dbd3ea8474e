"""Checkpoint folders: what they can hold, every way to damage one, and that a save that fails hurts nothing."""

import itertools
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import composed
import pytest
import torch
from omegaconf import OmegaConf
from processes import Forked, run_in_processes
from resumable_run import ROUNDS, Run, assert_equal, assert_same_end, finished
from safetensors import SafetensorError
from small_training import EachRound, of_records
from torch import distributed

import tcopilot
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.policies import Fifo, Reservoir
from tcopilot.training import checkpoints
from tcopilot.training import serialization as codec
from tcopilot.training.callbacks import MistakeLogCallback, RngState, RoundCheckpoint
from tcopilot.training.checkpoints import (
    MANIFEST,
    PER_RANK,
    CheckpointError,
    SafeCheckpointIO,
    newest_good,
    pack,
    save,
    unpack,
    verify,
)

DTYPES = sorted(codec.DTYPES, key=str)


def through_files(value, folder):
    """What comes back after a value has been on disk."""
    save({"value": value}, folder / "round=1")
    return SafeCheckpointIO().load_checkpoint(folder / "round=1")["value"]


# Values --------------------------------------------------------------------------------------------------------------


def random_tensor(draw):
    shape = [draw.randrange(4) for _ in range(draw.randrange(4))]
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    tensor = torch.randint(-9, 9, shape, generator=generator).to(draw.choice(DTYPES))
    return tensor.transpose(0, 1) if len(shape) == 2 and draw.random() < 0.5 else tensor


def random_value(draw, depth=4):
    plain = [
        lambda: None,
        lambda: draw.random() < 0.5,
        lambda: draw.randrange(-(2**70), 2**70),
        lambda: draw.choice([0.0, -0.0, float("inf"), -1e-320, draw.random() * 10.0 ** draw.randrange(-300, 300)]),
        lambda: "".join(chr(draw.choice([0, 10, 34, 92, 955, 0x1F600, 0xD800])) for _ in range(draw.randrange(4))),
        lambda: random_tensor(draw),
    ]
    nested = [
        lambda: [random_value(draw, depth - 1) for _ in range(draw.randrange(4))],
        lambda: tuple(random_value(draw, depth - 1) for _ in range(draw.randrange(4))),
        lambda: {random_key(draw): random_value(draw, depth - 1) for _ in range(draw.randrange(4))},
    ]
    return draw.choice(plain + 2 * nested if depth else plain)()


def random_key(draw):
    return draw.choice([None, True, draw.randrange(-5, 5), draw.random(), f"key {draw.randrange(9)}", (1, "a"), ""])


def same_to_the_bit(left, right):
    """Equal with types, orders of keys, dtypes and signs of zero."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.contiguous().flatten().view(torch.uint8).equal(right.contiguous().flatten().view(torch.uint8))
    elif isinstance(left, dict):
        assert [(type(key), key) for key in left] == [(type(key), key) for key in right]
        for one, other in zip(left.values(), right.values(), strict=True):
            same_to_the_bit(one, other)
    elif isinstance(left, list | tuple):
        assert type(left) is type(right)
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same_to_the_bit(one, other)
    else:
        assert (type(left), repr(left)) == (type(right), repr(right))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_nested_value_comes_back_as_it_was(seed, tmp_path):
    value = random_value(random.Random(seed), depth=5)
    same_to_the_bit(value, through_files(value, tmp_path))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_to_the_bit(dtype, tmp_path):
    value = {
        "scalar": torch.tensor(1.5).to(dtype),
        "empty": [torch.zeros(0, 3, dtype=dtype), torch.zeros(0, dtype=dtype)],
        "matrix": torch.arange(-6, 6).reshape(3, 4).to(dtype),
    }
    same_to_the_bit(value, through_files(value, tmp_path))


def test_nan_stays_nan(tmp_path):
    assert torch.isnan(torch.tensor(through_files(float("nan"), tmp_path)))
    assert through_files(torch.tensor([float("nan"), -0.0]), tmp_path).isnan().tolist() == [True, False]


def test_tensors_that_share_memory_come_back_whole(tmp_path):
    base = torch.arange(12.0)
    value = {
        "base": base,
        "again": base,
        "part": base[2:5],
        "turned": base.view(3, 4).T,
        "bits": base.view(torch.int32),
    }
    found = through_files(value, tmp_path)
    same_to_the_bit(value, found)
    assert found["base"] is found["again"]  # tied weights are kept once
    found["part"] += 1
    assert found["base"].equal(torch.arange(12.0))


def test_a_parameter_comes_back_as_a_plain_tensor_that_can_be_changed(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    found = through_files({"weight": parameter, "view": parameter[0]}, tmp_path)
    assert type(found["weight"]) is torch.Tensor
    assert not found["weight"].requires_grad
    found["weight"] += 1
    assert parameter.sum() == 6


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, {"b": object()}]}, "checkpoint['a'][1]['b'] is a object"),
        ({"a": (1, {2, 3})}, "checkpoint['a'][1] is a set"),
        ([partial(print)], "checkpoint[0] is a partial"),
        ({"a": b"bytes"}, "checkpoint['a'] is a bytes"),
        ({"a": {frozenset(): 1}}, "a key of checkpoint['a'] is a frozenset"),
        ({"a": torch.Size([1])}, "checkpoint['a'] is a Size"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "checkpoint['a'] is a tensor of torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, "checkpoint['a'] is a tensor of torch.float32, torch.sparse_coo"),
        ({"a": torch.zeros(2, device="meta")}, "on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_refused_with_its_place(value, place):
    with pytest.raises(CheckpointError) as refused:
        pack(value)
    assert place in str(refused.value)


def test_a_save_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="is a object"):
        save({"a": object()}, tmp_path / "round=1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "structure", [{"class": "os.system"}, {"dict": 3}, {"tensor": "9"}, {}, {"tuple": [], "dict": []}]
)
def test_a_structure_of_unknown_kind_is_not_interpreted(structure):
    with pytest.raises((ValueError, TypeError, KeyError)):
        unpack(structure, {})


def test_optimizers_and_random_states_survive(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    value = {"optimizer": optimizer.state_dict(), "random": random.getstate(), "torch": torch.get_rng_state()}
    found = through_files(value, tmp_path)
    assert_equal(value, found)
    random.setstate(found["random"])
    torch.optim.AdamW([weight]).load_state_dict(found["optimizer"])


# Damage --------------------------------------------------------------------------------------------------------------

FILES = ["main.json", "main.safetensors", "rank0.json", "rank0.safetensors", MANIFEST]


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints."""
    for rounds in (5, 10, 15):
        state = {"pytorch-lightning_version": "2.6.6", "weights": torch.full((8,), float(rounds)), "round": rounds}
        save(
            {**state, PER_RANK: {"callbacks": {"Log": {"records": torch.arange(rounds)}}}},
            tmp_path / f"round={rounds}",
        )
    return tmp_path


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_the_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)


def lengthen(path):
    with path.open("ab") as file:
        file.write(b" ")


def turn_into_a_folder(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = [truncate, empty, flip_a_bit, flip_the_last_bit, lengthen, Path.unlink, turn_into_a_folder, dangling]


def test_an_intact_checkpoint_holds_exactly_these_files_and_comes_back(folder):
    assert sorted(path.name for path in (folder / "round=15").iterdir()) == sorted(FILES)
    assert all(verify(path, 1) is None for path in checkpoints.checkpoints(folder))
    found = SafeCheckpointIO().load_checkpoint(folder / "round=15")
    assert found["weights"].tolist() == [15.0] * 8
    assert found["callbacks"]["Log"]["records"].equal(torch.arange(15))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(name, damage, folder, caplog):
    damage(folder / "round=15" / name)
    assert str(folder / "round=15") in verify(folder / "round=15")
    assert name in verify(folder / "round=15")
    with pytest.raises(CheckpointError):
        SafeCheckpointIO().load_checkpoint(folder / "round=15")
    with caplog.at_level(logging.WARNING):
        assert newest_good(folder, 1) == folder / "round=10"
    (said,) = caplog.messages
    assert str(folder / "round=15") in said
    assert name in said
    assert said.endswith(f"The one before it is used: {folder / 'round=10'}")


@pytest.mark.parametrize("name", ["rank0.json", pytest.param(MANIFEST, marks=pytest.mark.slow)])
def test_no_single_flipped_bit_goes_unnoticed(name, folder):
    path = folder / "round=5" / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in random.Random(place).sample(range(8), 2):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert verify(path.parent), (place, bit)


def test_an_intact_folder_says_nothing(folder, caplog):
    assert newest_good(folder, 1) == folder / "round=15"
    assert caplog.messages == []
    assert newest_good(folder / "none", 1) is None


def test_all_damaged_is_one_error_that_names_each(folder):
    for rounds in (5, 10, 15):
        truncate(folder / f"round={rounds}" / "main.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint is intact, start the run anew") as refused:
        newest_good(folder, 1)
    assert all(f"round={rounds}/main.safetensors has" in str(refused.value) for rounds in (5, 10, 15))


def rewrite(path, **changes):
    """A manifest whose own checksum fits what was put into it, as only somebody who means it makes one."""
    body = json.loads((path / MANIFEST).read_text()) | changes
    del body["sha256"]
    (path / MANIFEST).write_text(checkpoints._sealed(body))


def files_of(path, **changes):
    return {**json.loads((path / MANIFEST).read_text())["files"], **changes}


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "..", "sub/main.json", "main.pkl", "manifest.json", "rank7.json", ""]
)
def test_a_manifest_cannot_name_anything_but_the_files_of_a_checkpoint(name, folder):
    path = folder / "round=15"
    files = files_of(path)
    files[name] = files.pop("main.json")
    rewrite(path, files=files)
    assert "no file of a checkpoint" in verify(path)
    with pytest.raises(CheckpointError, match="no file of a checkpoint"):
        SafeCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 3}, "format version 3; this program reads 2"),
        ({"version": None}, "format version None"),
        ({"format": "another"}, "does not describe a checkpoint"),
        ({"round": 14}, "has been renamed"),
        ({"files": []}, "does not list the files"),
        ({"files": {}}, "does not list the files"),
        ({"world_size": "1"}, "does not list the files"),
        ({"world_size": 10**12}, "does not list the files"),
        ({"world_size": -1, "files": {}}, "does not list the files"),
    ],
    ids=str,
)
def test_a_manifest_of_another_kind_is_refused(changes, said, folder):
    rewrite(folder / "round=15", **changes)
    assert said in verify(folder / "round=15")


@pytest.mark.parametrize("entry", [None, {}, {"bytes": 1}, {"bytes": "x", "sha256": 3}, {"bytes": -1, "sha256": "00"}])
def test_a_manifest_with_nonsense_about_a_file_is_refused(entry, folder):
    path = folder / "round=15"
    rewrite(path, files=files_of(path, **{"main.json": entry}))
    assert "main.json" in verify(path)


@pytest.mark.parametrize(
    "text", ["[]", "3", '"text"', "{}", "[" * 100_000, '{"format": "tcopilot checkpoint"}', "\0", "{"]
)
def test_a_manifest_that_is_something_else_is_refused(text, folder):
    (folder / "round=15" / MANIFEST).write_text(text)
    assert MANIFEST in verify(folder / "round=15") or "format version None" in verify(folder / "round=15")


def test_what_is_no_checkpoint_is_not_taken_for_one(folder):
    (folder / "round=99").mkdir()
    (folder / "round=99" / "model.safetensors").write_bytes(b"foreign")
    (folder / "round=abc").mkdir()
    (folder / "round=98").write_text("a file")
    (folder / ".round=97.tmp").mkdir()
    assert [path.name for path in checkpoints.checkpoints(folder)][-2:] == ["round=98", "round=99"]
    assert "has no manifest.json" in verify(folder / "round=99")
    assert "is not a folder" in verify(folder / "round=98")
    assert newest_good(folder, 1) == folder / "round=15"


def test_a_renamed_checkpoint_does_not_pass_for_another_round(folder):
    (folder / "round=15").rename(folder / "round=20")
    assert "was saved after round 15: it has been renamed" in verify(folder / "round=20")


def test_another_number_of_processes_is_refused_with_the_mend(folder):
    with pytest.raises(CheckpointError) as raised:
        newest_good(folder, 4)
    for refused in (verify(folder / "round=15", 4), str(raised.value)):
        for part in ("saved by 1 process,", "this run has 4", "Resume with 1", "or start a new run"):
            assert part in refused


# Pickles -------------------------------------------------------------------------------------------------------------


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def bomb(tmp_path_factory):
    """Two pickles, torch's and the bare one, and the file that both create."""
    place = tmp_path_factory.mktemp("bomb")
    torch.save(Bomb(place / "exploded"), place / "torch.ckpt")
    (place / "bare.ckpt").write_bytes(pickle.dumps(Bomb(place / "exploded")))
    yield place
    pickle.loads((place / "bare.ckpt").read_bytes())
    assert (place / "exploded").exists()  # the bomb is live


@pytest.mark.parametrize("kind", ["torch.ckpt", "bare.ckpt"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_executed(kind, name, sealed, folder, bomb):
    path = folder / "round=15"
    shutil.copy(bomb / kind, path / name)
    if sealed and name != MANIFEST:  # somebody has taken the trouble to make the manifest fit
        size, digest = (path / name).stat().st_size, checkpoints._sha256(path / name)
        rewrite(path, files=files_of(path, **{name: {"bytes": size, "sha256": digest}}))
        assert verify(path) is None
    with pytest.raises(CheckpointError, match=name.split(".")[0]):
        SafeCheckpointIO().load_checkpoint(path)
    assert not (bomb / "exploded").exists()


@pytest.mark.parametrize("kind", ["torch.ckpt", "bare.ckpt"])
def test_pickles_beside_checkpoints_are_ignored_with_a_message(kind, folder, bomb, caplog):
    shutil.copy(bomb / kind, folder / "round=99.ckpt")
    shutil.copy(bomb / kind, folder / "round=15" / "main.pkl")
    assert newest_good(folder, 1) == folder / "round=15"
    (said,) = caplog.messages
    assert f"{folder / 'round=99.ckpt'} is not used: it is a pickle file" in said
    SafeCheckpointIO().load_checkpoint(folder / "round=15")
    assert not (bomb / "exploded").exists()


def test_a_pickle_given_as_the_checkpoint_is_refused(bomb):
    run = Run("llama", bomb / "run")
    with pytest.raises(CheckpointError, match="is not a folder"):
        run.fit(bomb / "torch.ckpt")
    assert not (bomb / "exploded").exists()


def test_no_code_of_the_package_unpickles():
    package = Path(tcopilot.__file__).parent
    for path in package.rglob("*.py"):
        assert "torch.load" not in path.read_text(), path
        assert "pickle.load" not in path.read_text(), path  # `UnpicklingError` may be named


# Saves that fail ----------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("_flush", OSError(28, "No space left on device")),
        ("_sealed", OSError(30, "Read-only file system")),
        ("_sha256", OSError(5, "Input/output error")),
    ],
)
def test_a_save_that_fails_removes_what_it_wrote_and_says_how_to_go_on(function, error, folder, monkeypatch):
    def fail(*args):
        raise error

    folder = shutil.copytree(folder, folder / "run" / "checkpoints")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "verify", lambda path: None)  # it reads with what is broken here
        patched.setattr(checkpoints, function, fail)
        with pytest.raises(CheckpointError) as failed:
            save({"a": torch.zeros(3)}, folder / "round=20")
    assert names(folder) == ["round=10", "round=15", "round=5"]
    assert newest_good(folder, 1) == folder / "round=15"
    for part in (f"{folder}/round=20 could not be saved", str(error), f"Last good checkpoint: {folder}/round=15"):
        assert part in str(failed.value)
    assert str(failed.value).endswith(f"go on with: python train.py resume={folder.parent}")


def test_the_first_save_that_fails_says_to_start_anew(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"No checkpoint was saved before it\..*start the run anew"):
        save({}, tmp_path / "file" / "round=20")


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_clear_error_and_leaves_the_last_checkpoint(tmp_path):
    """Where the disk is full is simulated by a limit on the size of files, which grows too small with the log."""

    def fill(trainer, module):
        if module.round == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def fit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            Run("llama", tmp_path / "checkpoints", every=3, callbacks=[EachRound(fill)]).fit()
        except CheckpointError as error:
            print("error:", error)

    ran = Forked(fit).wait(timeout=200)
    assert ran.returncode == 0, ran.stderr
    (said,) = [line for line in ran.stdout.splitlines() if line.startswith("error:")]
    assert f"{tmp_path}/checkpoints/round=9 could not be saved: " in said
    assert "File too large" in said
    assert f"Last good checkpoint: {tmp_path}/checkpoints/round=6" in said
    assert names(tmp_path / "checkpoints") == ["round=3", "round=6"]
    resumed = Run("llama", tmp_path / "checkpoints", seed=99).fit(newest_good(tmp_path / "checkpoints", 1))
    assert_same_end(finished("llama"), resumed, 6)


def test_leftovers_of_crashed_saves_are_removed_at_the_next_save(folder):
    (folder / ".round=17.tmp").mkdir()
    (folder / ".round=10.old0.tmp").mkdir()
    save({}, folder / "round=20")
    assert names(folder) == ["round=10", "round=15", "round=20", "round=5"]


def test_a_checkpoint_that_is_saved_again_is_replaced(folder):
    save({"pytorch-lightning_version": "2.6.6", "weights": torch.zeros(1)}, folder / "round=15")
    assert SafeCheckpointIO().load_checkpoint(folder / "round=15")["weights"].tolist() == [0]
    assert names(folder) == ["round=10", "round=15", "round=5"]


# Runs ----------------------------------------------------------------------------------------------------------------


def test_old_checkpoints_go_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    there = []
    sealed = checkpoints._sealed

    def watch(body):
        there.append(names(tmp_path))
        return sealed(body)

    run = Run("llama", tmp_path, every=3, keep=1).idle()
    monkeypatch.setattr(checkpoints, "_sealed", watch)
    run.fit()
    monkeypatch.undo()
    writes = [found for found in there if any(name.startswith(".") for name in found)]
    assert writes[1:3] == [[".round=6.tmp", "round=3"], [".round=9.tmp", "round=6"]]
    assert names(tmp_path) == ["round=10"]


def test_a_run_does_not_mix_its_checkpoints_with_those_of_another(tmp_path):
    Run("llama", tmp_path, every=6).idle().fit()
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run, round=10 the newest"):
        Run("llama", tmp_path).fit()
    assert names(tmp_path) == ["round=10", "round=6"]


@pytest.mark.slow
def test_a_run_resumed_past_a_damaged_checkpoint_replaces_it(tmp_path):
    whole = finished("t5")
    for rounds in (4, 8, 10):
        shutil.copytree(whole.folder / f"round={rounds}", tmp_path / f"round={rounds}")
    for rounds in (8, 10):
        truncate(tmp_path / f"round={rounds}" / "main.json")
    resumed = Run("t5", tmp_path, seed=99, every=2, keep=1).fit(newest_good(tmp_path, 1))
    assert_same_end(whole, resumed, 4)
    assert names(tmp_path) == ["round=10"]
    assert verify(tmp_path / "round=10", 1) is None


def test_retention_never_removes_the_newest_state_in_favour_of_a_damaged_later_one(tmp_path):
    Run("llama", tmp_path, every=4, keep=9).idle().fit()
    truncate(tmp_path / "round=10" / "main.json")
    truncate(tmp_path / "round=8" / "main.json")
    seen = []

    class Watch(RoundCheckpoint):
        def _write(self, *args):
            super()._write(*args)
            seen.append(names(tmp_path))

    run = Run("llama", tmp_path, seed=99).idle()
    saver = next(i for i, c in enumerate(run.trainer.callbacks) if isinstance(c, RoundCheckpoint))
    run.trainer.callbacks[saver] = Watch(str(tmp_path), every_n_rounds=1, keep=1)
    run.fit(newest_good(tmp_path, 1))
    assert seen == [[f"round={rounds}"] for rounds in range(5, 11)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "policy", "workers", "saved_after"),
    [
        pytest.param(*case, marks=[] if case in (("t5", Reservoir, 1, 3), ("llama", Fifo, 0, 7)) else pytest.mark.slow)
        for case in itertools.product(["t5", "llama"], [Fifo, Reservoir], [0, 1], [3, 7])
        if sum((case[0] == "llama", case[1] is Reservoir, case[2], case[3] == 7)) % 2 == 0
    ],
)
def test_resuming_is_exact_in_the_middle_with_loader_processes(family, policy, workers, saved_after, tmp_path):
    """Any three of the four meet in all values."""

    def run(folder, **options):
        made = Run(family, folder, log=MistakeLog(capacity_rounds=3, policy=policy()), steps_per_round=3, **options)
        made.data.num_workers = workers
        return made

    whole = run(tmp_path / "whole", every=saved_after, keep=9).fit()
    resumed = run(tmp_path / "more", seed=99).fit(tmp_path / "whole" / f"round={saved_after}")
    assert_same_end(whole, resumed, saved_after)


class Broken(Exception):
    """What goes wrong in validation."""


@pytest.mark.slow
def test_a_state_is_not_lost_when_the_validation_after_it_fails(tmp_path, monkeypatch):
    options = {"trainer": {"limit_val_batches": 1, "val_check_interval": 5}}
    run = Run("llama", tmp_path / "cut", every=5, **options)

    def fail(*args):
        raise Broken

    monkeypatch.setattr(run.module, "validation_step", fail)
    with pytest.raises(Broken):
        run.fit()
    assert names(tmp_path / "cut") == ["round=5"]
    resumed = Run("llama", tmp_path / "cut", seed=99, **options).fit(newest_good(tmp_path / "cut", 1))
    assert_same_end(finished("llama"), resumed, 5)


@pytest.mark.slow
def test_a_user_who_resumes_past_damage_is_told_and_ends_where_an_unbroken_run_does(
    tmp_path, caplog, capsys, monkeypatch
):
    monkeypatch.setattr(composed.run, "budget", lambda *_: None)
    settings = [*composed.SMALL, "callbacks.checkpoint.every_n_rounds=1", "callbacks.checkpoint.keep=9"]
    folder = composed.train(tmp_path / "run", *settings)
    before = (folder / "export" / "model.safetensors").read_bytes()
    for rounds in (3, 4):
        flip_a_bit(folder / "checkpoints" / f"round={rounds}" / "main.safetensors")
    composed.run.train(composed.compose_config(f"resume={folder}", "traceback=true"))
    said = [message for message in caplog.messages if "The one before it is used" in message]
    assert len(said) == 2
    assert all(message.endswith(f"{folder}/checkpoints/round=2") for message in said)
    assert (folder / "export" / "model.safetensors").read_bytes() == before
    assert all(verify(path, 1) is None for path in checkpoints.checkpoints(folder / "checkpoints"))

    for path in checkpoints.checkpoints(folder / "checkpoints"):
        truncate(path / "rank0.safetensors")
    config = OmegaConf.merge(OmegaConf.load(folder / "config.yaml"), {"traceback": False})
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(SystemExit) as left:
        composed.run.train(composed.compose_config(f"resume={folder}"))
    assert left.value.code == 1
    assert "no checkpoint is intact, start the run anew" in capsys.readouterr().err


def test_alarms_that_were_raised_are_not_raised_again():
    from tcopilot.training.callbacks import CopilotAlarms

    before, after = CopilotAlarms(), CopilotAlarms()
    before.raised = {"stale", "collapsed"}
    structure, tensors = pack(before.state_dict())
    after.load_state_dict(unpack(structure, tensors))
    assert after.raised == before.raised


# Several processes ---------------------------------------------------------------------------------------------------


def _save_and_load(folder):
    rank = distributed.get_rank()
    own = {"callbacks": {"Log": {"records": torch.full((3 + rank,), rank), "rank": rank}}}
    shared = {"pytorch-lightning_version": "2.6.6", "callbacks": {"Health": {"raised": []}}, "weights": torch.ones(4)}
    save({**shared, PER_RANK: own}, folder / "round=2")
    found = SafeCheckpointIO().load_checkpoint(folder / "round=2")
    assert_equal(found["callbacks"], shared["callbacks"] | own["callbacks"])
    assert newest_good(folder, 2) == folder / "round=2"
    with pytest.raises(CheckpointError, match=r"saved by callbacks\.checkpoint only"):
        SafeCheckpointIO().save_checkpoint(shared, folder / "round=3")


def test_each_process_gets_its_own_state_back(tmp_path):
    run_in_processes(_save_and_load, tmp_path)
    assert names(tmp_path) == ["round=2"]
    assert names(tmp_path / "round=2") == sorted([*FILES, "rank1.json", "rank1.safetensors"])
    assert verify(tmp_path / "round=2", 2) is None
    with pytest.raises(CheckpointError, match=r"saved by 2 processes, .*this run has 1"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "round=2")
    flip_a_bit(tmp_path / "round=2" / "rank1.safetensors")
    assert "rank1.safetensors" in verify(tmp_path / "round=2")


def _fail_on_the_second(folder):
    save({"weights": torch.ones(2)}, folder / "checkpoints" / "round=2")
    if distributed.get_rank() == 1:
        checkpoints._flush = lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError) as failed:
        save({"weights": torch.zeros(2)}, folder / "checkpoints" / "round=4")
    wanted = ("No space left" if distributed.get_rank() else "another process", "Last good checkpoint: ", "round=2")
    assert all(part in str(failed.value) for part in wanted)


def test_when_one_process_cannot_write_none_is_left_waiting(tmp_path):
    run_in_processes(_fail_on_the_second, tmp_path)
    assert names(tmp_path / "checkpoints") == ["round=2"]


def _train(folder):
    """Train, stop by a signal that only the second process gets, resume, and compare with a run in one go."""
    from tcopilot.processes import STOP_SIGNALS
    from tcopilot.training.callbacks import GracefulStop

    rank = distributed.get_rank()
    strategy = {"strategy": "ddp", "devices": 2, "num_nodes": 1}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {
        "MASTER_PORT": str(30500 + os.getppid() % 1000),
        "TORCHELASTIC_RUN_ID": "test",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }

    def press(trainer, module):
        if module.round == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    whole = Run("t5", folder / "whole", every=4, trainer=strategy).fit()
    cut = Run("t5", folder / "cut", every=2, trainer=strategy, callbacks=[EachRound(press)]).fit()
    assert signal.SIGUSR1 in STOP_SIGNALS
    assert all(c.requested for c in cut.trainer.callbacks if isinstance(c, GracefulStop))
    assert cut.module.round < ROUNDS
    distributed.barrier()
    found = newest_good(folder / "cut", 2)
    assert found == folder / "cut" / f"round={cut.module.round}"
    resumed = Run("t5", folder / "cut", seed=99, trainer=strategy).fit(found)
    assert_same_end(whole, resumed, cut.module.round)
    torch.save(of_records(resumed.log, "energy"), folder / f"log{rank}.pt")


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_each_with_its_own_log(tmp_path):
    run_in_processes(_train, tmp_path, timeout=250)
    logs = [torch.load(tmp_path / f"log{rank}.pt") for rank in (0, 1)]
    assert not torch.equal(*logs)


def test_the_loaders_position_is_the_same_on_all_ranks():
    """So it may be saved once: each rank draws the same global batches and takes its slice."""
    from types import SimpleNamespace

    from small_training import task_data

    for workers in (0, 1):
        states = []
        for rank in (0, 1):
            data = task_data("t5", ROUNDS)
            data.num_workers, data.trainer = workers, SimpleNamespace(global_rank=rank, world_size=2)
            torch.manual_seed(rank)
            loader = data.train_dataloader()
            rows = iter(loader)
            for _ in range(3):
                next(rows)
            states.append(without_seed(loader.state_dict()))
        assert_equal(*states)


def without_seed(state):
    """Workers draw no random numbers, so the seed they would get does not matter."""
    if not isinstance(state, dict):
        return state
    return {key: without_seed(value) for key, value in state.items() if key != "_base_seed"}


def test_callbacks_with_a_state_of_their_own_per_process_say_so():
    assert MistakeLogCallback.per_rank
    assert RngState.per_rank
