"""The estimate of memory before weights load: near what a run takes, and said in time."""

import logging
from types import SimpleNamespace

import composed
import pytest
import torch
from processes import run_in_processes
from small_training import random_batch, small_module, tiny_model, tiny_pilot, trainer_for
from torch.utils.data import DataLoader

from tcopilot.app import build
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.memory import estimate as memory_check
from tcopilot.app.memory import free as free_memory
from tcopilot.app.memory.dry_run import Footprint, Load, measure
from tcopilot.app.memory.estimate import Budget, budget
from tcopilot.app.memory.live_memory import LiveMemory
from tcopilot.data import byte_tokenizer
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.storage import LikelyTokensStorage
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.models.modeling import TCopilotForCausalLM
from tcopilot.processes import rank
from tcopilot.training.objectives import CrossEntropy

SLOW = pytest.mark.slow
ROWS, TARGET, VOCAB = 8, 5, 200
LORA = ["pilot=tiny_llama", "adapter@pilot.adapter=lora", "log_storage@mistake_log.log.storage=frozen_head"]
GB = 10**9


def prepared(tmp_path, *overrides):
    cfg = composed.compose_config(*composed.SMALL, *overrides, f"paths.run_dir={tmp_path}")
    return cfg, build.prepare(cfg)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "joint"),
    [("llama", True), *(pytest.param(*case, marks=SLOW) for case in (("t5", False), ("t5", True), ("llama", False)))],
)
def test_the_estimate_of_training_is_within_a_fifth_of_what_live_tensors_take(family, joint):
    def module():
        return small_module(tiny_model(family, joint, vocab=VOCAB, width=32), 3, copilot_batch_size=ROWS)

    log = MistakeLog()
    batches = [random_batch(family, ROWS, seed, [TARGET] * ROWS, vocab=VOCAB) for seed in range(3)]
    with LiveMemory() as memory:
        trainer_for(log=log).fit(module(), DataLoader(batches, batch_size=None))
    source = max(batch.source_ids_BM.shape[1] for batch in batches)
    needed = measure(module, Load(ROWS, source, TARGET), log if joint else None)
    assert needed.training + (log.nbytes if joint else 0) == pytest.approx(memory.peak, rel=0.2)


@SLOW
@pytest.mark.parametrize("vocab", [VOCAB, 20_000])
def test_the_estimate_for_a_head_that_compares_few_tokens_is_within_a_fifth(vocab):
    def module():
        pilot = tiny_pilot("llama", vocab=vocab, width=32)
        pilot.get_output_embeddings().requires_grad_(False)
        model = TCopilotForCausalLM.from_pilot(pilot, HeadCopilot.from_pilot(pilot, depths=[0.5, 1.0], hidden=64))
        return small_module(model, 3, copilot_batch_size=ROWS, objective=CrossEntropy())

    log = MistakeLog(storage=LikelyTokensStorage())
    batches = [random_batch("llama", ROWS, seed, [TARGET] * ROWS, vocab=vocab) for seed in range(3)]
    with LiveMemory() as memory:
        trainer_for(log=log).fit(module(), DataLoader(batches, batch_size=None))
    source = max(batch.source_ids_BM.shape[1] for batch in batches)
    needed = measure(module, Load(ROWS, source, TARGET), MistakeLog(storage=LikelyTokensStorage()))
    assert needed.training + log.nbytes == pytest.approx(memory.peak, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "beams"),
    [("llama", 4), *(pytest.param(*case, marks=SLOW) for case in (("llama", 1), ("t5", 1), ("t5", 4)))],
)
def test_the_estimate_of_decoding_is_within_a_fifth_of_what_live_tensors_take(family, beams):
    def module():
        return small_module(tiny_model(family, vocab=VOCAB, width=32), 1, copilot_batch_size=ROWS)

    model = module().model.eval()
    memory = LiveMemory()
    for parameter in model.parameters():
        memory.count(parameter)
    ids = torch.randint(3, VOCAB, (ROWS, 20))
    with memory, torch.no_grad():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False, max_new_tokens=6,
            min_new_tokens=6, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
    needed = measure(module, Load(ROWS, 20, 6, prompts=ROWS, copies=beams, answer=6), MistakeLog())
    assert needed.decoding == pytest.approx(memory.peak, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["copilot=half", "trainer.precision=bf16-mixed"],
        pytest.param([], marks=SLOW),
        pytest.param(["copilot=none"], marks=SLOW),
        pytest.param(["pilot.frozen=true", "pilot.path=<saved>"], marks=SLOW),
        pytest.param([*LORA, "pilot.dtype=bfloat16", "adapter@copilot.adapter=lora", "copilot.head=soft"], marks=SLOW),
    ],
)
def test_parameters_are_counted_as_they_load_and_as_they_are_trained(overrides, tmp_path):
    if "pilot.path=<saved>" in overrides:
        saved = tiny_pilot("t5", vocab=300)
        saved.save_pretrained(tmp_path / "pilot")
        byte_tokenizer().save_pretrained(tmp_path / "pilot")
        overrides = ["pilot.frozen=true", f"pilot.path={tmp_path}/pilot"]
    cfg, ready = prepared(tmp_path, "trainer.limit_val_batches=0", *overrides)
    needed = budget(cfg, ready).needed
    module = build.training_module(cfg, build.fused_model(cfg, ready), 1)
    tensors = {t.untyped_storage().data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert needed.parameters == pytest.approx(sum(tensors.values()), abs=2000)
    assert needed.gradients == trained
    assert needed.optimizer == pytest.approx(2 * trained, abs=2000)  # AdamW: two moments, and a count of steps


@SLOW
def test_micro_batches_and_checkpointing_take_less_and_beams_take_more(tmp_path):
    def needed(*overrides):
        return budget(*prepared(tmp_path, "trainer.limit_val_batches=0", "data.batch_size=32", *overrides)).needed

    whole = needed()
    assert needed("pilot.micro_batch_size=4", "copilot.batch_size=4").training < whole.training
    assert needed("pilot.gradient_checkpointing=true").training < whole.training
    caches = [found.decoding - found.parameters for found in (whole, needed("evaluation=beam4"))]
    assert caches[1] > 2 * caches[0]


@pytest.mark.slow
def test_estimating_changes_no_random_number(tmp_path):
    cfg, ready = prepared(tmp_path)
    state = torch.get_rng_state()
    assert budget(cfg, ready) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert len(ready.log) == 0


@pytest.mark.parametrize(
    ("parts", "log", "largest", "mend"),
    [
        ((9, 1, 1), 1, "parameters", "choose a smaller pilot"),
        ((2, 2, 8), 1, "optimiser", "adapter@pilot.adapter=lora"),
        ((1, 1, 1), 9, "log", "mistake_log.log.max_bytes"),
    ],
)
def test_what_cannot_fit_is_refused_with_its_largest_part(parts, log, largest, mend):
    needed = Footprint(*(part * GB for part in parts), training=5 * GB, decoding=GB)
    with pytest.raises(ConfigError) as refused:
        Budget(needed, log * GB, 10 * GB, "CPU").check()
    for said in ("10.0 GB are free on the CPU", f"the largest part is {largest}", mend):
        assert said in str(refused.value)


def test_the_log_is_no_burden_to_a_gpu():
    Budget(Footprint(GB, GB, GB, 4 * GB, GB), 50 * GB, 10 * GB, "GPU").check()


@pytest.mark.parametrize(
    ("training", "decoding", "mend"), [(20, 1, "pilot.micro_batch_size"), (4, 20, "evaluation.batch_size")]
)
def test_what_may_not_fit_is_said_and_not_refused(training, decoding, mend, caplog):
    needed = Footprint(GB, GB, GB, training * GB, decoding * GB)
    with caplog.at_level(logging.WARNING):
        Budget(needed, 0, 10 * GB, "CPU").check()
    assert "may need 20.0 GB and 10.0 GB are free" in caplog.text
    assert mend in caplog.text


@SLOW
def test_of_a_divided_pilot_each_process_holds_its_part():
    def module():
        return small_module(tiny_model("t5", vocab=VOCAB, width=32), 1, copilot_batch_size=ROWS)

    one, two = (measure(module, Load(ROWS, 20, TARGET), MistakeLog(), shards=shards) for shards in (1, 2))
    half = sum(weight.nbytes for weight in module().model.pilot.parameters()) / 2
    assert one.parameters - two.parameters == one.gradients - two.gradients == pytest.approx(half, abs=1)
    assert one.optimizer - two.optimizer == pytest.approx(2 * half, rel=1e-2)  # AdamW's moments
    assert one.training - two.training == pytest.approx(3 * half, rel=1e-2)
    assert one.decoding == two.decoding


@pytest.mark.slow
def test_a_run_that_cannot_fit_stops_before_weights_load(tmp_path, monkeypatch):
    free = 3_000_000  # enough for the log and for the parameters, but not for all
    monkeypatch.setattr(free_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(build.ModelSource, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="the largest part is"):
        composed.train(tmp_path / "run", *composed.SMALL, "trainer.limit_val_batches=0", estimate=True)


def test_parts_that_need_real_numbers_do_not_keep_a_run_from_starting(tmp_path, monkeypatch, caplog):
    cfg, ready = prepared(tmp_path)
    monkeypatch.setattr(memory_check, "measure", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel")))
    with caplog.at_level(logging.WARNING):
        assert budget(cfg, ready) is None
    assert "memory is not estimated: RuntimeError: no kernel" in caplog.text


def budget_job(folder):
    cfg = composed.compose_config(*composed.SMALL, "trainer=two_ranks", f"paths.run_dir={folder}/run")
    found = budget(cfg, build.prepare(cfg))
    (folder / f"{rank()}.txt").write_text(str(found))


@SLOW
def test_processes_that_have_joined_estimate_alike(tmp_path):
    run_in_processes(budget_job, tmp_path)
    first, second = ((tmp_path / f"{number}.txt").read_text() for number in (0, 1))
    assert "parameters" in first
    assert first == second
