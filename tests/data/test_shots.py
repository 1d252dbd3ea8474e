import json
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing

from tcopilot.data import DataError, ExactMatch, NextItem, TCopilotDataModule, byte_tokenizer, word_tokenizer
from tcopilot.data.prepare import RowPreparer
from tcopilot.data.shots import read_shots, write_shots

READ = byte_tokenizer()


def folder_of(path, name="mine", splits=("train", "validation", "test"), rows=20):
    path.mkdir(exist_ok=True)
    for split in splits:
        lines = [json.dumps({"prompt": f"{name} {split} {i} =", "target": str(i)}) for i in range(rows)]
        (path / f"{split}.jsonl").write_text("\n".join(lines))
    return path


def module(path, *names, training=True, shots_of_run=None, **settings) -> TCopilotDataModule:
    benchmarks = {name: ExactMatch(name=name, target=" {target}") for name in names or ("mine",)}
    data = TCopilotDataModule(benchmarks, path=path, **({"batch_size": 4, "rounds": 5, "shots": 2} | settings))
    data.prepare(READ, "left", training=training, shots=shots_of_run)
    return data


def sources(data, split, name="mine"):
    rows = data._train if split == "train" else data.evaluation_rows(split, name)
    return [READ.decode(row["source_ids"]) for row in rows]


def test_every_prompt_has_the_same_solved_train_rows_before_it_and_they_are_not_trained_on(tmp_path):
    data = module(folder_of(tmp_path))
    shown = [row for _, row in data.shot_rows["mine"]]
    before = "".join(f"{row['prompt']} {row['target']}<eos>\n\n" for row in shown)
    assert before.count("mine train") == 2
    assert sources(data, "test") == [f"{before}mine test {i} =" for i in range(20)]
    assert sources(data, "validation") == [f"{before}mine validation {i} =" for i in range(20)]
    questions = [source.removeprefix(before) for source in sources(data, "train")]
    assert sorted(questions + [row["prompt"] for row in shown]) == sorted(f"mine train {i} =" for i in range(20))


def test_shots_are_the_same_for_all_seeds_and_sizes_and_others_for_another_split_seed(tmp_path):
    folder_of(tmp_path)
    first = module(tmp_path).shot_rows
    assert module(tmp_path, seed=7, max_train_rows=5).shot_rows == first
    assert module(tmp_path, split_seed=1).shot_rows != first
    prints = {module(tmp_path, **given).fingerprint() for given in ({}, {"split_seed": 1}, {"shots": 3}, {"shots": 0})}
    assert len(prints) == 4


def test_they_do_not_change_which_rows_are_carved_and_are_not_among_these(tmp_path):
    folder_of(tmp_path, splits=("train", "test"))
    with_shots, without = module(tmp_path, validation_size=15), module(tmp_path, validation_size=15, shots=0)
    ids = [[row["id"] for row in data.evaluation_rows("validation", "mine")] for data in (with_shots, without)]
    assert ids[0] == ids[1]
    assert not {number for number, _ in with_shots.shot_rows["mine"]} & set(ids[0])


def test_rows_that_ask_what_a_shot_asks_are_not_trained_on(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "train.jsonl").write_text(
        (tmp_path / "train.jsonl").read_text() + "\n" + (tmp_path / "train.jsonl").read_text()
    )
    data = module(tmp_path, shots=3)
    asked = Counter(source.rpartition("\n\n")[2] for source in sources(data, "train"))
    assert sorted(asked.values()) == [2] * 17
    assert len({row["prompt"] for _, row in data.shot_rows["mine"]}) == 3


def test_each_benchmark_of_a_mixture_shows_its_own_rows(tmp_path):
    for name in ("one", "two"):
        folder_of(tmp_path / name, name)
    data = module(tmp_path, "one", "two")
    for name, other in (("one", "two"), ("two", "one")):
        assert all(
            source.count(f"{name} train") == 2 and other not in source for source in sources(data, "test", name)
        )


def test_the_start_stands_once_and_shots_of_a_decoder_end_as_its_answers_do():
    benchmark, tokenizer = ExactMatch(name="mine"), word_tokenizer(["a", "b", "c", "d"])
    frame = TemplateProcessing(single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = frame
    for side, expected in (("left", [0, 3, 4, 1, 5, 6, 1, 3]), ("right", [0, 3, 4, 5, 6, 3, 1])):
        preparer = RowPreparer(tokenizer, side)
        shots = [(0, {"prompt": "a", "target": "b"}), (1, {"prompt": "<pad> c", "target": "d"})]
        preparer.shots, questions = preparer.solved(shots, benchmark, print)
        (row,) = preparer([(2, {"prompt": "a", "target": "d"})], benchmark, 0, 1, True, print)
        assert row["source_ids"] == expected
        assert row["length"] == len(expected) + 2
        assert questions == ["a", "<pad> c"]


@pytest.mark.parametrize(("limit", "left"), [(100, 2), (51, 2), (50, 1), (32, 1), (31, 0), (19, 0)])
def test_a_prompt_that_is_too_long_loses_its_first_shots_and_never_the_question(tmp_path, limit, left):
    folder_of(tmp_path, rows=10)
    data = module(tmp_path, max_source_length=limit)
    (first, last), question = (row for _, row in data.shot_rows["mine"]), "mine test 3 ="
    shown = [first, last][2 - left :]
    expected = "".join(f"{row['prompt']} {row['target']}<eos>\n\n" for row in shown) + question
    assert sources(data, "test")[3] == expected
    lost = 0 if left == 2 else 10
    assert data.summary()["mine/test"]["lost_shots"] == lost
    said = "mine/test: 10 of 10 prompts lost shots; raise data.max_source_length, or lower data.shots"
    assert (said in data.remarks) == bool(lost)


def test_a_question_that_is_too_long_by_itself_is_cut_as_it_would_be_without_shots(tmp_path):
    folder_of(tmp_path)
    cut = [sources(module(tmp_path, shots=n, max_source_length=9, overflow="truncate"), "test") for n in (0, 2)]
    assert cut[0] == cut[1]


def test_a_stream_gives_its_first_rows(tmp_path):
    data = module(folder_of(tmp_path), streaming=True)
    assert [number for number, _ in data.shot_rows["mine"]] == [0, 1]
    assert {row["id"] for row in data._train} == set(range(2, 20))
    assert all(
        source.startswith("mine train 0 = 0<eos>\n\nmine train 1 = 1<eos>\n\nmine train")
        for source in sources(data, "train")
    )


def test_stored_shots_keep_how_numbers_are_written(tmp_path):
    (folder_of(tmp_path) / "train.jsonl").write_text('{"prompt": "a", "target": 1.50}\n{"prompt": 2e1, "target": 0}')
    trained = module(tmp_path, shots=1, validation_size=1)
    write_shots(trained.shot_rows, tmp_path / "shots.json")
    known = read_shots(tmp_path / "shots.json")
    assert known == trained.shot_rows
    assert sources(module(tmp_path, shots=1, shots_of_run=known), "test") == sources(trained, "test")


def test_an_evaluation_without_train_rows_takes_those_of_the_run(tmp_path):
    trained = module(folder_of(tmp_path / "all"))
    alone = folder_of(tmp_path / "test_only", splits=("test",))
    write_shots(trained.shot_rows, tmp_path / "shots.json")
    data = module(alone, training=False, shots_of_run=read_shots(tmp_path / "shots.json"))
    assert sources(data, "test") == sources(trained, "test")
    assert read_shots(tmp_path / "none.json") == {}
    with pytest.raises(
        DataError, match=r"mine: data\.shots=2 are drawn from train rows, but there are none; use data\.shots=0"
    ):
        module(alone, training=False)


def test_too_few_rows_and_rows_that_cannot_be_shots_are_told(tmp_path):
    folder_of(tmp_path, rows=3)
    with pytest.raises(DataError, match=r"data\.shots=3 needs 4 train rows with different questions, and there are 3"):
        module(tmp_path, shots=3)
    (tmp_path / "train.jsonl").write_text('{"prompt": null, "target": "b"}\n{"prompt": "a", "target": "b"}\n' * 3)
    with pytest.raises(DataError, match=r"row 1: prompt is None.*this row was drawn as a shot"):
        module(tmp_path, streaming=True, shots=1)


def test_a_recommendation_shows_other_steps_and_their_items(tmp_path):
    lines = [
        json.dumps({"user": user, "items": [user, user + 1, user + 2, user + 3, user + 4]}) for user in range(1, 9)
    ]
    (tmp_path / "interactions.jsonl").write_text("\n".join(lines))
    data = TCopilotDataModule(
        {"next": NextItem(name="next", title="Book")}, path=tmp_path, batch_size=4, rounds=5, shots=2
    )
    data.prepare(READ, "left")
    source = sources(data, "test", "next")[0]
    assert source.count("So far Book user_") == 3
    assert source.count("this user next? Book item_") == 2


def test_batches_of_validation_hold_rows_of_one_benchmark_which_read_its_shots_once(tmp_path):
    for name, rows in (("one", 20), ("two", 8)):
        folder_of(tmp_path / name, name, rows=rows)
    data = module(tmp_path, "one", "two", eval_batch_size=4)
    batches = list(data.val_dataloader())
    assert [set(batch.benchmark_B.tolist()) for batch in batches] == [{0}, {1}, {0}, {0}, {0}, {1}, {0}]
    shared = [len(READ.encode("".join(f"{row['prompt']} {row['target']}<eos>\n\n" for _, row in data.shot_rows[name])))
              for name in ("one", "two")]  # fmt: skip
    assert all(batch.prefix >= shared[batch.benchmark_B[0]] > 0 for batch in batches)
    everything = sorted(id for batch in batches for id in batch.ids_B.tolist())
    assert len(set(everything)) == len(everything) == 28
    of_ranks = []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        of_ranks.append([batch.ids_B.tolist() for batch in data.val_dataloader()])
    assert len(of_ranks[0]) == len(of_ranks[1])
    assert sorted(chain(*chain(*of_ranks))) == everything
