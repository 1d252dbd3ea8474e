import json
import logging
from itertools import chain
from types import SimpleNamespace

import datasets
import pytest
import torch
from lightning import LightningModule, Trainer

from tcopilot.data import DataError, ExactMatch, GeneratedTask, TCopilotDataModule, byte_tokenizer, word_tokenizer


def tasks(*kinds: str) -> dict[str, GeneratedTask]:
    return {kind: GeneratedTask(name=kind, kind=kind, train=200, validation=20, test=30) for kind in kinds}


def module(*kinds: str, **settings) -> TCopilotDataModule:
    data = TCopilotDataModule(tasks(*(kinds or ("word_problems",))), **({"batch_size": 8, "rounds": 12} | settings))
    data.prepare(word_tokenizer(data.vocabulary), "left")
    return data


def local(folder, rows=40, splits=("train", "test"), **settings) -> TCopilotDataModule:
    for split in splits:
        lines = [json.dumps({"prompt": f"{split} {i}", "target": str(i)}) for i in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    benchmark = ExactMatch(name="mine", target=" {target}")
    return TCopilotDataModule({"mine": benchmark}, path=folder, **({"batch_size": 8, "rounds": 12} | settings))


def with_bad_rows(folder, bad=(11, 13), **settings) -> TCopilotDataModule:
    data = local(folder, splits=("train", "validation", "test"), **settings)
    for split in ("train", "test"):
        lines = (folder / f"{split}.jsonl").read_text().splitlines()
        for number in bad:
            lines[number - 1] = '{"prompt": null, "target": "7"}'
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return data


def test_a_row_without_a_key_is_skipped_and_counted(tmp_path):
    data = with_bad_rows(tmp_path, on_error="skip")
    for split in ("train", "test"):
        text = (tmp_path / f"{split}.jsonl").read_text().replace('{"prompt": null, ', "{")
        (tmp_path / f"{split}.jsonl").write_text(text)
    summary = prepared(data).summary()
    for split in ("train", "test"):
        assert (summary[f"mine/{split}"]["rows"], summary[f"mine/{split}"]["skipped"]) == (38, 2)
    assert "row 11: no 'prompt' in the row: found target" in data.skipped["mine"][0]


def test_rows_that_all_lack_a_key_are_refused_even_so(tmp_path):
    data = with_bad_rows(tmp_path, on_error="skip")
    (tmp_path / "train.jsonl").write_text('{"question": "a", "target": "b"}\n' * 3)
    with pytest.raises(DataError, match=r"train\.jsonl: row 1 has no column 'prompt'"):
        prepared(data)


def prepared(data: TCopilotDataModule) -> TCopilotDataModule:
    data.prepare(byte_tokenizer(), "left")
    return data


def ids(loader) -> list[list[int]]:
    return [batch.ids_B.tolist() for batch in loader]


def test_an_epoch_is_the_whole_budget():
    loader = module(rounds=30).train_dataloader()
    assert len(loader) == 30
    assert [len(batch) for batch in loader] == [8] * 30


def test_epochs_are_passes_unless_rounds_are_given():
    assert module(rounds=None, epochs=2).total_rounds == 50
    assert module(rounds=None, epochs=2.2).total_rounds == 55
    assert module(rounds=7, epochs=2).total_rounds == 7
    with pytest.raises(DataError, match=r"data\.rounds or data\.epochs"):
        module(rounds=None).train_dataloader()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_resumes_at_the_very_next_batch(streaming, workers):
    settings = {"streaming": streaming, "num_workers": workers, "rounds": 40, "shuffle_buffer": 50}
    everything = ids(module(**settings).train_dataloader())
    loader = module(**settings).train_dataloader()
    batches = iter(loader)
    assert ids(next(batches) for _ in range(27)) == everything[:27]  # 25 rounds are a pass
    state = loader.state_dict()
    del batches
    resumed = module(**settings).train_dataloader()
    resumed.load_state_dict(state)
    batches = iter(resumed)
    assert ids(next(batches) for _ in range(3)) == everything[27:30]
    again = module(**settings).train_dataloader()
    again.load_state_dict(resumed.state_dict())
    assert ids(again) == everything[30:]


class Recorder(LightningModule):
    """Remember the ids of the batches it was trained on, and save itself after batch ``save_at``."""

    def __init__(self, save_at=None, path=None):
        super().__init__()
        self.weight, self.save_at, self.path, self.seen = torch.nn.Parameter(torch.zeros(())), save_at, path, []

    def training_step(self, batch, index):
        self.seen.append(batch.ids_B.tolist())
        return self.weight * batch.tokens

    def on_train_batch_end(self, outputs, batch, index):
        if index + 1 == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_lightning_run_resumes_at_the_very_next_batch(tmp_path, workers):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    quiet |= {"accelerator": "cpu", "enable_model_summary": False, "limit_val_batches": 0}
    whole, rest = Recorder(save_at=7, path=tmp_path / "seven.ckpt"), Recorder()
    Trainer(**quiet).fit(whole, datamodule=module(num_workers=workers))
    Trainer(**quiet).fit(rest, datamodule=module(num_workers=workers), ckpt_path=tmp_path / "seven.ckpt")
    assert len(whole.seen) == 12
    assert rest.seen == whole.seen[7:]


@pytest.mark.parametrize("streaming", [False, True])
def test_two_ranks_together_see_what_one_process_sees(streaming):
    one = ids(module(streaming=streaming).train_dataloader())
    ranks = []
    for rank in (0, 1):
        data = module(streaming=streaming)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        ranks.append(ids(data.train_dataloader()))
    assert [left + right for left, right in zip(*ranks, strict=True)] == one


def test_a_batch_that_does_not_divide_among_ranks_is_refused():
    data = module()
    data.trainer = SimpleNamespace(global_rank=0, world_size=3)
    with pytest.raises(DataError, match=r"batch_size=8 .* 3 processes"):
        data.train_dataloader()


def test_a_stream_yields_its_rounds_and_starts_again():
    loader = module("word_problems", "next_item", streaming=True, rounds=60).train_dataloader()
    seen = ids(loader)
    assert len(loader) == len(seen) == 60
    assert len({row for batch in seen for row in batch}) == 400


def test_weights_reach_the_batches():
    data = module("word_problems", "next_item", weights={"word_problems": 1, "next_item": 4}, rounds=100)
    share = sum(batch.benchmark_B.sum().item() for batch in data.train_dataloader()) / 800
    assert 0.75 < share < 0.85


def test_validation_covers_all_benchmarks_in_order_and_ranks_share_it():
    data = module("word_problems", "next_item", eval_batch_size=16)
    everything = list(chain(*ids(data.val_dataloader())))
    assert len(everything) == len(set(everything)) == 40
    for first in (2, 6, 20):  # training looks at the first batches only
        assert [row % 2 for row in everything[:first]].count(0) == first // 2
    shares = []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares += chain(*ids(data.val_dataloader()))
    assert sorted(shares) == sorted(everything)


def test_evaluation_rows_hold_ids_and_texts():
    row = module().evaluation_rows("test", "word_problems")[0]
    texts = ["answer", "options", "prompt", "seen", "target"]
    assert sorted(row) == sorted([*texts, "benchmark", "id", "length", "source_ids", "target_ids"])
    with pytest.raises(DataError, match="no rows of gsm8k test"):
        module().evaluation_rows("test", "gsm8k")


@pytest.mark.parametrize(("size", "rows"), [(0.25, 10), (4, 4)])
def test_a_missing_validation_split_is_carved_from_train(tmp_path, size, rows):
    data = prepared(local(tmp_path, validation_size=size, rounds=None, epochs=1))
    held = {row["id"] for row in data.evaluation_rows("validation", "mine")}
    seen = {row for batch in ids(data.train_dataloader()) for row in batch}
    assert len(held) == rows
    assert data.train_rows == 40 - rows
    assert not held & seen


def test_a_streams_first_rows_are_its_validation_split(tmp_path):
    data = prepared(local(tmp_path, validation_size=4, streaming=True))
    assert [row["id"] for row in data.evaluation_rows("validation", "mine")] == [0, 1, 2, 3]
    assert {row for batch in ids(data.train_dataloader()) for row in batch} == set(range(4, 40))
    with pytest.raises(DataError, match="give a number"):
        prepared(local(tmp_path, validation_size=0.1, streaming=True))


def test_subsamples_are_seeded(tmp_path):
    limits = {"max_train_rows": 9, "max_eval_rows": 5}
    first, second = (prepared(local(tmp_path, **limits)) for _ in range(2))
    assert (first.train_rows, len(first.evaluation_rows("test", "mine"))) == (9, 5)
    assert (
        first.fingerprint() == second.fingerprint() != prepared(local(tmp_path, **limits, split_seed=1)).fingerprint()
    )


def test_all_problems_are_told_at_once(tmp_path):
    data = local(tmp_path)
    (tmp_path / "train.jsonl").write_text("{oops\n")
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError) as told:
        prepared(data)
    assert "train.jsonl, line 1" in str(told.value)
    assert "test.jsonl does not exist" in str(told.value)


def test_an_unreachable_hub_is_told_once_per_benchmark(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError) as told:
        prepared(TCopilotDataModule({"mine": ExactMatch(name="mine", hub="someone/mine")}, rounds=1))
    assert str(told.value).count("someone/mine") == 1


def test_overlong_rows_are_named_and_counted(tmp_path):
    with pytest.raises(DataError, match=r"(?s)mine, .*train\.jsonl, row 11: the prompt has 8 tokens.*more such"):
        prepared(local(tmp_path, max_source_length=7, validation_size=2))


def test_dropped_rows_are_in_the_summary(tmp_path):
    folder = tmp_path
    data = local(folder, rows=20, splits=("train", "validation", "test"), max_target_length=3, overflow="drop")
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl").write_text('{"prompt": "a", "target": "1"}\n')
    train = prepared(data).summary()["mine/train"]
    assert (train["rows"], train["dropped"], train["target_max"]) == (10, 10, 3)


def test_a_bad_row_stops_and_names_benchmark_file_row_and_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"mine, .*train\.jsonl, row 11: prompt is None, expected a text"):
        prepared(with_bad_rows(tmp_path))


def test_bad_rows_can_be_skipped_counted_and_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = prepared(with_bad_rows(tmp_path, on_error="skip", bad=(2, 3, 4, 5)))
    assert {key: part["skipped"] for key, part in data.summary().items()} == {
        "mine/train": 4,
        "mine/validation": 0,
        "mine/test": 4,
    }
    assert (data.train_rows, len(data.evaluation_rows("test", "mine"))) == (36, 36)
    assert [row["id"] for row in data.evaluation_rows("test", "mine")][:2] == [0, 5]
    assert len(data.skipped["mine"]) == 8
    assert data.skipped["mine"][0] == f"mine, {tmp_path}/train.jsonl, row 2: prompt is None, expected a text"
    assert "mine/train: skipped 4 of 40 rows, such as\nmine, " in caplog.text
    assert "row 4" in caplog.text
    assert "row 5" not in caplog.text


def test_bad_rows_of_a_stream_can_be_skipped(tmp_path, caplog):
    data = prepared(with_bad_rows(tmp_path, on_error="skip", streaming=True))
    with caplog.at_level(logging.WARNING):
        seen = {row for batch in ids(data.train_dataloader()) for row in batch}
    assert seen == set(range(40)) - {10, 12}
    assert "row 11: prompt is None" in caplog.text
    assert "train.jsonl, of this pass over the stream: 2 skipped" in caplog.text


def test_rows_that_a_stream_drops_as_too_long_are_counted(tmp_path, caplog):
    data = prepared(local(tmp_path, streaming=True, overflow="drop", validation_size=4, max_source_length=7))
    with caplog.at_level(logging.WARNING):
        assert {row for batch in ids(data.train_dataloader()) for row in batch} == set(range(4, 10))
    assert "train.jsonl, of this pass over the stream: 30 dropped" in caplog.text


def test_a_split_of_bad_rows_only_is_refused_even_if_they_may_be_skipped(tmp_path):
    with pytest.raises(
        DataError, match=r"train\.jsonl, no row is left: 40 were skipped, the first since row 1: prompt"
    ):
        prepared(with_bad_rows(tmp_path, on_error="skip", bad=range(1, 41)))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("", r"mine: .*test\.jsonl: no rows"), ('{"prompt": "a"}', r"mine: .*test\.jsonl: row 1 has no column 'target'")],
)
def test_files_without_rows_or_columns_are_refused_always(tmp_path, on_error, text, message):
    data = local(tmp_path, on_error=on_error)
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        prepared(data)


@pytest.mark.parametrize("name", ["{}", "my_{}", "{}.jsonl"])
def test_an_evaluation_needs_test_rows_alone(name, tmp_path):
    splits = {split: name.format(split) for split in ("train", "validation", "test")}

    def evaluation_rows():
        data = TCopilotDataModule({"mine": ExactMatch(name="mine", splits=splits)}, path=tmp_path)
        data.prepare(byte_tokenizer(), "left", training=False)
        return data.rows_of("validation"), data.rows_of("test")

    file = tmp_path / f"{splits['test'].removesuffix('.jsonl')}.jsonl"
    file.write_text('{"prompt": "a", "target": "b"}')
    assert [len(rows) for rows in evaluation_rows()] == [0, 1]
    file.with_name(file.name.replace("test", "train")).write_text(file.read_text())
    if name != "{}":  # rows that were trained on would be taken for the missing ones
        with pytest.raises(DataError, match="validation"):
            evaluation_rows()


@pytest.mark.parametrize("rows", [3, 5])
def test_a_stream_of_no_more_rows_than_validation_takes_is_refused(rows, tmp_path):
    data = local(tmp_path, rows=rows, streaming=True, validation_size=5)
    with pytest.raises(DataError, match=rf"data\.validation_size=5 would take 5 of the {rows} train rows"):
        prepared(data)


def test_a_bad_row_of_a_stream_is_refused_when_it_is_read(tmp_path):
    data = prepared(local(tmp_path, splits=("train", "validation", "test"), streaming=True, max_source_length=13))
    assert len(ids(data.train_dataloader())) == 12
    (tmp_path / "train.jsonl").write_text("{oops\n")
    with pytest.raises(DataError, match=r"train\.jsonl, line 1"):
        ids(data.train_dataloader())


def test_the_vocabulary_is_the_union_of_the_tasks_words_and_unknown_for_other_data(tmp_path):
    assert set(module("word_problems", "next_item").vocabulary) >= {"eggs", "i119"}
    assert local(tmp_path).vocabulary is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"other": 1}}, "data.weights names"),
        ({"on_error": "ignore"}, "data.on_error='ignore': use stop or skip"),
        ({"streaming": True, "rounds": None, "epochs": 1}, "give data.rounds"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        module(**settings)


def test_setup_before_prepare_is_refused():
    with pytest.raises(DataError, match="prepare"):
        TCopilotDataModule(tasks("next_item"), rounds=1).setup()


def test_every_one_of_several_benchmarks_needs_rows_to_train_on(tmp_path):
    for name, splits in (("first", ("train", "test")), ("second", ("test",))):
        (tmp_path / name).mkdir()
        for split in splits:
            lines = [json.dumps({"prompt": f"{name} {split} {i}", "target": str(i)}) for i in range(40)]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines))
    benchmarks = {name: ExactMatch(name=name, target=" {target}") for name in ("first", "second")}
    data = TCopilotDataModule(benchmarks, path=tmp_path, batch_size=8, rounds=12)
    with pytest.raises(DataError, match=r"second.*train\.jsonl"):
        data.prepare(byte_tokenizer(), "left")
