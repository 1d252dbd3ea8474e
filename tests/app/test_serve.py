"""The endpoint of a fused model, asked by OpenAI's own client: its answers are those of `generate`."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import composed
import pytest
import torch
from family_models import perturb, tiny_pilot
from transformers import AutoConfig, AutoTokenizer

from tcopilot import TCopilotForCausalLM, TCopilotForSeq2SeqLM
from tcopilot.app import serve
from tcopilot.data import word_tokenizer

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURN
    + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
WORDS = ["<|im_start|>user", "<|im_start|>assistant", "abcdef", *(f"w{i}" for i in range(50))]
"""Those of a vocabulary of 56; transformers looks for `abcdef` in it where `stop` is given."""
TALK = [{"role": "user", "content": "w3 w1 w4 w1 w5 "}]
WEIGHTS = (0.0, 0.01, 0.1)
N = 8


class Asking:
    """OpenAI's client of a server of ours, with the fields that all requests share filled in."""

    def __init__(self, url: str) -> None:
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=100)
        (model,) = self.client.models.list().data
        self.fields = {"model": model.id, "max_tokens": N}

    def chat(self, weight: Any = None, messages: Any = TALK, **given: Any) -> Any:
        return self._ask(self.client.chat.completions.create, weight, messages=messages, **given)

    def said(self, *given: Any, **fields: Any) -> str:
        return self.chat(*given, **fields).choices[0].message.content

    def text(self, prompt: str, weight: Any = None, **given: Any) -> Any:
        return self._ask(self.client.completions.create, weight, prompt=prompt, **given)

    def _ask(self, create: Any, weight: Any, generation: dict | None = None, **given: Any) -> Any:
        extra = {} if weight is None else {"weight": weight}
        extra |= {} if generation is None else {"generation_config": json.dumps(generation)}
        return create(extra_body=extra, **self.fields | given)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Asking]:
    """A server in a thread, at a free port."""
    server = uvicorn.Server(uvicorn.Config(serve.endpoint(serve.Export.load(folder)), log_level="error"))
    with serve.listen("localhost", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Asking(f"http://localhost:{listening.getsockname()[1]}/v1")
        finally:
            server.should_exit = True
            thread.join(20)


def export(folder: Path, family: str, template: str | None) -> SimpleNamespace:
    """A fused model whose Copilot changes what it says, with a tokenizer; saved, and as the test's own copy."""
    cls = TCopilotForSeq2SeqLM if family == "t5" else TCopilotForCausalLM
    model, tokenizer = cls.from_pilot(tiny_pilot(family, layers=2), weight=2.0), word_tokenizer(WORDS)
    perturb(model.copilot)
    tokenizer.chat_template = template
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return export(tmp_path_factory.mktemp("llama"), "llama", CHATML)


@pytest.fixture(scope="module")
def asking(llama):
    with served(llama.folder) as client:
        yield client


def answer(model: Any, tokenizer: Any, prompt: str | None = None, seed: int | None = None, **options: Any) -> str:
    """What `generate` says to a prompt, or to the conversation."""
    given = tokenizer(prompt or "", return_tensors="pt")
    if prompt is None:
        given = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_tensors="pt")
    if seed is not None:
        torch.manual_seed(seed)
    tokens = model.generate(**given, tokenizer=tokenizer, **{"max_new_tokens": N} | options)[0]
    start = 1 if model.config.is_encoder_decoder else given["input_ids"].shape[1]
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


def answers(made: SimpleNamespace, prompt: str | None = None) -> dict[float | None, str]:
    """The fused model's answers by λ; None is its own λ."""
    found = {None: answer(made.model, made.tokenizer, prompt)}
    for weight in WEIGHTS:
        made.model.weight = weight
        found[weight] = answer(made.model, made.tokenizer, prompt)
    made.model.weight = 2.0
    assert len(set(found.values())) > 2
    assert found[0.0] == answer(made.model.pilot, made.tokenizer, prompt)
    return found


def test_a_chat_is_answered_as_generate_answers_it(llama, asking):
    right = answers(llama)
    assert {weight: asking.said(weight) for weight in right} == right
    at_once = [*right] * 2
    with ThreadPoolExecutor(len(at_once)) as pool:
        assert [*pool.map(asking.said, at_once)] == [right[weight] for weight in at_once]
    for weight in (0.0, None):
        chunks = list(asking.chat(weight, stream=True))
        pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
        assert len(pieces) > 4
        assert "".join(pieces) == right[weight]
    assert chunks[-1].usage.completion_tokens == N
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.slow
def test_other_fields_do_what_they_do_in_generate(llama, asking):
    sampled = {"do_sample": True, "temperature": 2.0, "top_k": 0}
    seeds = range(3)
    right = [answer(llama.model, llama.tokenizer, seed=seed, **sampled) for seed in seeds]
    assert len(set(right)) == len(right)
    with ThreadPoolExecutor(len(right)) as pool:
        assert [*pool.map(lambda seed: asking.said(seed=seed, generation=sampled), seeds)] == right
    whole = answer(llama.model, llama.tokenizer)
    stop = whole.split()[4]
    assert asking.said(stop=stop) == answer(llama.model, llama.tokenizer, stop_strings=stop) != whole
    assert asking.said(max_tokens=3) == " ".join(whole.split()[:3])
    several = asking.text("w7 w2 w9", generation=sampled | {"num_return_sequences": 3}, stream=True)
    assert [*several][-1].usage.completion_tokens == N  # of one sequence
    beams = {"num_beams": 3, "no_repeat_ngram_size": 1}
    assert asking.said(generation=beams) == answer(llama.model, llama.tokenizer, **beams) != whole
    prompt = "w7 w2 w9"
    for weight, text in answers(llama, prompt).items():
        assert asking.text(prompt, weight).choices[0].text == text


def test_a_bad_request_is_refused_with_its_reason(asking):
    before = asking.said()
    for weight in (-1, "0.5", True, [0.5], 10**400):
        with pytest.raises(
            openai.BadRequestError, match=r"weight=.*: λ must be 0 \(the Pilot\) or positive: give a number"
        ):
            asking.chat(weight)
    text, image = {"type": "text", "text": "w1"}, {"type": "image_url", "image_url": {"url": "file:///x.png"}}
    refused = {
        "weight is a field of the request": {"generation": {"weight": 0.5}},
        "this server has '.*llama0' only": {"model": "gpt"},
        "no system role": {"messages": [{"role": "system", "content": "w1"}, *TALK]},
        "role": {"messages": [{"content": "w1"}]},
        "image_url.*parts of type text only": {"messages": [{"role": "user", "content": [text, image]}]},
        "cache_implementation='static'": {"generation": {"num_beams": 2, "cache_implementation": "static"}},
    }
    for reason, given in refused.items():
        with pytest.raises(openai.BadRequestError, match=reason):
            asking.chat(**given)
    with pytest.raises(openai.UnprocessableEntityError, match="lambda"):
        asking.client.chat.completions.create(messages=TALK, **asking.fields, extra_body={"lambda": 1})
    assert asking.said() == before


def test_no_position_beyond_the_models_own_is_read(tmp_path):
    positions = export(tmp_path, "gpt2", template=None).model.config.pilot.max_position_embeddings
    with served(tmp_path) as asking:
        unending = {"max_new_tokens": 2 * positions, "min_new_tokens": positions - 9}
        found = asking.text("w1 " * 10, generation=unending, max_tokens=2 * positions)
        assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (positions - 9, "length")
        with pytest.raises(openai.BadRequestError, match=f"has {positions + 1} tokens, .* has {positions} positions"):
            asking.text("w1 " * (positions + 1))


@pytest.mark.slow
def test_an_encoder_decoder_completes_texts(tmp_path):
    made, prompt = export(tmp_path, "t5", template=None), "w7 w2 w9"
    right = answers(made, prompt)
    with served(tmp_path) as asking:
        assert {weight: asking.text(prompt, weight).choices[0].text for weight in right} == right
        assert "".join(chunk.choices[0].text for chunk in asking.text(prompt, 0.0, stream=True)) == right[0.0]
        several = {"num_beams": 2, "num_return_sequences": 2}
        assert asking.text(prompt, generation=several).choices[0].text == answer(
            made.model, made.tokenizer, prompt, **several
        )
        with pytest.raises(openai.BadRequestError, match="has no chat template; use /v1/completions"):
            asking.chat()


def test_a_server_that_cannot_start_says_why(llama, tmp_path, capsys, monkeypatch):
    def refusal(*arguments: object) -> str:
        assert serve.main([*map(str, arguments)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    assert refusal(tmp_path, "--port", 0).startswith(f"{tmp_path}: there is no model in this folder; give the export")
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    assert f"{tmp_path}: a llama model, which `transformers serve` serves" in refusal(tmp_path, "--port", 0)
    llama.model.config.save_pretrained(tmp_path)
    assert "there is no tokenizer beside the model" in refusal(tmp_path, "--port", 0)
    assert "weight=-1.0: λ must be 0 (the Pilot) or positive: give a number" in refusal(
        llama.folder, "--port", 0, "--weight", -1
    )
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: Address already in use" in refusal(llama.folder, "--port", port)
    assert "--port 70000: " in refusal(llama.folder, "--port", 70000)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "openai" in (said := refusal(llama.folder, "--port", 0))
    assert "pip install 'tcopilot[serve]'" in said
    with pytest.raises(SystemExit):
        serve.main([str(llama.folder), "--continuous-batching"])
    assert "a Copilot needs a row for each" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_was_trained_on_conversations_answers_by_the_command(tmp_path):
    kinds = {"red": "Roses.", "blue": "The sky.", "white": "Snow."}
    for split in ("train", "test"):
        talks = [
            [{"role": "user", "content": f"What is {name}{'?' * n}"}, {"role": "assistant", "content": said}]
            for n in range(1, 30)
            for name, said in kinds.items()
        ]
        rows = (json.dumps({"messages": talk}) + "\n" for talk in talks)
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    given = [f"data.path={tmp_path}", f"data.benchmarks.chat.template={tmp_path}/chatml.jinja", "rounds=100"]
    run = composed.train(
        tmp_path / "run", "data=chat", "pilot=tiny_llama", "debug=limit", "pilot.optimizer.lr=5e-3",
        "trainer.val_check_interval=100", *given,
    )  # fmt: skip
    folder = run / "export"
    command = [sys.executable, "-m", "tcopilot.app.serve", str(folder), "--port", "0", "--weight", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith(f"{folder} at λ = 1: ")
            asking = Asking(re.search(r"http://\S+", line)[0])
            model, tokenizer = TCopilotForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
            for weight in (0.0, 0.5, 1.0):
                model.weight = weight
                for name in kinds:
                    messages = [{"role": "user", "content": f"What is {name}?"}]
                    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
                    tokens = model.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
                    found = asking.chat(weight, messages, max_tokens=20)
                    assert found.choices[0].message.content == tokenizer.decode(tokens, skip_special_tokens=True)
                    assert found.usage.completion_tokens == len(tokens)
            assert asking.said(None, messages) == asking.said(1.0, messages)
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
