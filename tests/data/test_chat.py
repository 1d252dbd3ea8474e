import json

import composed
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tcopilot import TCopilotForCausalLM
from tcopilot.data import Chat, DataError, TCopilotDataModule, byte_tokenizer

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "chatml": "{% for m in messages %}" + TURN + "{% endfor %}" + ASK,
    "qwen": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if loop.last and m.role == 'assistant' %}<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK,
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
}
ENDS = {
    "chatml": "<|im_end|>",
    "qwen": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]
TALK = [
    {"role": "user", "content": "What is red?"},
    {"role": "assistant", "content": "Red roses\n\nare  red."},
    {"role": "user", "content": "And what is blue ?\n"},
    {"role": "assistant", "content": "The sky "},
]
TEXTS = ["user\n", "assistant\n\n", "model\n", *(message["content"] for message in TALK)] * 3


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of the family's kind, whose tokens span words and line breaks; it starts texts with <s>."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, show_progress=False)
    if family in ("gemma", "mistral"):
        first = {"gemma": "never", "mistral": "always"}[family]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=first, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=first)
    else:
        words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([*TEXTS, TEMPLATES[family]], trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATES[family]
    return made


def module(folder, *conversations, splits=("train", "test"), shots: int = 0, **settings) -> TCopilotDataModule:
    """A data module whose splits are of these conversations, each a list of messages or a whole row."""
    rows = [row if isinstance(row, dict) else {"messages": row} for row in conversations]
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = {"chat": Chat(name="chat", **settings)}
    return TCopilotDataModule(chat, path=folder, rounds=1, batch_size=1, shots=shots)


def prepared(tokenizer, folder, *conversations, **settings) -> list[dict]:
    """The rows of test, where there are no others."""
    data = module(folder, *conversations, splits=["test"], **settings)
    data.prepare(tokenizer, "left", training=False)
    return data.rows_of("test")


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompt_and_target_are_the_tokens_of_the_template(family, tmp_path):
    tokenizer = tokenizer_of(family)
    talk = TALK if family in ("gemma", "mistral") else [{"role": "system", "content": "Be brief."}, *TALK]
    rows = prepared(tokenizer, tmp_path, talk)
    assert tokenizer.eos_token == ENDS[family]
    assert len(rows) == 2
    for row, place in zip(rows, (len(talk) - 3, len(talk) - 1), strict=True):
        plain = {"tokenize": True, "return_dict": False}
        assert row["source_ids"] == tokenizer.apply_chat_template(talk[:place], add_generation_prompt=True, **plain)
        whole = tokenizer.apply_chat_template(talk[: place + 1], **plain)
        last = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
        assert row["source_ids"] + row["target_ids"] == whole[:last]
        assert row["target_ids"].count(tokenizer.eos_token_id) == 1
        assert talk[place]["content"].split() == row["answer"].removeprefix("<think> </think> ").split()


def test_a_border_within_a_token_is_read_as_generation_reads_it(tmp_path):
    tokenizer = tokenizer_of("chatml")
    talk = [TALK[0], {"role": "assistant", "content": "\n\nRed roses"}]
    (row,) = prepared(tokenizer, tmp_path, talk)
    prompt = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(talk, return_dict=False)
    assert whole[: len(prompt)] != prompt == row["source_ids"]
    assert tokenizer.decode(row["source_ids"] + row["target_ids"]) == tokenizer.decode(whole).rstrip()


def texts(tokenizer, folder, *conversations, **settings) -> list[tuple[str, str]]:
    """Prompt and target of each row of test."""
    return [(row["prompt"], row["target"]) for row in prepared(tokenizer, folder, *conversations, **settings)]


def test_settings_decide_on_turns_and_system_prompts(tmp_path):
    tokenizer = tokenizer_of("chatml")
    both = texts(tokenizer, tmp_path, TALK)
    assert [target for _, target in both] == ["Red roses\n\nare  red.", "The sky "]
    assert both[1][0].startswith(both[0][0] + both[0][1] + "<|im_end|>\n<|im_start|>user\nAnd")
    assert texts(tokenizer, tmp_path, TALK, turns="last") == both[1:]
    assert texts(tokenizer, tmp_path, [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]) == both[1:]
    share_gpt = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK]
    assert texts(tokenizer, tmp_path, {"conversations": share_gpt}) == both
    parts = [m | {"content": [{"type": "text", "text": m["content"]}], "name": None} for m in TALK]
    assert texts(tokenizer, tmp_path, {"talk": parts}, messages_column="talk") == both
    greeted = [{"role": "assistant", "content": "Hello"}, *TALK]
    assert [target for _, target in texts(tokenizer, tmp_path, greeted)] == [target for _, target in both]

    asked, said = TALK[0]["content"], TALK[1]["content"]
    pairs = [{"prompt": asked, "completion": said}, {"prompt": TALK[:1], "completion": TALK[1:2]}]
    pairs += [{"instruction": asked, "input": None, "output": said}]
    assert texts(tokenizer, tmp_path, *pairs) == both[:1] * 3
    with_input = {"instruction": "What is", "input": "red?", "output": said}
    assert texts(tokenizer, tmp_path, with_input) == [(both[0][0].replace("is red", "is\n\nred"), said)]

    with_system = [("<|im_start|>system\nBe brief.<|im_end|>\n" + prompt, target) for prompt, target in both]
    own = {"role": "system", "content": "Be brief."}
    assert texts(tokenizer, tmp_path, TALK, system="Be brief.") == with_system
    assert texts(tokenizer, tmp_path, {"messages": TALK, "system": "Be brief."}, system="no") == with_system
    assert texts(tokenizer, tmp_path, [own, *TALK], system="no") == with_system


def test_turns_of_conversations_that_open_alike_stay_on_one_side(tmp_path):
    talks = [[{"role": "user", "content": f"Question {n}"}, *TALK[1:]] for n in range(8)] + [[TALK[0], *TALK[1:]]] * 3
    data = module(tmp_path, *talks)
    data.prepare(tokenizer_of("chatml"), "left")
    decode = data.benchmarks["chat"]._tokenizer.decode
    opening = {
        split: {decode(row["source_ids"]).split("<|im_end|>")[0] for row in data.rows_of(split)}
        for split in ("train", "validation")
    }
    assert len(opening["train"]) + len(opening["validation"]) == 9
    assert not opening["train"] & opening["validation"]


def test_every_conversation_that_cannot_be_used_is_named(tmp_path):
    problems = {
        "messages is 'Hi', expected a list of messages": {"messages": "Hi"},
        "no column 'messages' or 'conversations': it has 'text'.*messages_column": {"text": "Hi"},
        "messages.0 is 'Hi', expected a message": ["Hi"],
        "messages.0 is .*expected texts as role and content": [{"role": "user", "content": 5}],
        "messages.0 is {'role': 'user', 'content': .*image": [{"role": "user", "content": [{"type": "image"}]}],
        "prompt\\+completion.0 is .*expected texts": {"prompt": 5, "completion": "six"},
        "no turn of the assistant follows one of the user": TALK[:1],
        "no system role": [{"role": "system", "content": "Be brief."}, *TALK],
    }
    tokenizer = tokenizer_of("gemma")
    for problem, row in problems.items():
        with pytest.raises(DataError, match=rf"conversation 2: {problem}"):
            prepared(tokenizer, tmp_path, TALK, row)


def test_a_template_that_gives_no_targets_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"chat\.template=None: the Pilot's tokenizer has no chat template; choose a"):
        prepared(byte_tokenizer(), tmp_path, TALK)
    with pytest.raises(DataError, match=r"none\.jinja'?: the file cannot be read"):
        prepared(byte_tokenizer(), tmp_path, TALK, template=str(tmp_path / "none.jinja"))
    thinking = TEMPLATES["chatml"].replace("assistant\n{% endif", "assistant\n<think>{% endif")
    with pytest.raises(DataError, match="does not begin with the generation prompt"):
        prepared(byte_tokenizer(), tmp_path, TALK, template=thinking)
    with pytest.raises(DataError, match="leaves out what the assistant says"):
        prepared(byte_tokenizer(), tmp_path, TALK, template="{{ messages[0].content }}")
    with_shots = module(
        tmp_path, *([{"role": "user", "content": f"What is {n}?"}, TALK[3]] for n in range(4)), shots=1
    )
    with pytest.raises(DataError, match=r"chat: data\.shots are not supported for conversations; use data\.shots=0"):
        with_shots.prepare(tokenizer_of("chatml"), "left")
    with pytest.raises(DataError, match=r"chat\.template='\{% for %\}': .*Expected an expression"):
        prepared(byte_tokenizer(), tmp_path, TALK, template="{% for %}")
    with pytest.raises(DataError, match="turns='first': use one of all, last"):
        Chat(name="chat", turns="first")


@pytest.mark.slow
def test_a_trained_model_answers_as_in_its_evaluation(tmp_path):
    tokenizer = tokenizer_of("chatml")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=1, **sizes)
    for part in (tokenizer, AutoModelForCausalLM.from_config(config)):
        part.save_pretrained(tmp_path / "chat_model")
    asked = [{"role": "user", "content": f"{'What is red?' * n}"} for n in range(1, 21)]
    module(tmp_path, *([question, TALK[3]] for question in asked))
    given = (f"data.path={tmp_path}", f"pilot.path={tmp_path}/chat_model", "debug=limit", "pilot.optimizer.lr=0.1")
    run = composed.train(tmp_path / "run", "data=chat", "pilot=tiny_llama", *given)
    (file,) = (run / "predictions").glob("test-chat-weight=0.jsonl")
    said = {row["prompt"]: row["prediction"] for row in map(json.loads, file.read_text().splitlines())}

    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    model = TCopilotForCausalLM.from_pretrained(run / "export")
    model.weight = 0.0
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    for question in asked[:4]:
        prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(answer, skip_special_tokens=True) == said[text]
