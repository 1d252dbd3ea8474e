"""What a fused model answers like any model of transformers: one tiny T5 and one tiny Llama."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from family_models import perturb, tiny_pilot
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaModel, Trainer, TrainingArguments

from tcopilot import TCopilotForCausalLM
from tcopilot.models.modeling import fused_class
from tcopilot.models.pretrained import check_placement


def build(family, **options):
    pilot = tiny_pilot(family, attention_dropout=0.0) if family == "llama" else tiny_pilot(family, dropout_rate=0.0)
    model = fused_class(family == "t5").from_pilot(pilot, layers=3, **options)
    perturb(model.copilot)
    return model.double()  # no near tie turns on rounding


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def t5():
    return build("t5")


@pytest.fixture(params=["llama", "t5"])
def model(request):
    found = request.getfixturevalue(request.param)
    yield found
    found.weight = 1.0


IDS = torch.randint(3, 56, (3, 12), generator=torch.Generator().manual_seed(7))
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


# Where the target begins


@torch.no_grad()
def test_a_text_of_unknown_start_counts_as_target_from_its_second_token_and_says_so(llama):
    with pytest.warns(UserWarning, match="Neither target_start nor labels tell where the target begins"):
        found = llama(IDS).logits
    with warnings.catch_warnings(action="error"):
        assert torch.equal(found, llama(IDS, target_start=1).logits)
        labelled = llama(IDS, labels=IDS)
        assert torch.equal(found, labelled.logits)
        assert not torch.isclose(found, llama.pilot(IDS).logits.log_softmax(-1).float(), atol=1e-3).all(-1).any()
    expected = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(labelled.loss, expected)
    with pytest.warns(UserWarning, match="target_start"):
        assert torch.equal(found, llama(IDS, use_cache=True).logits)
    assert torch.equal(found, llama(IDS, target_start=np.int64(1)).logits)


@torch.no_grad()
def test_labels_or_a_template_s_mask_tell_each_row_its_start(llama):
    """Right-padded rows whose targets begin at different columns are answered as each row alone."""
    starts, ends = [4, 7, 5], [12, 10, 11]
    columns = torch.arange(12)
    labels = torch.stack(
        [
            IDS[i].masked_fill((columns < a) | (columns >= b), -100)
            for i, (a, b) in enumerate(zip(starts, ends, strict=True))
        ]
    )
    mask = torch.stack([columns < end for end in ends]).long()
    together = llama(IDS, mask, labels=labels)
    by_template = llama(IDS, mask, assistant_masks=(labels != -100).long()).logits
    by_argument = llama(IDS, mask, target_start=torch.tensor(starts)).logits
    losses = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        alone = llama(IDS[i : i + 1, :end], target_start=start, labels=labels[i : i + 1, :end])
        losses.append(alone.loss * (end - start))
        for found in (together.logits, by_template, by_argument):
            torch.testing.assert_close(found[i, :end], alone.logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.loss, sum(losses) / sum(b - a for a, b in zip(starts, ends, strict=True)))
    with pytest.raises(ValueError, match="targets start at columns 4 to 7: with a cache"):
        llama(IDS, mask, labels=labels, use_cache=True)


@torch.no_grad()
def test_a_loop_over_the_forward_pass_decodes_what_generate_decodes(llama):
    text, cached = IDS, {"input_ids": IDS, "use_cache": True}
    steps = []
    for _ in range(4):
        text = torch.cat([text, llama(text, target_start=12).logits[:, -1:].argmax(-1)], dim=1)
        out = llama(**cached, target_start=12)
        steps.append(out.logits[:, -1].argmax(-1))
        cached = {"input_ids": steps[-1][:, None], "past_key_values": out.past_key_values}
    expected = llama.generate(IDS, do_sample=False, max_new_tokens=4, eos_token_id=-1)
    assert torch.equal(text, expected)
    assert torch.equal(torch.stack(steps, dim=1), expected[:, 12:])


# Losses


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    rows = [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(8) < 4, -100)}
        for row in torch.randint(3, 56, (8, 8))
    ]
    for row in rows[:5]:
        row["labels"] = row["labels"].masked_fill(torch.arange(8) > 5, -100)
    found = []
    for size, steps in ((8, 1), (2, 4)):
        options = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        arguments = TrainingArguments(str(tmp_path), report_to=[], **options, **sizes)
        trainer = Trainer(build("llama").float(), arguments, train_dataset=rows)
        trainer.train()
        found.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-3)


def test_a_trainer_evaluates_the_loss(model, tmp_path):
    rows = [{"input_ids": row, "labels": row.masked_fill(torch.arange(12) < 4, -100)} for row in IDS]
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()
    with torch.no_grad():
        expected = model(input_ids=IDS, labels=torch.stack([row["labels"] for row in rows])).loss.item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def given_to(model, ids=IDS):
    return (
        {"input_ids": ids, "decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {"input_ids": ids}
    )


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_losses_are_divided_by_the_number_of_items_that_is_given(model, weight):
    model.weight = weight
    given = {"input_ids": IDS, "labels": IDS.masked_fill(torch.arange(12) < 5, -100)}
    mean = model(**given).loss
    items = int((given["labels"] != -100).sum())
    torch.testing.assert_close(model(**given, num_items_in_batch=torch.tensor(2 * items)).loss * 2, mean)
    if not model.config.is_encoder_decoder:
        shifted = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        torch.testing.assert_close(model(IDS, shift_labels=shifted, labels=IDS).loss, mean)


# What is returned


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Neither")
def test_states_tuples_and_chosen_logits_are_returned_as_the_pilot_returns_them(model):
    given, eager = given_to(model), copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.copilot.body.config._attn_implementation == "eager"
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected, found = eager.pilot(**given, **asked), eager(**given, **asked)
    torch.testing.assert_close(found.logits, model(**given).logits, atol=1e-3, rtol=1e-3)
    names = {name for name in expected if name.endswith(("hidden_states", "attentions"))}
    assert {name for name in found if name.endswith(("hidden_states", "attentions"))} == names
    for name in names:
        assert all(torch.equal(*pair) for pair in zip(found[name], expected[name], strict=True)), name
    some = model(**given, output_hidden_states=[0, -1])
    some = some["decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"]
    assert [state is None for state in some] == [False, True, True, True, False]
    assert torch.equal(model(**given, return_dict=False)[0], model(**given).logits)
    decoded = eager.generate(
        IDS, GenerationConfig(max_new_tokens=3, min_new_tokens=3, num_beams=2), return_dict_in_generate=True, **asked
    )
    states = decoded["decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"]
    assert [len(step) for step in states] == [5, 5, 5]
    assert {len(layer) for step in states for layer in step} == {6}
    if not model.config.is_encoder_decoder:
        whole, chosen = model(IDS, target_start=5).logits, torch.tensor([3, 6])
        assert torch.equal(model(IDS, target_start=5, logits_to_keep=chosen).logits, whole[:, chosen])


def test_a_fused_model_decodes_without_dropout_after_from_pilot(t5):
    pilot = tiny_pilot("t5", dropout_rate=0.5).train()
    fused = fused_class(True).from_pilot(pilot, layers=2)
    assert not any(module.training for module in fused.modules())


# Caches


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("feedback", ["observed", "own"])
def test_another_turn_goes_on_from_the_cache_of_the_last(llama, feedback):
    llama.config.feedback = feedback
    rows = IDS[:, :7]
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    first = llama.generate(rows, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    turn = torch.cat([first.sequences, IDS[:, 7:]], dim=1)
    mask = torch.cat([mask, torch.ones(3, 13, dtype=torch.long)], dim=1)
    cached = llama.generate(turn, attention_mask=mask, past_key_values=copy.deepcopy(first.past_key_values), **GREEDY)
    assert torch.equal(cached, llama.generate(turn, attention_mask=mask, use_cache=False, **GREEDY))
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4}
    out = llama.generate(
        IDS, return_dict_in_generate=True, **beams
    )  # its beams are reordered with what they have read
    turn = torch.cat([out.sequences[:, :14], IDS[:, :3]], dim=1)
    out.past_key_values.batch_select_indices(torch.arange(0, 9, 3))
    llama.config.feedback = "observed"


@torch.no_grad()
def test_an_answer_goes_on_from_its_cache(model):
    name, known = ("decoder_input_ids", 1) if model.config.is_encoder_decoder else ("input_ids", 12)
    begun = model.generate(IDS, return_dict_in_generate=True, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    given = {"input_ids": IDS} | {name: begun.sequences, "past_key_values": begun.past_key_values}
    more = model.generate(**given, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    assert more.shape == (3, known + 8)
    assert torch.equal(more, model.generate(IDS, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_prefix_that_both_or_the_pilot_alone_have_read_is_not_read_again(llama, weight):
    llama.weight = weight
    prefix = llama(IDS[:, :5], use_cache=True, target_start=5).past_key_values
    llama.weight = 1.0
    expected = llama.generate(IDS, use_cache=False, **GREEDY)
    assert torch.equal(llama.generate(IDS, past_key_values=copy.deepcopy(prefix), **GREEDY), expected)
    assert torch.equal(llama.generate(IDS, prefill_chunk_size=5, **GREEDY), expected)
    if weight == 0:
        with pytest.raises(ValueError, match="the Copilot has not read the 5 tokens of this cache"):
            llama(IDS[:, 5:], past_key_values=prefix)


@torch.no_grad()
@pytest.mark.parametrize("start", [5, 8])
def test_a_prefix_in_a_cache_keeps_its_learned_positions(start):
    shape = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 56}
    torch.manual_seed(0)
    pilot = perturb(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape))).eval()
    gpt2 = fused_class(False).from_pilot(pilot, layers=2)
    perturb(gpt2.copilot)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    whole = gpt2(IDS, mask, target_start=10).logits[:, 9:]
    cache = gpt2(IDS[:, :start], mask[:, :start], target_start=start, use_cache=True).past_key_values
    cached = gpt2(IDS[:, start:], mask, past_key_values=cache, target_start=10).logits[:, 9 - start :]
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_padded_prompt_may_be_read_in_parts(llama):
    mask = torch.ones_like(IDS)
    mask[0, :4], mask[1, :2] = 0, 0
    whole, cache = llama(IDS, mask, target_start=9).logits, None
    for begin, end in ((0, 3), (3, 7), (7, 10), (10, 12)):
        given = {"past_key_values": cache, "use_cache": True, "target_start": 9}
        out = llama(IDS[:, begin:end], mask[:, :end], **given)
        cache = out.past_key_values
    torch.testing.assert_close(out.logits, whole[:, 10:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_survives_a_change_of_weight(model):
    first = model.generate(IDS, return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert len(cache) == 4
    assert cache.is_initialized
    assert len(list(cache)) == 4
    if model.config.is_encoder_decoder:
        assert cache.cross_attention_cache.get_seq_length() == 12
    more = {"decoder_input_ids": first.sequences} if model.config.is_encoder_decoder else {}
    text = IDS if model.config.is_encoder_decoder else first.sequences
    model.weight = 0.0
    alone = model.generate(text, past_key_values=cache, **more, **GREEDY)
    assert torch.equal(alone, model.pilot.generate(text, **more, **GREEDY))


@torch.no_grad()
def test_several_tokens_after_a_filled_cache_are_answered_as_one_by_one(model):
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    text = {"input_ids": IDS} if model.config.is_encoder_decoder else {"target_start": 4}
    whole = model(**text | {name: IDS}).logits
    out = model(**text | {name: IDS[:, :6]}, use_cache=True)
    more = model(**text | {name: IDS[:, 6:10]}, past_key_values=out.past_key_values)
    torch.testing.assert_close(more.logits, whole[:, 6:10], atol=1e-5, rtol=1e-5)
    last = model(**text | {name: IDS[:, 10:]}, past_key_values=out.past_key_values)
    torch.testing.assert_close(last.logits, whole[:, 10:], atol=1e-5, rtol=1e-5)


# Decoding


@pytest.mark.parametrize("weight", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("feedback", ["observed", "own"])
def test_a_draft_changes_no_token(model, weight, feedback):
    model.weight, model.config.feedback = weight, feedback
    expected = model.generate(IDS[:1], **GREEDY)
    try:
        assert torch.equal(model.generate(IDS[:1], assistant_model=model.pilot, **GREEDY), expected)
        assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=3, **GREEDY), expected)
        assert torch.equal(
            model.pilot.generate(IDS[:1], assistant_model=model, **GREEDY), model.pilot.generate(IDS[:1], **GREEDY)
        )
    finally:
        model.config.feedback = "observed"


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_drafts_after_a_filled_cache_skip_no_token(llama, weight):
    llama.weight = weight
    options = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    first = llama.generate(IDS[:1, :6], return_dict_in_generate=True, **options)
    given = {"past_key_values": first.past_key_values, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    with pytest.raises(ValueError, match="drafts cannot go on from a cache of 8 tokens while 3 are to be read"):
        llama.generate(torch.cat([first.sequences, IDS[:1, :2]], dim=1), **given, **GREEDY)
    llama.weight = 1.0


@torch.no_grad()
def test_what_has_been_read_is_undone_where_it_was_recorded(model):
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    text = {"input_ids": IDS} if model.config.is_encoder_decoder else {"target_start": 4}
    whole = model(**text | {name: IDS}).logits
    for records in (True, False):
        cache = model(**text | {name: IDS[:, :4]}, use_cache=True).past_key_values
        cache.reset()
        if records:
            cache.activate_past_recording()
        model(**text | {name: IDS[:, :6]}, past_key_values=cache)
        model(**text | {name: IDS.flip(1)[:, :3]}, past_key_values=cache)
        cache.crop(-4)
        if not records:
            with pytest.raises(ValueError, match="the Copilot has not read the 5 tokens of this cache"):
                model(**text | {name: IDS[:, 5:]}, past_key_values=cache)
            continue
        found = model(**text | {name: IDS[:, 5:]}, past_key_values=cache).logits
        torch.testing.assert_close(found, whole[:, 5:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_of_several_texts_are_refused(llama):
    positions = torch.arange(12).remainder(6).expand(3, -1)
    for packed in ({"position_ids": positions, "labels": IDS}, {"attention_mask": torch.ones(3, 1, 12, 12).tril()}):
        with pytest.raises(ValueError, match="a fused model reads one text a row"):
            llama(IDS, **packed)
    mask = (torch.arange(12) >= 4).long().expand(3, -1)
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)}
    labels = IDS.masked_fill(torch.arange(12) < 6, -100)
    torch.testing.assert_close(llama(IDS, **padded, labels=labels).loss, llama(IDS[:, 4:], labels=labels[:, 4:]).loss)


@pytest.mark.slow
@torch.no_grad()
def test_guidance_embeds_and_positional_settings_decode_as_the_stock_class_would(llama):
    guided = {"guidance_scale": 1.5, "negative_prompt_ids": IDS[:, :4], **GREEDY}
    assert torch.equal(llama.generate(IDS, **guided), llama.generate(IDS, use_cache=False, **guided))
    assert not torch.equal(llama.generate(IDS, **guided), llama.generate(IDS, **GREEDY))
    plain = llama.generate(IDS, GenerationConfig(**GREEDY))
    assert torch.equal(llama.generate(inputs_embeds=llama.get_input_embeddings()(IDS), **GREEDY), plain[:, 12:])
    embeds, labels = llama.get_input_embeddings()(IDS), IDS.masked_fill(torch.arange(12) < 5, -100)
    torch.testing.assert_close(llama(inputs_embeds=embeds, labels=labels).loss, llama(IDS, labels=labels).loss)
    with pytest.raises(ValueError, match="inputs_embeds does not tell the tokens"):
        llama(inputs_embeds=embeds, target_start=5)


@torch.no_grad()
def test_embeds_need_the_label_of_every_token_of_a_target(llama):
    embeds, labels = llama.get_input_embeddings()(IDS), IDS.masked_fill(torch.arange(12) < 5, -100)
    labels[1, :7], labels[2, 10:] = -100, -100
    torch.testing.assert_close(llama(inputs_embeds=embeds, labels=labels).loss, llama(IDS, labels=labels).loss)
    labels[0, 7] = -100
    for given in ({}, {"target_start": 5}):
        with pytest.raises(ValueError, match="labels hold -100 between targets"):
            llama(inputs_embeds=embeds, labels=labels, **given)


# Models as objects


def test_gradient_checkpointing_changes_no_gradient(model):
    if not model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match="use_reentrant=True: the layers of this Copilot read the log"):
            model.activation_checkpointing_enable({"use_reentrant": True})
    labels = IDS.masked_fill(torch.arange(12) < 5, -100)
    found = []
    for checkpointed in (False, True):
        one = copy.deepcopy(model).train()
        if checkpointed:
            one.activation_checkpointing_enable()
        one(IDS, labels=labels).loss.backward()
        found.append(
            {name: parameter.grad for name, parameter in one.named_parameters() if parameter.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith("copilot.body") for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.filterwarnings("ignore:Neither")
@torch.no_grad()
def test_both_vocabularies_grow_and_shrink(model, tmp_path):
    one, given = copy.deepcopy(model), given_to(model)
    before = one(**given).logits.log_softmax(-1)
    one.resize_token_embeddings(64)
    assert one.config.get_text_config().vocab_size == one.copilot.config.vocab_size == 64
    assert [len(part.weight) for part in (one.get_input_embeddings(), one.get_output_embeddings())] == [64, 64]
    after = one(**given, output_corrections=True)
    assert after.logits.shape[-1] == 64
    assert (after.corrections[..., 56:] == 0).all()
    one.save_pretrained(tmp_path)
    again = type(one).from_pretrained(tmp_path).double()
    torch.testing.assert_close(again(**given).logits, after.logits, atol=1e-4, rtol=1e-4)
    one.resize_token_embeddings(56)
    torch.testing.assert_close(one(**given).logits.log_softmax(-1), before, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Neither")
@torch.no_grad()
def test_adapters_are_merged_in_what_is_saved_and_stay_in_the_model(model, tmp_path):
    one, given = copy.deepcopy(model).float(), given_to(model)
    target = ["q"] if model.config.is_encoder_decoder else ["q_proj"]
    for part in (one.pilot, one.copilot.body):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=target, init_lora_weights=False), part)
    expected, before = one(**given).logits, {name: value.clone() for name, value in one.state_dict().items()}
    one.save_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    loaded, report = type(one).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(loaded.double()(**given).logits, one.double()(**given).logits, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(model.float()(**given).logits, expected, atol=1e-2)
    model.double()


@pytest.mark.filterwarnings("ignore:Neither")
@torch.no_grad()
def test_a_model_that_has_run_is_pickled(model):
    one, given = copy.deepcopy(model), given_to(model)
    one.activation_checkpointing_enable()
    expected = one(**given).logits
    again = pickle.loads(pickle.dumps(one))
    assert torch.equal(again(**given).logits, expected)
    assert torch.equal(one(**given).logits, expected)


@pytest.mark.slow
def test_the_pilot_may_be_offloaded_and_what_a_copilot_uses_may_not(tmp_path):
    build("llama").float().save_pretrained(tmp_path / "decoder")

    def load(name, **device_map):
        given = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, **given)

    options = {"do_sample": False, "max_new_tokens": 4}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").generate(IDS, **options)
    spread = {"pilot": "disk", "copilot": "cpu"}
    assert torch.equal(load("decoder", **spread).generate(IDS, **options), whole)
    with pytest.raises(ValueError, match="device_map offloads the Copilot, which is called part by part"):
        load("decoder", pilot="cpu", copilot="disk")
    head = TCopilotForCausalLM.from_pilot(tiny_pilot("llama"), kind="head", depths=[1.0])
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(
        ValueError, match="device_map offloads the Pilot's output embeddings, which this Copilot reads"
    ):
        load("head", **spread)
    head.hf_device_map = {"pilot": 0, "copilot": 1}
    with pytest.raises(ValueError, match="device_map spreads the fused model over the devices 0, 1"):
        check_placement(head)


def test_what_cannot_be_fused_is_refused_in_one_sentence(llama, t5, tmp_path):
    with pytest.raises(ValueError, match="LlamaModel has no language modelling head"):
        TCopilotForCausalLM.from_pilot(LlamaModel(llama.pilot.config))
    tiny_pilot("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="this config names no Pilot"):
        TCopilotForCausalLM.from_pretrained(tmp_path / "plain")
    llama.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="prefill_chunk_size=4 reads a prompt in parts, and an encoder"):
        t5.generate(IDS, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="continuous batching packs tokens of many requests into one row"):
        llama.generate_batch([[3, 4, 5]])
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", attn_implementation="eager")
    assert eager.copilot.body.config._attn_implementation == eager.pilot.config._attn_implementation == "eager"
