"""Fused models in lm-evaluation-harness: its own `hf` model is the measure at λ = 0, the model itself at λ > 0."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from small_training import tiny_model, tiny_pilot

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import BartConfig, BartForConditionalGeneration

from tcopilot.data.tokenizers import byte_tokenizer
from tcopilot.evaluation.lm_eval import TCopilotLM, main
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.modeling import TCopilotForSeq2SeqLM

FAMILIES = ("llama", "t5")
TEXTS = [
    ("two and two", " four"),
    ("two and two", " five"),
    ("two and two", " fivh"),  # shares all but its last token with the one before
    ("two and", " two four"),  # the text of the first, with another target
    ("", "no context"),
    ("a much longer question than all the others, to be padded to", "!"),
    ("short ", "and its space belongs to the continuation"),
]
TASKS = {
    "choice": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"
        metric_list: [{metric: acc}]
        """,
    "writing": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[answer]}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: exact_match}]
        """,
}
QUESTIONS = [
    {"question": "two and two is", "choices": [" four", " five", " a five"], "answer": 0},
    {"question": "the colour of the sky, on a clear day, is", "choices": [" b", " r"], "answer": 0},
    {"question": "up", "choices": [" or down", " and away"], "answer": 1},
    {"question": "one, two,", "choices": [" three", " four", " five"], "answer": 0},
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Folders of a fused model and of its Pilot alone, by family."""
    folders = {}
    for family in FAMILIES:
        fused, pilot = (tmp_path_factory.mktemp(f"{family}_{name}") for name in ("fused", "pilot"))
        model = build(family)
        model.save_pretrained(fused)
        model.pilot.save_pretrained(pilot)
        for folder in (fused, pilot):
            byte_tokenizer().save_pretrained(folder)
        folders[family] = str(fused), str(pilot)
    return folders


def build(family, **options):
    vocab = len(byte_tokenizer())
    options = {"layers": 2, "weight": 1.0} | options
    pilot = tiny_pilot(family, vocab=vocab, layers=2)
    pilot.generation_config.update(pad_token_id=0, eos_token_id=1)
    return tiny_model(family, head_std=3.0, pilot=pilot, **options).eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the two local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in TASKS.items():
        lines = "\n".join(line.strip() for line in text.strip().splitlines())
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}\n{lines}\n")
    return str(folder)


def evaluate(tasks, kind, arguments):
    """Every log-likelihood and every generated text of both tasks."""
    manager = TaskManager(include_path=tasks, include_defaults=False)
    results = simple_evaluate(
        model=kind, model_args=f"{arguments},device=cpu", tasks=list(TASKS), task_manager=manager, batch_size=3,
        bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    by_document = [sorted(results["samples"][name], key=lambda sample: sample["doc_id"]) for name in TASKS]
    scored, written = ([sample["resps"] for sample in samples] for samples in by_document)
    pairs = [response[0] for responses in scored for response in responses]
    return [float(pair[0]) for pair in pairs], [str(pair[1]) for pair in pairs], [texts[0][0] for texts in written]


def requests(kind, arguments):
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def score(lm, texts=TEXTS):
    return lm.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True)


def by_hand(lm, context, continuation):
    """Log-likelihood and greediness from the model, one text at a time without padding."""
    context, continuation = lm._encode_pair(context, continuation) if context else ([2], lm.tok_encode(continuation))
    context, targets = torch.tensor([context]), torch.tensor([continuation])
    with torch.no_grad():
        if lm.backend == "seq2seq":
            log_probs = lm.model(input_ids=context, labels=targets).logits
        else:
            text, start = torch.cat([context, targets], dim=1), context.shape[1]
            log_probs = lm.model(input_ids=text, target_start=start).logits[:, start - 1 : -1]
    log_probs = log_probs.log_softmax(-1)
    return log_probs.gather(2, targets[..., None]).sum().item(), torch.equal(log_probs.argmax(-1), targets)


def assert_same(found, expected, relative=1e-6):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    totals = [torch.tensor([total for total, _ in scores], dtype=torch.float64) for scores in (found, expected)]
    torch.testing.assert_close(*totals, atol=1e-4, rtol=relative)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_weight_zero_is_the_harness_own_model_on_the_pilot_and_weight_one_is_not(exports, tasks, family):
    fused, pilot = exports[family]
    scores, greedy, texts = evaluate(tasks, "hf", f"pretrained={pilot}")
    zero_scores, zero_greedy, zero_texts = evaluate(tasks, "tcopilot", f"pretrained={fused},weight=0")
    assert zero_scores == pytest.approx(scores, abs=1e-4)
    assert (zero_greedy, zero_texts) == (greedy, texts)
    assert any(texts)
    one_scores, _, one_texts = evaluate(tasks, "tcopilot", f"pretrained={fused},weight=1")
    assert all(abs(one - zero) > 1e-2 for one, zero in zip(one_scores, scores, strict=True))
    assert one_texts != texts


@pytest.mark.slow
@pytest.mark.parametrize("feedback", ["observed", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_the_models_own_at_any_batch_size(exports, family, feedback):
    fused = exports[family][0]
    lms = [TCopilotLM(fused, weight=0.7, feedback=feedback, device="cpu", batch_size=size) for size in (1, 8)]
    assert all((lm.model.weight, lm.model.config.feedback) == (0.7, feedback) for lm in lms)
    expected = [by_hand(lms[0], *text) for text in TEXTS]
    for lm in lms:
        assert_same(
            score(lm), expected, relative=1e-5 if feedback == "own" else 1e-6
        )  # own feedback amplifies rounding


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_padding_does_not_move_a_prompt(exports, weight):
    lm = TCopilotLM(exports["llama"][0], weight=weight, device="cpu", batch_size=2)
    seen = {}
    lm.model.pilot.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    score(lm, [("four", "five"), ("fourteen", "one")])
    assert seen["attention_mask"][:, 0].tolist() == [1, 0]
    assert seen["position_ids"].tolist() == [[*range(10), 9], [0] * 4 + [*range(7)]]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_said_of_what_the_fused_model_writes(exports, family):
    fused = exports[family][0]
    lm = TCopilotLM(fused, device="cpu", batch_size=4)
    prompt = torch.tensor([lm.tok_encode("up and")])
    written = lm.model.generate(prompt, max_new_tokens=4, do_sample=False)[0].tolist()
    written = written[1:] if family == "t5" else written[prompt.shape[1] :]
    context = prompt[0].tolist()
    other = [*written[:-1], (written[-1] + 1) % 200 + 3]
    given = [(None, context, written), (None, context, other), (None, context, other[-1:])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(given, disable_tqdm=True)] == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_does_not_depend_on_the_batch(exports, family):
    contexts = [text for text, _ in TEXTS if text]
    settings = {"until": ["\n"], "max_gen_toks": 8}
    if family == "t5":  # else the harness lets a text be as long as max_gen_toks and the longest prompt of its batch
        settings["max_length"] = 8
    written = []
    for size in (1, 8):
        lm = TCopilotLM(exports[family][0], device="cpu", batch_size=size)
        given = requests("generate_until", [(context, settings) for context in contexts])
        written.append(lm.generate_until(given, disable_tqdm=True))
    assert written[0] == written[1]
    assert len(set(written[0])) > 1


@pytest.mark.slow
def test_prompts_of_encoders_with_learned_positions_are_padded_on_the_right():
    config = BartConfig(
        vocab_size=259, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, init_std=0.5,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=96, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = TCopilotForSeq2SeqLM.from_pilot(BartForConditionalGeneration(config).eval(), layers=1, weight=0.0)
    lm = TCopilotLM(model, tokenizer=byte_tokenizer(), batch_size=2)
    assert lm.max_length == 96
    ids, mask = lm.tok_batch_encode(["abc", "abcde"], left_truncate_len=4)
    assert lm.tokenizer.batch_decode(ids, skip_special_tokens=True) == ["abc", "bcde"]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_rolling_likelihood_takes_the_text_as_target(exports, family):
    lm = TCopilotLM(exports[family][0], device="cpu", batch_size=4)
    text = "a text of some length"
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert found == pytest.approx(by_hand(lm, "", text)[0], abs=1e-4)
    lm = TCopilotLM(exports[family][0], device="cpu", batch_size=4, max_length=8)
    (windows,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    expected = by_hand(lm, "", text[:8])[0] + by_hand(lm, text[7], text[8:16])[0]
    expected += by_hand(lm, text[12:16], text[16:])[0]
    assert windows == pytest.approx(expected, abs=1e-4)
    assert windows != pytest.approx(found, abs=1e-2)


def test_a_long_context_loses_its_start(exports):
    text = ("x" * 40 + "the end", " is near")
    lm = TCopilotLM(exports["llama"][0], device="cpu", max_length=16)
    assert_same(score(lm, [text]), [by_hand(lm, ("x" * 40 + "the end")[-9:], " is near")])
    hf = HFLM(exports["llama"][1], device="cpu", max_length=16)
    lm.model.weight = 0.0
    assert_same(score(lm, [text]), score(hf, [text]))
    with pytest.raises(ValueError, match="a continuation of 17 tokens"):
        score(lm, [("a", "b" * 17)])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_size_can_be_found_by_the_harness(exports, family):
    lm = TCopilotLM(exports[family][0], device="cpu", batch_size="auto", max_batch_size=4)
    assert_same(score(lm), [by_hand(lm, *text) for text in TEXTS])


def test_answers_are_cached_under_their_texts(exports):
    lm = TCopilotLM(exports["llama"][0], device="cpu", batch_size=4)
    kept = {}
    lm.cache_hook.add_partial = lambda kind, text, answer: kept.update({text: answer})
    found = score(lm)
    assert kept == dict(zip(TEXTS, found, strict=True))


def test_a_bfloat16_model_is_scored_in_float32(exports):
    lm = TCopilotLM(exports["llama"][0], device="cpu", dtype="bfloat16", batch_size=8)
    for weight in (0.0, 1.0):
        lm.model.weight = weight
        given = [(None, (5, 6), (token,)) for token in range(259)]
        scores = torch.tensor([total for total, _ in lm._loglikelihood_tokens(given, disable_tqdm=True)])
        assert scores.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_settings_of_the_export_stay_unless_given(tmp_path):
    model = build("llama", weight=0.25, feedback="own")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    lm = TCopilotLM(tmp_path, device="cpu")
    assert (lm.model.weight, lm.model.config.feedback) == (0.25, "own")
    assert isinstance(lm.model, TCopilotModel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("weight=-1", "weight=-1: λ must be 0"),
        ("weight=much", "weight='much': λ must be 0"),
        ("feedback=teacher", "feedback=teacher: use one of observed, own"),
        ("peft=somewhere", "peft: not for fused models"),
    ],
)
def test_bad_options_are_refused_before_anything_loads(arguments, message):
    with pytest.raises(ValueError, match=message):
        TCopilotLM.create_from_arg_string(f"pretrained=nowhere,{arguments}")


def test_what_is_no_export_is_refused(exports, tmp_path):
    with pytest.raises(ValueError, match=r"pretrained is a llama model, which --model hf evaluates; give the export"):
        TCopilotLM(exports["llama"][1])
    with pytest.raises(ValueError, match=f"pretrained={tmp_path}: no export can be read there .*; give the export"):
        TCopilotLM(tmp_path)


def test_a_bare_pilot_has_no_weight(tmp_path):
    model = build("llama")
    model.detach_copilot()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weight=0\.3: this export has no Copilot"):
        TCopilotLM(tmp_path, weight=0.3)
    assert len(score(TCopilotLM(tmp_path, device="cpu"))) == len(TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("started", ["here", pytest.param("by itself", marks=pytest.mark.slow)])
def test_the_command_is_the_harness_own_with_one_more_model(exports, tasks, started, monkeypatch, capsys):
    arguments = ["--model_args", f"pretrained={exports['llama'][0]},weight=0.3", "--tasks", "choice,writing"]
    arguments = ["--model", "tcopilot", *arguments, "--include_path", tasks]
    if started == "here":
        monkeypatch.setattr(sys, "argv", ["tcopilot-lm-eval", *arguments])
        monkeypatch.setattr(
            "lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False)
        )  # there are many
        main()
        printed = capsys.readouterr().out
    else:
        command = [sys.executable, "-m", "tcopilot.evaluation.lm_eval", *arguments]
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        printed = ran.stdout
    assert "'weight': 0.3" in printed
    assert "exact_match" in printed


@pytest.mark.slow
def test_the_package_does_not_need_the_harness():
    code = "import sys, tcopilot, tcopilot.app.run; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
