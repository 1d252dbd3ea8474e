"""A recording of a frozen Pilot: what it keeps is exact, rows are known by content, and nothing done is lost."""

import pytest
import torch
from family_models import of_families, tiny_pilot
from safetensors.torch import save_file

from tcopilot.data.batch import PromptTargetCollator
from tcopilot.mistake_log import recording as recordings
from tcopilot.mistake_log.recording import RecordedPilot, Recording, RecordingError, missing_rows, row_key
from tcopilot.models.families import logits_from_head_input
from tcopilot.models.states import StackedStates, trace_pilot

DEPTHS = (0.5, 1.0)
ROWS = [
    {"source_ids": [5, 6, 7], "target_ids": [8, 9, 1], "id": 0, "benchmark": 0},
    {"source_ids": [5, 6], "target_ids": [10, 1], "id": 1, "benchmark": 0},
    {"source_ids": [11, 12, 13, 14], "target_ids": [3, 4, 5, 1], "id": 2, "benchmark": 0},
]


def about(pilot, digest="a", depths=DEPTHS, dtype="float32"):
    return RecordedPilot(digest, depths, pilot.config.vocab_size, pilot.config.hidden_size, dtype)


def collator(pilot):
    return PromptTargetCollator(0, "right" if pilot.config.is_encoder_decoder else "left")


def recorded(folder, pilot, rows=ROWS, **options):
    recording = Recording.open(folder, about(pilot, **options))
    recording.add(rows, pilot, collator(pilot), 2)
    return recording


@pytest.mark.parametrize("family", of_families())
def test_a_record_gives_states_and_distribution_of_every_target_token_back(family, tmp_path):
    pilot = tiny_pilot(family)
    recording = recorded(tmp_path, pilot)
    for row in ROWS:
        with torch.no_grad():
            traced = trace_pilot(pilot, collator(pilot)([row]), StackedStates(DEPTHS))
        record = recording.record_of(row_key(row), DEPTHS)
        torch.testing.assert_close(record["states"], traced.states_BNP[0])
        assert record["targets"].tolist() == row["target_ids"]
        logits = logits_from_head_input(pilot, record["head_input"])
        log_probs = logits.log_softmax(-1)
        torch.testing.assert_close(log_probs, traced.logits_BNV[0].log_softmax(-1))
        torch.testing.assert_close(logits - record["normaliser"][:, None], log_probs)
        assert torch.equal(record["likeliest"][:, 0], log_probs.argmax(-1))
        some = torch.tensor([1, 8, 30])
        torch.testing.assert_close(logits_from_head_input(pilot, record["head_input"], some), logits[:, some])


def test_p_hat_is_that_of_the_states_in_the_type_that_they_are_kept_in(tmp_path):
    pilot = tiny_pilot()
    recording = recorded(tmp_path, pilot, dtype="bfloat16")
    for row in ROWS:
        record = recording.record_of(row_key(row), DEPTHS)
        logits = logits_from_head_input(pilot, record["head_input"].float())
        torch.testing.assert_close(logits - record["normaliser"][:, None], logits.log_softmax(-1))


def test_states_beyond_the_type_to_keep_them_in_are_refused(tmp_path):
    pilot = tiny_pilot()
    with torch.no_grad():
        pilot.get_input_embeddings().weight.mul_(1e8)
    with pytest.raises(RecordingError, match=r"mistake_log.log.dtype=float16: .* start a new run with mistake_log"):
        recorded(tmp_path / "a", pilot, dtype="float16")
    pilot.get_input_embeddings().weight.data[5] = torch.nan
    with pytest.raises(RecordingError, match=r"pilot.dtype=float32: .* start a new run with pilot.dtype"):
        recorded(tmp_path / "b", pilot)


def test_states_of_some_depths_can_be_read(tmp_path):
    pilot = tiny_pilot()
    recording = recorded(tmp_path, pilot, depths=(0.25, 0.5, 1.0))
    whole = recording.record_of(row_key(ROWS[0]), (0.25, 0.5, 1.0))["states"].unflatten(-1, (3, -1))
    assert torch.equal(recording.record_of(row_key(ROWS[0]), (0.5,))["states"], whole[:, 1])


def test_a_row_is_known_by_its_tokens_alone():
    same = dict(ROWS[0], id=7, benchmark=3)
    others = [dict(ROWS[0], target_ids=[8, 1]), dict(ROWS[0], source_ids=[5, 6, 7, 8], target_ids=[9, 1])]
    assert row_key(same) == row_key(ROWS[0])
    assert len({row_key(row) for row in [*ROWS, *others]}) == 5


def test_what_a_stop_finds_done_is_kept_and_the_rest_recorded_later(tmp_path):
    pilot = tiny_pilot()
    recording = Recording.open(tmp_path, about(pilot))

    def stop(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recording.add(ROWS, pilot, collator(pilot), 2, stop)
    again = Recording.open(tmp_path, about(pilot))
    assert len(again) == 2
    left = list(missing_rows(again, [*ROWS, ROWS[2]]))
    assert left == [ROWS[2]]
    again.add(left, pilot, collator(pilot), 2, flops=lambda: 3.0)
    assert len(again) == 3
    assert again.seconds > 0
    assert again.flops == 3
    assert not list(missing_rows(Recording.open(tmp_path, about(pilot)), ROWS))


def test_a_row_that_comes_twice_costs_once(tmp_path):
    pilot = tiny_pilot()
    recording = Recording.open(tmp_path, about(pilot))
    recording.add(ROWS, pilot, collator(pilot), 2, flops=lambda: 3.0)
    seconds, flops = recording.cost_of([*ROWS, *ROWS])
    assert flops == recording.flops == 9
    assert seconds == pytest.approx(recording.seconds)


def test_two_processes_need_half_the_time_and_as_many_operations(tmp_path, monkeypatch):
    pilot = tiny_pilot()
    recording = Recording.open(tmp_path, about(pilot))
    recording.add(ROWS, pilot, collator(pilot), 2, flops=lambda: 3.0)
    seconds, flops = recording.cost_of(ROWS)
    monkeypatch.setattr(recordings, "world_size", lambda: 2)
    assert recording.cost_of(ROWS) == (seconds / 2, flops)


def test_what_another_process_wrote_is_found(tmp_path):
    pilot = tiny_pilot()
    first, second = (Recording.open(tmp_path, about(pilot)) for _ in range(2))
    first.add(ROWS[:1], pilot, collator(pilot), 2)
    second.add(ROWS[1:], pilot, collator(pilot), 2)
    first.find()
    assert all(row_key(row) in first for row in ROWS)


@pytest.mark.parametrize("permissions", [0o755, 0o770])
def test_a_recording_is_read_by_those_who_may_read_its_folder(permissions, tmp_path):
    tmp_path.chmod(permissions)
    recorded(tmp_path, tiny_pilot())
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*.safetensors")} == {permissions & 0o666}


def test_another_pilot_other_depths_and_other_folders_are_refused(tmp_path):
    pilot = tiny_pilot()
    recorded(tmp_path / "a", pilot)
    with pytest.raises(RecordingError, match="another Pilot"):
        Recording.open(tmp_path / "a", about(pilot, digest="b"))
    with pytest.raises(RecordingError, match=r"depths \[0.5, 1.0\], not of \[0.8\]"):
        Recording.open(tmp_path / "a", about(pilot, depths=(0.8, 1.0)))
    with pytest.raises(RecordingError, match="give the folder `recording`"):
        Recording.read_header(tmp_path / "b")


def test_a_damaged_file_is_named_with_the_way_out(tmp_path):
    pilot = tiny_pilot()
    recorded(tmp_path, pilot)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RecordingError, match=r"damaged.*remove it, and its rows are recorded again"):
        Recording.open(tmp_path, about(pilot))
    file.unlink()
    assert len(Recording.open(tmp_path, about(pilot))) == 0


def test_a_file_of_something_else_is_named(tmp_path):
    pilot = tiny_pilot()
    recorded(tmp_path, pilot)
    save_file({"weight": torch.zeros(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(RecordingError, match=r"adapter\.safetensors holds no records .*move it elsewhere"):
        Recording.open(tmp_path, about(pilot))


def test_the_size_of_a_record_is_what_is_said(tmp_path):
    pilot = tiny_pilot()
    for dtype in ("float32", "bfloat16"):
        recording = recorded(tmp_path / dtype, pilot, dtype=dtype)
        tokens = sum(len(row["target_ids"]) for row in ROWS)
        on_disk = sum(file.stat().st_size for file in (tmp_path / dtype).glob("*.safetensors"))
        expected = tokens * recording.pilot.bytes_per_token
        assert expected <= on_disk < expected + 1500  # names and lengths
