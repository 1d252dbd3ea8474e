import json
import pickle
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from tcopilot.data import DataError, TCopilotDataModule, byte_tokenizer, word_tokenizer
from tcopilot.data.files import Part
from tcopilot.data.next_item import INDICES, NextItem, text_names
from tcopilot.data.sources import open_split

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"
SIZES = {"beauty": (22_363, 12_101, 198_502), "lastfm": (1_090, 3_646, 52_551)}
USERS = [
    {"user": 1, "items": [4, 2, 5, 1, 3]},
    {"user": "ann", "items": [2, 6, 4, 5]},
    {"user": 3, "items": [1, 6, 2]},
]
KINDS = list(INDICES)


def made(**options) -> NextItem:
    return NextItem(**{"name": "shop", "title": "Shop", "cutoffs": [1, 2], "metric": "ndcg@2", **options})


def write(folder: Path, rows: list) -> Path:
    (folder / "interactions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def names(benchmark: NextItem, rows: list) -> list[str]:
    benchmark.derive("train", rows)
    return [text.strip() for text in benchmark.catalogue]


# Rows -----------------------------------------------------------------------------------------------------------


def test_the_last_item_is_test_the_one_before_it_validation_and_the_rest_train():
    benchmark = made()
    assert benchmark.derive("test", USERS) == [
        {"user": 1, "history": [4, 2, 5, 1], "item": 3},
        {"user": "ann", "history": [2, 6, 4], "item": 5},
        {"user": 3, "history": [1, 6], "item": 2},
    ]
    assert benchmark.derive("validation", USERS) == [
        {"user": 1, "history": [4, 2, 5], "item": 1},
        {"user": "ann", "history": [2, 6], "item": 4},
        {"user": 3, "history": [1], "item": 6},
    ]
    assert benchmark.derive("train", USERS) == [
        {"user": 1, "history": [4], "item": 2},
        {"user": 1, "history": [4, 2], "item": 5},
        {"user": "ann", "history": [2], "item": 6},
    ]


def test_no_held_out_item_is_a_training_target_or_in_a_training_history():
    for row in made().derive("train", USERS):
        items = next(user["items"] for user in USERS if user["user"] == row["user"])
        assert not {*row["history"], row["item"]} & set(items[-2:])


def test_prompt_target_answer_and_seen_items():
    benchmark = made(index="sequential", history=2)
    row = benchmark.derive("test", USERS)[0]
    example = benchmark.render(row)
    # Training parts are 4 2 5, 2 6 and 1, so the names of items 1 to 6 are these.
    assert names(benchmark, USERS) == [f"Shop item_{number}" for number in (5, 2, 6, 1, 3, 4)]
    assert "Shop user_1 " in example.prompt
    assert ": item_3, item_5." in example.prompt  # the last two of 4 2 5 1
    assert example.target == " Shop item_6" == benchmark.catalogue[row["item"] - 1]
    assert example.answer == "Shop item_6"
    assert example.seen == (3, 1, 4, 0)  # the whole history
    assert benchmark.correct(" Shop  item_6\n", example.answer)
    assert not benchmark.correct(" Shop item_66", example.answer)


def test_all_splits_come_from_one_file(tmp_path):
    benchmark = made()
    for split in ("train", "validation", "test"):
        assert list(open_split(benchmark, split, write(tmp_path, USERS))) == benchmark.derive(split, USERS)


def test_the_data_module_prepares_it(tmp_path):
    module = TCopilotDataModule({"shop": made()}, path=write(tmp_path, USERS), batch_size=2, rounds=1)
    module.prepare(byte_tokenizer(), "left")
    assert [module.summary()[f"shop/{split}"]["rows"] for split in ("train", "validation", "test")] == [3, 3, 3]
    gold = module.evaluation_rows("test", "shop")[0]
    assert module.benchmarks["shop"].catalogue.index(gold["target"]) == 3 - 1
    assert gold["seen"] == (3, 1, 4, 0)
    assert len(next(iter(module.train_dataloader()))) == 2


def test_an_end_token_that_the_target_spells_out_is_not_a_part_of_items(tmp_path):
    data = TCopilotDataModule({"shop": made(target=" {title} {item} <eos> ")}, path=write(tmp_path, USERS))
    tokenizer = word_tokenizer(["Shop", *(f"item_{number}" for number in range(1, 7))])
    data.prepare(tokenizer, "left")
    catalogue, rows = data.benchmarks["shop"].catalogue, data.evaluation_rows("test", "shop")
    assert all(row["target"] in catalogue for row in rows)
    assert [row["target_ids"] for row in rows] == [[*tokenizer(row["answer"]).input_ids, 1] for row in rows]


def test_a_benchmark_with_rows_survives_pickling():
    benchmark = made()
    rows = benchmark.derive("test", USERS)
    assert pickle.loads(pickle.dumps(benchmark)).render(rows[0]) == benchmark.render(rows[0])


# Names of items -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", KINDS)
def test_every_item_has_a_name_of_its_own(index):
    found = names(made(index=index, items=9), USERS)
    assert len(set(found)) == 9
    assert found == names(made(index=index, items=9), USERS)


def test_random_names_depend_on_the_seed_alone():
    assert names(made(), USERS) == names(made(), USERS[::-1])
    assert names(made(items=50), USERS) != names(made(items=50, seed=1), USERS)
    assert sorted(names(made(items=50), USERS)) == sorted(f"Shop item_{number}" for number in range(1, 51))


def grouped(held_out: int = 0) -> list[dict]:
    """Users of two tastes, items 1 to 40 and 41 to 80, none of whose training parts has items of both."""
    rows = []
    for user in range(60):
        first = 40 * (user % 2)
        items = [first + (7 * user + 3 * step) % 40 + 1 for step in range(8)]
        rows.append({"user": user, "items": [*items, 81 + (user + held_out) % 10, 91 + (user + held_out) % 10]})
    return rows


@pytest.mark.parametrize("index", KINDS)
def test_held_out_items_do_not_move_names(index):
    before, after = (names(made(index=index, items=100), grouped(held_out)) for held_out in (0, 3))
    assert grouped(0) != grouped(3)
    assert before == after


def test_items_of_held_out_places_alone_come_last_in_sequential_names():
    assert names(made(index="sequential"), grouped())[80:] == [f"Shop item_{number}" for number in range(81, 101)]


def test_collaborative_names_keep_tastes_apart():
    found = names(made(index="collaborative", items=100), grouped())  # paths of three numbers from 1 to 5
    paths = [tuple(map(int, name.removeprefix("Shop item_").split("_"))) for name in found]
    assert max(map(max, paths)) <= 5
    assert paths[80:] == sorted(paths)[80:]  # those without a training part, in the file's numbering
    tastes = [sorted(paths[:40]), sorted(paths[40:80])]
    assert tastes[0] + tastes[1] == sorted(paths[:80]) or tastes[1] + tastes[0] == sorted(paths[:80])


def test_names_follow_other_interactions():
    benchmark = made(index="sequential")
    first = names(benchmark, USERS)
    assert names(benchmark, USERS[::-1]) != first
    assert names(benchmark, USERS) == first


TEXTS = [{"item": 3, "text": " clay  mask"}, {"item": 1, "text": "rose oil"}, {"item": 5, "text": "rose oil"}]


def with_texts(folder: Path, texts: list = TEXTS) -> Path:
    (folder / "item_text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return write(folder, USERS)


def test_items_are_written_by_their_texts(tmp_path):
    benchmark = made(index="text", target=" {item}")
    example = benchmark.render(next(iter(open_split(benchmark, "test", with_texts(tmp_path)))))
    texts = ["rose oil", "item_2", "clay mask", "item_4", "rose oil (5)", "item_6"]
    assert benchmark.catalogue == [f" {text}" for text in texts]
    assert ": item_4, item_2, rose oil (5), rose oil." in example.prompt
    assert example.target == " clay mask"


def test_texts_are_found_beside_a_part_of_the_file_and_in_other_formats(tmp_path):
    (tmp_path / "item_text.csv").write_text("item,text\n1,rose oil\n")
    benchmark = made(index="text", splits=dict.fromkeys(("train", "validation", "test"), "interactions.jsonl[:2]"))
    assert len(list(open_split(benchmark, "test", write(tmp_path, USERS)))) == 2
    assert benchmark.catalogue[0] == " Shop rose oil"


def test_a_text_that_looks_like_a_numbered_one_keeps_items_apart():
    assert text_names({1: "oil", 2: "oil (3)", 3: "oil"}, 3) == ["oil", "oil (3)", "oil (3) (3)"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([{"item": "x", "text": "oil"}], r"row 1: item is 'x'; give each item's number once"),
        ([*TEXTS, {"item": 3, "text": "oil"}], r"row 4: item is '3'; give each item's number once"),
        ([{"item": 1}], "row 1: no 'text' in the row: found item"),
    ],
)
def test_unusable_texts_are_named(texts, message, tmp_path):
    with pytest.raises(DataError, match=rf"item_text\.jsonl, {message}"):
        open_split(made(index="text"), "train", with_texts(tmp_path, texts))


def test_missing_texts_are_named(tmp_path):
    with pytest.raises(DataError, match=r"shop\.index=text: expected one file .*item_text\.jsonl .*interactions"):
        open_split(made(index="text"), "train", write(tmp_path, USERS))
    for rows in (USERS, Part(USERS, "[:2]")):  # as from the Hub
        with pytest.raises(DataError, match=r"shop\.index=text: .*give data\.path"):
            made(index="text").derive("train", rows)


# Metrics --------------------------------------------------------------------------------------------------------


def test_the_figure_that_chooses_comes_first():
    benchmark = NextItem(name="shop", title="Shop")
    hits, gains = ([f"{kind}@{k}" for k in (5, 10, 20, 100)] for kind in ("hit", "ndcg"))
    names = [metric.name for metric in benchmark.metrics]
    assert names[0] == "ndcg@10"
    assert sorted(names) == sorted(hits + gains)


def test_a_rank_is_scored_at_every_cutoff():
    benchmark = made()
    assert benchmark.judge(benchmark.read_ranking(1)) == {metric.name: 1.0 for metric in benchmark.metrics}
    assert benchmark.judge(benchmark.read_ranking(2)) == {
        "ndcg@2": pytest.approx(0.63093, abs=1e-5), "hit@1": 0.0, "hit@2": 1.0, "ndcg@1": 0.0,
    }  # fmt: skip
    assert (
        set(benchmark.judge(benchmark.read_ranking(0)).values())
        == {0.0}
        == set(benchmark.judge(benchmark.read_ranking(None)).values())
    )
    assert benchmark.score("Shop item_2", "Shop item_2") == benchmark.judge(benchmark.read_ranking(1))
    assert benchmark.score("Shop item_3", "Shop item_2") == benchmark.judge(benchmark.read_ranking(0))


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"user": 9, "items": [1, 2]}, "user 9 has 2 items; leave-one-out needs at least 3"),
        ({"user": 9, "items": [1, 2, 7]}, r"items holds 7, and data\.benchmarks\.shop\.items is 6"),
        ({"user": 9, "items": [1, 0, 2]}, "items holds 0; expected whole numbers from 1"),
        ({"user": 9, "items": [1, "2", 3]}, "items holds '2'"),
        ({"user": 9, "items": [1, 2.0, 3]}, r"items holds 2\.0"),
        ({"user": 9, "items": [1, True, 3]}, "items holds True"),
        ({"user": 9, "items": "1 2 3"}, "items is '1 2 3'; expected a list"),
        ({"user": 9, "items": [1, 2, 1]}, "item 1 twice"),
        ({"user": 3, "items": [1, 2, 3]}, "user 3 already has row 3"),
        ({"user": [9], "items": [1, 2, 3]}, r"user is \[9\]; expected a number or a text"),
        ({"user": 9, "item": [1, 2, 3]}, "no column 'items'; it has 'user', 'item'"),
    ],
)
def test_an_unusable_row_is_named(row, message, tmp_path):
    with pytest.raises(DataError, match=rf"^shop: .*interactions\.jsonl, row 4: .*{message}"):
        open_split(made(items=6), "train", write(tmp_path, [*USERS, row]))


def test_many_unusable_rows_are_counted(tmp_path):
    bad = [{"user": number, "items": [1]} for number in range(10, 17)]
    with pytest.raises(DataError, match=r"(?s)row 4: .*row 5: .*row 6: .*and 4 more such problems"):
        open_split(made(), "train", write(tmp_path, [*USERS, *bad]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "magic"}, r"data\.benchmarks\.shop\.index='magic': use one of random"),
        ({"history": 0}, r"shop\.history is 0"),
        ({"cutoffs": []}, r"shop\.cutoffs is \[\]"),
        ({"cutoffs": [10, 5]}, r"shop\.cutoffs is \[10, 5\]"),
        (
            {"cutoffs": [5, 20]},
            r"shop\.metric is 'ndcg@2'; with these cutoffs choose one of hit@5, hit@20, ndcg@5, ndcg@20",
        ),
        ({"target": " {title}"}, r"shop\.target is ' \{title\}'; it must use \{item\}"),
        ({"target": " {user} {item}"}, r"shop\.target"),
    ],
)
def test_unusable_settings_are_named(options, message):
    with pytest.raises(DataError, match=message):
        made(**options)


def test_without_a_path_the_file_to_give_is_named():
    module = TCopilotDataModule({"shop": made()}, rounds=1)
    with pytest.raises(DataError, match=r"data\.path=<folder> that holds interactions\.jsonl") as error:
        module.prepare(byte_tokenizer(), "left")
    assert len(str(error.value).splitlines()) == 1


# Configs and real files -----------------------------------------------------------------------------------------


def from_config(name: str, **options) -> NextItem:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [f"data={name}"])
    return instantiate(cfg.data.benchmarks[name], **options)


@pytest.mark.parametrize("name", SIZES)
def test_the_configs_make_benchmarks(name):
    benchmark = from_config(name)
    assert benchmark.items == SIZES[name][1]
    assert benchmark.metrics[0].name == "ndcg@10"
    assert set(benchmark.splits) == {"train", "validation", "test"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not here")
def test_real_files_have_the_published_counts(name):
    users, items, interactions = SIZES[name]
    benchmark = from_config(name)
    rows = {split: list(open_split(benchmark, split, REAL)) for split in ("train", "validation", "test")}
    assert len(rows["test"]) == len(rows["validation"]) == users
    assert sum(len(row["history"]) + 1 for row in rows["test"]) == interactions
    assert len({item for row in rows["test"] for item in [*row["history"], row["item"]]}) == items
    assert len(rows["train"]) == interactions - 3 * users
    assert len(set(benchmark.catalogue)) == len(benchmark.catalogue) == items
    example = benchmark.render(rows["test"][-1])
    assert benchmark.catalogue.index(example.target) == rows["test"][-1]["item"] - 1
    assert len(example.seen) == len(rows["test"][-1]["history"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "index"),
    [
        *(pytest.param("beauty", index, marks=pytest.mark.slow) for index in KINDS),
        *(("lastfm", index) for index in KINDS),
        ("beauty", "text"),
    ],
)
@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not here")
def test_real_items_have_names_of_their_own(name, index):
    benchmark = from_config(name, index=index)
    open_split(benchmark, "test", REAL)
    assert len(set(benchmark.catalogue)) == SIZES[name][1]
