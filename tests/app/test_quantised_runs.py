"""Runs with a Pilot in 4 or 8 bits: what is refused, what memory they need, and one from training to evaluation."""

from types import SimpleNamespace

import composed
import pytest
from family_models import tiny_pilot
from hydra.utils import instantiate

from tcopilot.app import build
from tcopilot.app.checks import config as checks
from tcopilot.app.checks import quantised
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.memory import estimate
from tcopilot.app.memory.dry_run import Load, measure
from tcopilot.data.tokenizers import byte_tokenizer
from tcopilot.models.pilot import ModelSource
from tcopilot.models.quantization import is_packed

pytest.importorskip("bitsandbytes")
LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
LLAMA_8B = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_1B = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
LLAMA_1B |= {"tie_word_embeddings": True}
FROZEN_HEAD = "log_storage@mistake_log.log.storage=frozen_head"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny Pilot and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pilot("llama", vocab_size=259, layers=2, max_position_embeddings=2048).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["pilot.quantization=4bit"],
            ["pilot.path=null", "without LoRA", "adapter@pilot.adapter=lora", "pilot.frozen"],
        ),
        (["pilot.quantization=2bit"], ["pilot.quantization=2bit", "4bit, 8bit"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, said):
    message = "\n".join(checks.config_problems(composed.compose_config(*overrides)))
    for part in said:
        assert part in message


def test_a_missing_package_and_a_device_without_kernels_are_refused(monkeypatch):
    cfg = composed.compose_config("pilot=lora", "pilot.path=some/model", "pilot.quantization=8bit", "copilot=lora")
    assert checks.config_problems(cfg) == []  # the CPU has its kernels
    with monkeypatch.context() as patched:
        patched.setattr(quantised, "device_problem", lambda bits, device: f"no kernel for {bits} on {device}")
        (message,) = checks.config_problems(cfg)
    for part in ("pilot.quantization=8bit with trainer.accelerator=cpu", "no kernel for 8bit on cpu", "=null"):
        assert part in message
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda _: None)
    assert any("pip install bitsandbytes" in problem for problem in checks.config_problems(cfg))


@pytest.mark.slow
def test_parameters_are_counted_as_they_are_packed(base, tmp_path):
    given = ["pilot=lora", f"pilot.path={base}", "pilot.quantization=4bit", "copilot=lora", FROZEN_HEAD]
    cfg = composed.compose_config(*composed.SMALL, *given, f"paths.run_dir={tmp_path}")
    ready = build.prepare(cfg)
    needed = estimate.budget(cfg, ready).needed
    module = build.training_module(cfg, build.fused_model(cfg, ready), 1)
    tensors = {t.untyped_storage().data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    for state in (part.weight.quant_state for part in module.modules() if is_packed(part)):
        scales = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        tensors |= {(id(state), number): scale.nbytes for number, scale in enumerate(scales)}
    assert needed.parameters == pytest.approx(sum(tensors.values()), abs=2000)
    assert needed.gradients == sum(p.nbytes for p in module.parameters() if p.requires_grad)


@pytest.mark.slow
def test_llama_8b_with_a_1b_copilot_fits_24_gb_in_4_bits_alone():
    cfg = composed.compose_config("experiment=llama_3_1_8b_qlora", "trainer=cpu")
    peaks = {}
    for bits in ("4bit", None):
        pilot = ModelSource(config=LLAMA_8B, dtype="bfloat16", quantization=bits)
        data = SimpleNamespace(split_seed=0, total_rounds=1)
        ready = build.Prepared(pilot, ModelSource(config=LLAMA_1B), range(LLAMA["vocab_size"]), data, None)
        log = instantiate(cfg.mistake_log.log, _convert_="all")
        load = Load(rows=4, source=256, target=256, parts=4)
        needed = measure(lambda ready=ready: estimate._module(cfg, ready), load, log, "bf16-mixed", True, tied=True)
        peaks[bits] = needed.training
    assert peaks["4bit"] < 24e9 < peaks[None], peaks


@pytest.mark.slow
def test_a_quantised_run_from_training_to_evaluation_and_a_head_for_its_pilot(base, tmp_path):
    given = [*composed.SMALL, "pilot=lora", f"pilot.path={base}", "pilot.quantization=4bit", "copilot=lora"]
    given += [FROZEN_HEAD, "fusion.weight=[0,1]", "evaluation.max_new_tokens=4"]
    whole = composed.train(tmp_path / "whole", *given, estimate=True)
    card = (whole / "export" / "README.md").read_text()
    assert "quantised to 4bit" in card
    again = composed.evaluate(whole, tmp_path / "again", "fusion.weight=[0,1]")
    for weight in (0, 1):
        answers = [composed.predictions(folder, "test", weight) for folder in (whole, again)]
        assert answers[0] == answers[1]

    stop = ["+callbacks.interrupt._target_=composed.InterruptAfter", "+callbacks.interrupt.rounds=2"]
    with pytest.raises(SystemExit):
        composed.train(tmp_path / "parts", *given, *stop)
    parts = composed.resume(tmp_path / "parts")
    assert composed.predictions(parts, "test", 1) == composed.predictions(whole, "test", 1)
    (checkpoint,) = list((parts / "checkpoints").glob("round=4/main.safetensors"))
    assert checkpoint.stat().st_size < 40_000_000

    tuned = f"pilot.path={whole}/export"
    head = [*composed.SMALL, "pilot=frozen", "copilot=head", "copilot.passes=1", "evaluation.max_new_tokens=4", tuned]
    with pytest.raises(ConfigError, match=r"use pilot\.dtype=bfloat16"):
        composed.train(tmp_path / "refused", *head)
    with pytest.raises(ConfigError, match=r"is quantised already"):
        composed.train(tmp_path / "refused", *head, "pilot.dtype=bfloat16", "pilot.quantization=4bit")
    fitted = composed.train(tmp_path / "head", *head, "pilot.dtype=bfloat16")
    assert composed.predictions(fitted, "test", 0) == composed.predictions(whole, "test", 0)
    assert composed.results(fitted)["rows"]
    again = composed.evaluate(fitted, tmp_path / "head_again", "fusion.weight=[0,1]")
    assert composed.predictions(again, "test", 0) == composed.predictions(whole, "test", 0)
