"""Bad configs, data files, models and runs: one clear message each, status 1, no traceback, and nothing is trained."""

import gzip
import json
import os
import pickle
import shutil
from pathlib import Path

import composed
import pytest
import torch
from hydra._internal.utils import run_and_report
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tcopilot.app import build, run
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.trainer import make_callbacks, make_trainer
from tcopilot.data import byte_tokenizer
from tcopilot.models.pilot import ModelSourceError
from tcopilot.run_directory import RunDirectory
from tcopilot.training.module import TCopilotModule
from tcopilot.version import __version__

LORA = ("pilot=tiny_llama", "adapter@pilot.adapter=lora")
TOPK = ("log_storage@mistake_log.log.storage=topk",)
CONSTANT = ("scheduler@pilot.scheduler=constant",)
TASK = "data.benchmarks.word_problems"
TRAVERSAL = "becomes part of file names"


def given(*overrides: str, says: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A row of the table: the overrides and what the message must say besides the last of them."""
    return overrides, says


CONFIGS = {
    # the Pilot
    "Pilot: a flag is text": given("pilot.frozen=maybe", says=("pilot.frozen=maybe", "true or false")),
    "Pilot: a flag is null": given("pilot.frozen=null", says=("pilot.frozen=None", "true or false")),
    "Pilot: a flag is a number": given("pilot.gradient_checkpointing=2", says=("=2", "true or false")),
    "Pilot: negative clip": given("pilot.clip=-1", says=("pilot.clip=-1", "above 0")),
    "Pilot: clip is not a number": given("pilot.clip=nan", says=("pilot.clip=nan", "above 0")),
    "Pilot: infinite clip": given("pilot.clip=inf", says=("pilot.clip=inf", "above 0")),
    "Pilot: no micro-batch": given("pilot.micro_batch_size=0", says=("pilot.micro_batch_size=0", "at least 1")),
    "Pilot: half a row": given("pilot.micro_batch_size=2.5", says=("=2.5", "whole number")),
    "Pilot: a list of micro-batches": given("pilot.micro_batch_size=[4]", says=("=[4]", "whole number")),
    "Pilot: config is text": given("pilot.config=tiny", says=("pilot.config=tiny", "mapping")),
    "Pilot: no family": given("~pilot.config.model_type", says=("pilot.config", "model_type")),
    "Pilot: negative width": given("pilot.config.d_model=-64", says=("pilot.config.d_model=-64", "at least 1")),
    "Pilot: no layers": given("pilot.config.num_layers=0", says=("pilot.config.num_layers=0", "at least 1")),
    "Pilot: width is text": given("pilot.config.d_model=wide", says=("d_model", "wide", "int")),
    "Pilot: dropout above 1": given("pilot.config.dropout_rate=2", says=("pilot.config", "dropout", "2")),
    "Pilot: unknown activation": given("pilot.config.feed_forward_proj=silly", says=("pilot.config", "silly")),
    "Pilot: misspelt size": given(
        "+pilot.config.hidden_sise=3", says=("pilot.config.hidden_sise=3", "no such setting", "T5Config")
    ),
    "Pilot: groups of heads": given(
        "pilot=tiny_llama", "pilot.config.num_key_value_heads=3", says=("=3 does not divide", "=4", "a divisor")
    ),
    "Pilot: no heads": given("pilot=tiny_llama", "pilot.config.num_attention_heads=0", says=("pilot.config",)),
    "Pilot: path is a number": given("pilot.path=5", says=("pilot.path=5", "expected a text")),
    "Pilot: path is a list": given("pilot.path=[a]", says=("pilot.path=['a']", "expected a text")),
    "Pilot: empty path": given("pilot.path=''", says=("pilot.path=", "Hub id")),
    "Pilot: path is a file": given("pilot.path=<file>", says=("<file> is a file", "the folder that holds it")),
    "Pilot: no such folder": given("pilot.path=/no/such", says=("pilot.path=/no/such", "no such folder")),
    "Pilot: no folder above": given("pilot.path=../../x", says=("pilot.path=../../x", "no such folder")),
    "Pilot: an empty folder": given("pilot.path=<empty>", says=("pilot.path=<empty>", "config.json")),
    "Pilot: revision is a number": given("pilot.path=x/y", "pilot.revision=5", says=("pilot.revision=5", "a text")),
    "Pilot: no type": given("pilot.dtype=null", says=("pilot.dtype=None", "float32")),
    "Pilot: type of whole numbers": given("pilot.dtype=int8", says=("pilot.dtype=int8", "float32")),
    "Pilot: adapter by name": given("pilot.adapter=lora", says=("pilot.adapter=lora", "adapter@pilot.adapter=lora")),
    "Pilot: settings of no adapter": given(
        "pilot=tiny_llama", "+pilot.adapter.r=4", says=("{'r': 4}", "pilot.adapter=null")
    ),
    "Pilot: adapter of nowhere": given(*LORA, "pilot.adapter._target_=x.y", says=("pilot.adapter", "x.y")),
    "Pilot: negative rank": given(*LORA, "pilot.adapter.r=-1", says=("r=-1", "at least 1")),
    "Pilot: half a rank": given(*LORA, "pilot.adapter.r=2.5", says=("r=2.5", "whole number")),
    "Pilot: rank is text": given(*LORA, "pilot.adapter.r=many", says=("r=many", "whole number")),
    "Pilot: no alpha": given(*LORA, "pilot.adapter.alpha=0", says=("alpha=0", "above 0")),
    "Pilot: all dropped": given(*LORA, "pilot.adapter.dropout=1", says=("dropout=1", "[0, 1)")),
    "Pilot: dropout is text": given(*LORA, "pilot.adapter.dropout=often", says=("dropout=often", "[0, 1)")),
    "Pilot: targets are text": given(*LORA, "pilot.adapter.targets=q_proj", says=("targets=q_proj", "a list")),
    "Pilot: no targets": given(*LORA, "pilot.adapter.targets=[]", says=("pilot.adapter", "targets=[]")),
    "Pilot: targets are null": given(*LORA, "pilot.adapter.targets=null", says=("pilot.adapter", "targets=[]")),
    "Pilot: unknown adapter value": given(*LORA, "+pilot.adapter.rank=3", says=("pilot.adapter", "'rank'")),
    # optimisers and schedules
    "optimiser by name": given("pilot.optimizer=adamw", says=("optimizer@pilot.optimizer=adamw",)),
    "no optimiser": given("copilot.optimizer=null", says=("copilot.optimizer=None", "optimizer@copilot.optimizer")),
    "unknown optimiser": given("pilot.optimizer._target_=torch.optim.Adamw", says=("pilot.optimizer", "Adamw")),
    "one beta as a number": given("pilot.optimizer.betas=0.9", says=("pilot.optimizer", "betas=0.9")),
    "one beta in a list": given("pilot.optimizer.betas=[0.9]", says=("pilot.optimizer", "betas=[0.9]")),
    "large betas": given("copilot.optimizer.betas=[2,3]", says=("copilot.optimizer", "betas=[2, 3]", "Invalid beta")),
    "negative decay": given("pilot.optimizer.weight_decay=-1", says=("weight_decay=-1", "at least 0")),
    "decay is text": given("pilot.optimizer.weight_decay=heavy", says=("weight_decay=heavy", "number")),
    "rate is not a number": given("pilot.optimizer.lr=nan", says=("pilot.optimizer.lr=nan", "above 0")),
    "infinite rate": given("copilot.optimizer.lr=inf", says=("copilot.optimizer.lr=inf", "above 0")),
    "a list of rates": given("pilot.optimizer.lr=[1e-3]", says=("pilot.optimizer.lr=[0.001]", "above 0")),
    "unknown optimiser value": given("+pilot.optimizer.momentum=1", says=("pilot.optimizer", "momentum")),
    "negative warm-up": given("pilot.scheduler.num_warmup_steps=-1", says=("num_warmup_steps=-1", "at least 0")),
    "warm-up is text": given("pilot.scheduler.num_warmup_steps=many", says=("num_warmup_steps=many", "number")),
    "warm-up is null": given("copilot.scheduler.num_warmup_steps=null", says=("num_warmup_steps=None", "number")),
    "last rate is text": given("pilot.scheduler.min_lr_rate=low", says=("min_lr_rate=low", "from 0 to 1")),
    "last rate above the peak": given("pilot.scheduler.min_lr_rate=2", says=("min_lr_rate=2", "from 0 to 1")),
    "schedule by name": given("pilot.scheduler=cosine", says=("scheduler@pilot.scheduler=cosine",)),
    "unknown schedule": given(*CONSTANT, "pilot.scheduler.name=nope", says=("pilot.scheduler", "nope")),
    "unknown schedule value": given("+pilot.scheduler.cycles=1", says=("pilot.scheduler", "cycles")),
    # the Copilot
    "Copilot: enabled is text": given("copilot.enabled=perhaps", says=("copilot.enabled=perhaps", "true or false")),
    "Copilot: negative layers": given("copilot.layers=-1", says=("copilot.layers=-1", "use 1 to 2")),
    "Copilot: layers are a flag": given("copilot.layers=true", says=("copilot.layers=True", "use 1 to 2")),
    "Copilot: layers are not a number": given("copilot.layers=nan", says=("copilot.layers=nan", "use 1 to 2")),
    "Copilot: a list of layers": given("copilot.layers=[1]", says=("copilot.layers=[1]", "use 1 to 2")),
    "Copilot: pattern is text": given("copilot.pattern=first", says=("copilot.pattern=first", "1, 2, 3, 4")),
    "Copilot: pattern is a flag": given("copilot.pattern=true", says=("copilot.pattern=True", "1, 2, 3, 4")),
    "Copilot: half a step": given("copilot.steps_per_round=1.5", says=("copilot.steps_per_round=1.5", "whole")),
    "Copilot: no records": given("copilot.batch_size=0", says=("copilot.batch_size=0", "at least 1")),
    "Copilot: negative feedback": given("copilot.own_feedback=-0.1", says=("copilot.own_feedback=-0.1", "[0, 1]")),
    "Copilot: three feedbacks": given("copilot.own_feedback=[0,1,1]", says=("own_feedback=[0, 1, 1]", "or two")),
    "Copilot: no feedback at all": given("copilot.own_feedback=[]", says=("copilot.own_feedback=[]", "[0, 1]")),
    "Copilot: feedback is text": given("copilot.own_feedback=always", says=("copilot.own_feedback=always", "[0, 1]")),
    "Copilot: feedback is null": given("copilot.own_feedback=null", says=("copilot.own_feedback=None", "[0, 1]")),
    "Copilot: no clip": given("copilot.clip=0", says=("copilot.clip=0", "above 0")),
    "Copilot: no head": given("copilot.head=null", says=("copilot.head=None", "linear, soft")),
    "Copilot: error input is text": given("copilot.train_error_input=often", says=("=often", "true or false")),
    "Copilot: no such donor": given("copilot.path=/no/such", says=("copilot.path=/no/such", "no such folder")),
    "Copilot: donor is a file": given("copilot.path=<file>", says=("copilot.path=<file> is a file",)),
    "Copilot: adapter by name": given("copilot.adapter=lora", says=("adapter@copilot.adapter=lora",)),
    # Mistake Log and objective
    "log: negative capacity": given("mistake_log.log.capacity_rounds=-1", says=("capacity_rounds=-1", "at least one")),
    "log: half a round": given("mistake_log.log.capacity_rounds=2.5", says=("capacity_rounds=2.5", "whole number")),
    "log: capacity is text": given("mistake_log.log.capacity_rounds=many", says=("=many", "whole number")),
    "log: capacity is null": given("mistake_log.log.capacity_rounds=null", says=("=None", "whole number")),
    "log: bytes with a unit": given("mistake_log.log.max_bytes=1GB", says=("max_bytes=1GB", "number of bytes")),
    "log: recorded at a number": given("mistake_log.from=5", says=("mistake_log.from=5: give the folder",)),
    "log: recorded nowhere": given("mistake_log.from=", says=("mistake_log.from=: give the folder",)),
    "log: recorded at several": given("mistake_log.from=[a,b]", says=("mistake_log.from=['a', 'b']: give",)),
    "log: no type": given("mistake_log.log.dtype=null", says=("mistake_log.log.dtype=None", "float32")),
    "log: seed is text": given("mistake_log.log.seed=x", says=("mistake_log.log.seed=x", "whole number")),
    "log: policy by name": given(
        "mistake_log.log.policy=reservoir", says=("policy=reservoir", "mistake_log=reservoir")
    ),
    "log: storage by name": given(
        "mistake_log.log.storage=topk", says=("mistake_log.log.storage=topk", "log_storage@")
    ),
    "log: unknown policy": given(
        "mistake_log.log.policy._target_=tcopilot.mistake_log.policies.Fifoo", says=("Fifoo",)
    ),
    "log: unknown value": given("+mistake_log.log.size=3", says=("mistake_log.log", "'size'")),
    "log: negative k": given(*TOPK, "mistake_log.log.storage.k=-3", says=("storage.k=-3", "at least one")),
    "log: k is text": given(*TOPK, "mistake_log.log.storage.k=many", says=("storage.k=many", "whole number")),
    "log: half a k": given(*TOPK, "mistake_log.log.storage.k=1.5", says=("storage.k=1.5", "whole number")),
    "log: negative statistics": given("mistake_log.every_n_rounds=-5", says=("every_n_rounds=-5", "at least 1")),
    "unknown objective value": given("+objective.alpha=2", says=("objective", "alpha=2")),
    "objective of nowhere": given("objective._target_=tcopilot.training.objectives.Nope", says=("objective", "Nope")),
    "objective without its methods": given("objective._target_=torch.nn.Identity", says=("objective", "row_losses")),
    # fusion and evaluation
    "λ is not a number": given("fusion.weight=nan", says=("fusion.weight=nan", "a number, a list")),
    "λ is a flag": given("fusion.weight=true", says=("fusion.weight=True", "a number, a list")),
    "λ in two lists": given("fusion.weight=[[0,1]]", says=("fusion.weight=[[0, 1]]", "a number, a list")),
    "λ in quotes": given("fusion.weight='0,1'", says=("fusion.weight=0,1", "a number, a list")),
    "λ* of logits": given("fusion=logits", "fusion.weight=auto", says=("fusion.weight=auto", "probability")),
    "no fusion space": given("fusion.rule=null", says=("fusion.rule=None", "fusion=<name>")),
    "no feedback": given("fusion.feedback=null", says=("fusion.feedback=None", "observed, own")),
    "modes are text": given("evaluation.modes=generation", says=("evaluation.modes=generation", "a list of")),
    "unknown mode": given("evaluation.modes=[guess]", says=("evaluation.modes=['guess']", "generation, reranking")),
    "a mode twice": given("evaluation.modes=[generation,generation]", says=("evaluation.modes", "a list of")),
    "reranking of one": given("evaluation.modes=[reranking]", says=("reranking", "use 2 or more")),
    "modes without answers": given("evaluation.modes=[likelihood]", says=("word_problems has no options", "add gen")),
    "half a beam": given("evaluation.num_beams=2.5", says=("evaluation.num_beams=2.5", "whole number")),
    "beams are null": given("evaluation.num_beams=null", says=("evaluation.num_beams=None", "whole number")),
    "no answer tokens": given("evaluation.max_new_tokens=0", says=("evaluation.max_new_tokens=0", "at least 1")),
    "negative evaluation batch": given("evaluation.batch_size=-4", says=("evaluation.batch_size=-4", "at least 1")),
    "unknown ranking": given("evaluation.ranking=best", says=("evaluation.ranking=best", "beam, exhaustive")),
    "λ chosen nowhere": given("+evaluation.select_on=null", says=("evaluation.select_on=None", "use validation")),
    "reported path": given("evaluation.report_on=../../x", says=("report_on=../../x", "test, validation")),
    # the trainer
    "accelerator": given("trainer.accelerator=quantum", says=("trainer.accelerator=quantum", "cpu")),
    "negative devices": given("trainer.devices=-3", says=("trainer.devices=-3", "a number of devices")),
    "devices are text": given("trainer.devices=none", says=("trainer.devices=none", "a number of devices")),
    "half a device": given("trainer.devices=1.5", says=("trainer.devices=1.5", "a number of devices")),
    "an empty list of devices": given("trainer.devices=[]", says=("trainer.devices=[]", "a number of devices")),
    "devices are null": given("trainer.devices=null", says=("trainer.devices=None", "a number of devices")),
    "no precision": given("trainer.precision=null", says=("trainer.precision=None", "32-true")),
    "precision of 8 bits": given("trainer.precision=8", says=("trainer.precision=8", "32-true")),
    "no validation interval": given("trainer.val_check_interval=0", says=("val_check_interval=0", "at least 1")),
    "a share of validation": given("trainer.val_check_interval=0.5", says=("val_check_interval=0.5", "whole number")),
    "negative validation": given("trainer.limit_val_batches=-1", says=("limit_val_batches=-1", "[0.0, 1.0]")),
    "more than all validation": given("trainer.limit_val_batches=1.5", says=("limit_val_batches=1.5", "[0.0, 1.0]")),
    "validation is text": given("trainer.limit_val_batches=all", says=("limit_val_batches=all", "[0.0, 1.0]")),
    "sanity steps": given("trainer.num_sanity_val_steps=-2", says=("num_sanity_val_steps=-2", "at least -1")),
    "negative logging": given("trainer.log_every_n_steps=-1", says=("log_every_n_steps=-1", "at least 0")),
    "no epoch": given("+trainer.max_epochs=0", says=("trainer.max_epochs=0", "set rounds")),
    "two epochs": given("+trainer.max_epochs=2", says=("trainer.max_epochs=2", "set rounds")),
    "endless epochs": given("+trainer.max_epochs=null", says=("trainer.max_epochs=None", "set rounds")),
    "many epochs at least": given("+trainer.min_epochs=5", says=("trainer.min_epochs=5", "leave it out")),
    "checkpoints of Lightning": given("+trainer.enable_checkpointing=true", says=("callbacks.checkpoint writes",)),
    "sampler of Lightning": given("+trainer.use_distributed_sampler=true", says=("use_distributed_sampler=True",)),
    "steps of Lightning": given("+trainer.max_steps=2", says=("trainer.max_steps=2", "set rounds")),
    "time of Lightning": given("+trainer.max_time=soon", says=("trainer", "max_time=soon", "leave it out")),
    "accumulation of Lightning": given("+trainer.accumulate_grad_batches=4", says=("set pilot.micro_batch_size",)),
    "clipping of Lightning": given("+trainer.gradient_clip_val=1", says=("set pilot.clip",)),
    "a share of rounds": given("+trainer.limit_train_batches=0.1", says=("limit_train_batches=0.1", "set rounds")),
    "dev run of Lightning": given("+trainer.fast_dev_run=true", says=("fast_dev_run=True", "debug=fdr")),
    "unknown trainer value": given("+trainer.nope=1", says=("trainer", "nope=1")),
    "plugins are a number": given("+trainer.plugins=5", says=("trainer", "plugins")),
    "no nodes": given("+trainer.num_nodes=0", says=("trainer.num_nodes=0", "at least 1")),
    "nodes are text": given("+trainer.num_nodes=two", says=("trainer.num_nodes=two", "whole number")),
    "spawned processes": given("trainer.strategy=ddp_spawn", says=("trainer.strategy=ddp_spawn", "ddp")),
    "unknown trainer": given("trainer._target_=lightning.Traner", says=("trainer", "Traner")),
    # callbacks and loggers
    "checkpoints never": given("callbacks.checkpoint.every_n_rounds=0", says=("every_n_rounds=0", "at least 1")),
    "checkpoints kept": given("callbacks.checkpoint.keep=-1", says=("callbacks.checkpoint.keep=-1", "at least 1")),
    "unknown callback": given(
        "callbacks.health._target_=tcopilot.training.callbacks.Nope", says=("callbacks.health", "Nope")
    ),
    "callback is a number": given("callbacks.checkpoint=5", says=("callbacks.checkpoint=5", "_target_")),
    "callback without class": given("+callbacks.extra.x=1", says=("callbacks.extra", "_target_")),
    "no callback at all": given(
        "+callbacks.extra._target_=builtins.dict", says=("callbacks.extra", "not a Lightning")
    ),
    "logger is a number": given("logger.csv=5", says=("logger.csv=5", "_target_")),
    "unknown logger value": given("+logger.csv.x=1", says=("logger.csv", "'x'")),
    # the run
    "negative seed": given("seed=-1", says=("seed=-1", "from 0 to 4294967295")),
    "seed is text": given("seed=x", says=("seed=x", "whole number")),
    "half a seed": given("seed=1.5", says=("seed=1.5", "whole number")),
    "seed is null": given("seed=null", says=("seed=None", "whole number")),
    "large seed": given("seed=99999999999", says=("seed=99999999999", "from 0 to 4294967295")),
    "negative rounds": given("rounds=-5", says=("rounds=-5", "at least 1")),
    "rounds are not a number": given("rounds=nan", says=("1 problem", "rounds=nan", "whole number")),
    "a list of rounds": given("rounds=[1]", says=("rounds=[1]", "whole number")),
    "rounds are a flag": given("rounds=true", says=("rounds=True", "whole number")),
    "name that leaves the folder": given("name=../../x", says=("name=../../x", "without ..")),
    "name from the root": given("name=/abs", says=("name=/abs", "leading /")),
    "no name": given("name=null", says=("name=None", "give a name")),
    "run folder is a file": given("paths.run_dir=<file>", says=("paths.run_dir=<file>", "is a file")),
    "run folder below a file": given("paths.run_dir=<file>/run", says=("paths.run_dir=<file>/run", "is a file")),
    "resume nothing": given("resume=/no/such", says=("resume=/no/such", "no config.yaml")),
    "resume a file": given("resume=<file>", says=("resume=<file>", "no config.yaml")),
    "resume an empty folder": given("resume=<empty>", says=("resume=<empty>", "no config.yaml")),
    "control": given("control=yes", says=("control=yes", "null, equal_time")),
    "reference to nothing": given("rounds=${nope}", says=("rounds", "'nope'", "give rounds=<value>")),
    "variable that is not set": given("rounds=${oc.env:NOPE_X}", says=("rounds", "NOPE_X", "give rounds=<value>")),
    "unknown resolver": given("pilot.clip=${nosuch:1}", says=("pilot.clip", "nosuch")),
    "rounds beyond counting": given(f"rounds={10**30}", says=(f"rounds={10**30}", "at most 2147483647")),
    "steps beyond counting": given(f"copilot.steps_per_round={10**20}", says=("steps_per_round=1000", "at most 2147")),
    "passes beyond counting": given("rounds=null", "data.epochs=1e30", says=("data.epochs=1e+30", "give fewer")),
    "a benchmark that never comes": given(
        "data=[word_problems,multiple_choice]",
        "data.weights={word_problems: 1, multiple_choice: 1e-9}",
        says=("data.weights=[1, 1e-09]", "rarest", "leave the benchmark out"),
    ),
    "rounds deleted": given("~rounds", says=("'rounds' not found", "data.rounds=<value>")),
    "precision deleted": given("~trainer.precision", says=("trainer.precision is not in the config",)),
    "batch deleted": given("~data.batch_size", says=("data.batch_size is not in the config",)),
    "λ deleted": given("~fusion.weight", says=("fusion.weight is not in the config",)),
    # data settings
    "batch in quotes": given("data.batch_size='16'", says=("data.batch_size=16", "whole number")),
    "negative batch": given("data.batch_size=-1", says=("data.batch_size=-1", "at least 1")),
    "no validation batch": given("data.eval_batch_size=0", says=("data.eval_batch_size=0", "at least 1")),
    "no frequency": given("data.weights={word_problems:0}", says=("data.weights.word_problems=0", "above 0")),
    "frequency is not a number": given("data.weights={word_problems:nan}", says=("word_problems=nan", "above 0")),
    "frequency is text": given("data.weights={word_problems:much}", says=("word_problems=much", "above 0")),
    "frequencies are a number": given("data.weights=5", says=("data.weights=5", "a mapping")),
    "no evaluation rows": given("data.max_eval_rows=0", says=("data.max_eval_rows=0", "at least 1")),
    "no source": given("data.max_source_length=0", says=("data.max_source_length=0", "at least 1")),
    "negative workers": given("data.num_workers=-1", says=("data.num_workers=-1", "at least 0")),
    "workers are text": given("data.num_workers=many", says=("data.num_workers=many", "whole number")),
    "no buffer": given("data.shuffle_buffer=0", says=("data.shuffle_buffer=0", "at least 1")),
    "data seed is text": given("data.seed=x", says=("data.seed=x", "whole number")),
    "no overflow": given("data.overflow=null", says=("data.overflow", "error, drop or truncate")),
    "errors ignored": given("data.on_error=ignore", says=("data.on_error", "stop or skip")),
    "streaming is text": given("data.streaming=perhaps", says=("data.streaming=perhaps", "true or false")),
    "grouping is text": given("data.group_by_length=maybe", says=("data.group_by_length=maybe", "true or false")),
    "no benchmarks": given("data.benchmarks=null", says=("data.benchmarks=None", "a group of keys")),
    "all benchmarks deleted": given("~data.benchmarks.word_problems", says=("data.benchmarks is empty",)),
    "benchmark is a number": given("data.benchmarks.word_problems=5", says=("word_problems=5", "_target_")),
    "validation is a word": given("data.validation_size=half", says=("data.validation_size=half", "0.1")),
    "epochs are text": given("data.epochs=many", says=("data.epochs=many", "above 0")),
    "unknown task": given(f"{TASK}.kind=poems", says=("'poems'", "multiple_choice")),
    "rows are text": given(f"{TASK}.train=many", says=(f"{TASK}.train='many'", "whole number")),
    "half a row": given(f"{TASK}.train=1.5", says=(f"{TASK}.train=1.5", "whole number")),
    "no train rows": given(f"{TASK}.train=0", says=("train: no rows",)),
    "negative train rows": given(f"{TASK}.train=-1", says=("word_problems", "-1")),
    "unknown column": given(f"+{TASK}.prompt='{{nope}}'", says=("no column 'nope'",)),
    "one target for all": given(f"+{TASK}.target=answer", says=("'answer'", "the same text")),
    "no answer of a benchmark": given(f"+{TASK}.max_new_tokens=0", says=("max_new_tokens=0", "at least 1")),
    "metric is a number": given(f"+{TASK}.metric=5", says=("metric=5", "a text")),
    "unknown value": given(f"+{TASK}.nope=5", says=("'nope'", TASK)),
    "unknown split": given(f"+{TASK}.splits={{dev:dev}}", says=("'dev'", "train")),
    "splits are text": given(f"+{TASK}.splits=train", says=(f"{TASK}.splits='train'", "a mapping")),
    "no such class": given(f"{TASK}._target_=tcopilot.data.generated_tasks.Nope", says=(TASK, "Nope")),
    "no such data module": given("data._target_=nope", says=("data", "nope")),
    "name ../x": given(f"{TASK}.name=../x", says=("'../x'", TRAVERSAL)),
    "name with a slash": given(f"{TASK}.name=a/b", says=("'a/b'", TRAVERSAL)),
    "name ..": given(f"{TASK}.name=..", says=("'..'", TRAVERSAL)),
    "empty name": given(f"{TASK}.name=''", says=("''", TRAVERSAL)),
    "endless name": given(f"{TASK}.name={'x' * 300}", says=("xxx", TRAVERSAL)),
    "name of two words": given(f"{TASK}.name='a b'", says=("'a b'", TRAVERSAL)),
    "name is a number": given(f"{TASK}.name=5", says=(f"{TASK.rpartition('.')[0]}.5.name=5", "a text")),
    "folder that leaves the data": given(f"+{TASK}.folder=../../etc", says=("'../../etc'", "under data.path")),
}
HYDRA = {  # refused by Hydra itself, in its words
    "unknown key": given("epochs=3", says=("epochs", "not in struct")),
    "unknown key of a group": given("pilot.layers=3", says=("pilot.layers", "not in struct")),
    "unknown value of a group": given("pilot=tiny_t6", says=("pilot/tiny_t6", "tiny_t5")),
    "unknown objective": given("objective=hinge", says=("objective/hinge", "rmse")),
    "unknown logger": given("logger=nope", says=("logger/nope", "csv")),
    "unknown experiment": given("experiment=nope", says=("experiment/nope", "demo")),
    "unknown group": given("nope@x=3", says=("config group 'nope' does not exist",)),
    "unknown data in a mixture": given("data=[gsm8k,nope]", says=("data/nope",)),
    "no value": given("rounds", says=("rounds", "missing EQUAL")),
    "unfinished list": given("rounds=[1", says=("[1",)),
    "list for a mapping": given("pilot.config=[1,2]", says=("pilot.config", "Cannot merge")),
    "mapping for a list": given("fusion.weight={a:1}", says=("fusion.weight", "Cannot merge")),
    "key that is not there": given("~pilot.layers", says=("pilot.layers", "does not exist")),
}

ROWS = [{"prompt": f"say {i}", "target": str(i)} for i in range(40)]
CHOICES = [{"question_stem": f"q{i}", "choices": {"text": list("abcd")}, "answerKey": "A"} for i in range(30)]
TRUTHS = [{"question": f"q{i}", "answer": True} for i in range(30)]
NUMBERS = [{"question": f"q{i}", "answer": f"so\n#### {i}"} for i in range(30)]
HISTORIES = [{"user": i, "items": [1 + (i + j) % 9 for j in range(6)]} for i in range(8)]
FEW_ITEMS = (
    *("data.benchmarks.lastfm.items=9", "data.benchmarks.lastfm.cutoffs=[2]", "evaluation.ranking_beams=4"),
    "data.benchmarks.lastfm.metric=ndcg@2",
)
KINDS = {  # the group, its good rows, its files and what the few rows need
    "jsonl": (ROWS, ("train", "test"), ()),
    "openbookqa": (CHOICES, ("train", "validation", "test"), ()),
    "boolq": (TRUTHS, ("train", "test"), ()),
    "gsm8k": (NUMBERS, ("train", "test"), ()),
    "lastfm": (HISTORIES, ("interactions",), FEW_ITEMS),
}


def lines(rows: list) -> str:
    """JSON lines; text is a line as it is."""
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def file(content: str | bytes, *says: str):
    """A whole train file of `jsonl`."""
    return "jsonl", content, (), says


def row(kind: str, bad: object, *says: str):
    """A bad row behind the good ones of the first file."""
    return kind, lines([*KINDS[kind][0], bad]), (), says


def setting(kind: str, override: str, *says: str):
    """Good rows, and a setting that does not fit them."""
    return kind, None, (override,), says


def choice(**changes) -> dict:
    """A row of options with changes."""
    return CHOICES[0] | changes


def history(items: object, user: object = 9) -> dict:
    """A row of interactions."""
    return {"user": user, "items": items}


DATA = {
    "not UTF-8": file(b'{"prompt": "\xff\xfe", "target": "x"}\n', "train.jsonl, line 1", "not JSON", "Mend"),
    "UTF-16": file(lines(ROWS).encode("utf-16"), "train.jsonl, line 1", "not JSON"),
    "old Mac line ends": file(lines(ROWS).replace("\n", "\r"), "line 1", "not JSON"),
    "compressed": file(gzip.compress(b"x" * 99), "train.jsonl, line", "not JSON"),
    "nothing but NUL": file(b"\0" * 100, "line 1", "not JSON"),
    "empty file": file("", "train.jsonl", "no rows"),
    "blank lines only": file("\n \n\n", "train.jsonl", "no rows"),
    "one array": file(json.dumps(ROWS), "line 1", "an object"),
    "pretty-printed": file(json.dumps(ROWS, indent=1), "line 1", "not JSON"),
    "CSV": file("prompt,target\na,b\n", "line 1", "not JSON"),
    "text": row("jsonl", '"abc"', "line 41", "an object"),
    "number": row("jsonl", "5", "line 41", "an object"),
    "null": row("jsonl", "null", "line 41", "an object"),
    "array": row("jsonl", "[1]", "line 41", "an object"),
    "NUL in a line": row("jsonl", '{"prompt": "a\0b", "target": "x"}', "line 41", "not JSON"),
    "nested too deep": row("jsonl", "[" * 200_000, "line 41", "not JSON"),
    "endless number": row("jsonl", f'{{"prompt": {"1" * 5000}, "target": "x"}}', "line 41", "not JSON"),
    "key twice": row("jsonl", '{"prompt": "a", "prompt": "b", "target": "x"}', "line 41", "'prompt' comes twice"),
    "target is null": row("jsonl", {"prompt": "p", "target": None}, "row 41", "target is None", "a text"),
    "target is a list": row("jsonl", {"prompt": "p", "target": [1]}, "row 41", "target is [1]", "a text"),
    "target is an object": row("jsonl", {"prompt": "p", "target": {"a": 1}}, "row 41", "a text"),
    "target is NaN": row("jsonl", '{"prompt": "p", "target": NaN}', "row 41", "target is nan"),
    "target is infinite": row("jsonl", '{"prompt": "p", "target": -Infinity}', "row 41", "target is -inf"),
    "target too large": row("jsonl", '{"prompt": "p", "target": 1e999}', "row 41", "target is inf"),
    "target is missing": row("jsonl", {"prompt": "p"}, "row 41", "no column 'target'"),
    "empty prompt": row("jsonl", {"prompt": "", "target": "x"}, "row 41", "the prompt is empty"),
    "blank target": row("jsonl", {"prompt": "x", "target": " \n"}, "row 41", "the target is empty"),
    "half a character": row("jsonl", '{"prompt": "\\ud800", "target": "x"}', "row 41", "surrogates", "mend"),
    "huge line": (
        *("jsonl", lines([*ROWS, {"prompt": "x" * 300_000, "target": "x"}]), ("data.max_source_length=256",)),
        ("row 41", "300000 tokens", "data.overflow=drop|truncate"),
    ),
    "nested path missing": setting("jsonl", "data.benchmarks.jsonl.prompt_column=q.text", "no column 'q'"),
    "nested path in a text": setting("jsonl", "data.benchmarks.jsonl.prompt_column=prompt.text", "no 'prompt.text'"),
    "column is null": setting("jsonl", "data.benchmarks.jsonl.prompt_column=null", "prompt_column=None", "a text"),
    "column is a number": setting("jsonl", "data.benchmarks.jsonl.prompt_column=5", "prompt_column=5", "a text"),
    "template is null": setting("jsonl", "data.benchmarks.jsonl.target=null", "target=None", "a text"),
    "template is a number": setting("jsonl", "data.benchmarks.jsonl.prompt=5", "prompt=5", "a text"),
    "negative answer": setting("jsonl", "data.benchmarks.jsonl.max_new_tokens=-1", "max_new_tokens=-1", "at least 1"),
    "version is text": setting("jsonl", "+data.benchmarks.jsonl.version=x", "version='x'", "whole number"),
    "no validation rows": setting("jsonl", "data.validation_size=0", "data.validation_size=0", "at least 1"),
    "less than none for validation": setting("jsonl", "data.validation_size=-0.1", "validation_size=-0.1", "0.1"),
    "all rows for validation": setting("jsonl", "data.validation_size=1.5", "data.validation_size=1.5", "leave 1"),
    "validation is not a number": setting("jsonl", "data.validation_size=nan", "validation_size=nan", "0.1"),
    "validation is null": setting("jsonl", "data.validation_size=null", "validation_size=None", "0.1"),
    "validation is a flag": setting("jsonl", "data.validation_size=true", "validation_size=True", "0.1"),
    "path is a file": setting("jsonl", "data.path=<file>", "<file>", "data.path is the folder"),
    "path is an empty folder": setting("jsonl", "data.path=<empty>", "does not exist", "data.path is the folder"),
    "label out of range": row("openbookqa", choice(answerKey="E"), "row 31", "'E'", "A to D"),
    "label is null": row("openbookqa", choice(answerKey=None), "row 31", "answerKey is None", "A to D"),
    "label is a number": row("openbookqa", choice(answerKey=1), "row 31", "answerKey is 1", "A to D"),
    "too many options": row("openbookqa", choice(choices={"text": list("abcde")}), "row 31", "5 options", "4"),
    "too few options": row("openbookqa", choice(choices={"text": ["a", "b"]}), "row 31", "2 options", "4"),
    "options elsewhere": row("openbookqa", choice(choices=["a"]), "row 31", "no 'choices.text'"),
    "option is null": row("openbookqa", choice(choices={"text": ["a", "b", "c", None]}), "row 31", "choices.text"),
    "option is NaN": row("openbookqa", choice(choices={"text": ["a", "b", "c", float("nan")]}), "row 31", "nan"),
    "question is null": row("openbookqa", choice(question_stem=None), "row 31", "question_stem is None"),
    "no options": row("openbookqa", {"question_stem": "q", "answerKey": "A"}, "row 31", "no column 'choices'"),
    "label kind": setting("openbookqa", "data.benchmarks.openbookqa.label=number", "zero_based", "'number'"),
    "option column is text": setting(
        *("openbookqa", "data.benchmarks.openbookqa.option_columns=choices.text"),
        *("option_columns='choices.text'", "a list"),
    ),
    "no option column": setting("openbookqa", "data.benchmarks.openbookqa.option_columns=[]", "option_columns=[]"),
    "one option": setting("openbookqa", "data.benchmarks.openbookqa.option_count=1", "option_count=1", "at least 2"),
    "options are text": setting("openbookqa", "data.benchmarks.openbookqa.option_count=many", "option_count='many'"),
    "options without name": setting("openbookqa", "+data.benchmarks.openbookqa.option_name=''", "option_name=''"),
    "label column is null": setting("openbookqa", "data.benchmarks.openbookqa.label_column=null", "label_column=None"),
    "no answer in the target": setting("openbookqa", "data.benchmarks.openbookqa.target=' x'", "lacks '{answer}'"),
    "heading is a number": setting("openbookqa", "+data.benchmarks.openbookqa.heading_column=5", "heading_column=5"),
    "truth is text": row("boolq", {"question": "q", "answer": "yes"}, "row 31", "'yes'", "a boolean"),
    "truth is a number": row("boolq", {"question": "q", "answer": 1}, "row 31", "answer is 1", "a boolean"),
    "truth is null": row("boolq", {"question": "q", "answer": None}, "row 31", "answer is None", "a boolean"),
    "no number": row("gsm8k", {"question": "q", "answer": "so #### many"}, "row 31", "no number"),
    "number is null": row("gsm8k", {"question": "q", "answer": None}, "row 31", "answer is None"),
    "number is empty": row("gsm8k", {"question": "q", "answer": ""}, "row 31", "no number"),
    "number is NaN": row("gsm8k", '{"question": "q", "answer": NaN}', "row 31", "nan"),
    "question is NaN": row("gsm8k", '{"question": NaN, "answer": "#### 1"}', "row 31", "question is nan"),
    "broken expression": setting("gsm8k", "data.benchmarks.gsm8k.remove='('", "remove='('", "not a valid regular"),
    "empty marker": setting("gsm8k", "data.benchmarks.gsm8k.marker=''", "lacks ''"),
    "separator is a number": setting("gsm8k", "data.benchmarks.gsm8k.split_on=5", "split_on=5", "a text"),
    "user twice": row("lastfm", history([1, 2, 3], user=0), "row 9", "user 0 already has row 1"),
    "short history": row("lastfm", history([1, 2]), "row 9", "2 items", "at least 3"),
    "item twice": row("lastfm", history([1, 2, 2]), "row 9", "item 2 twice"),
    "item 0": row("lastfm", history([1, 2, 0]), "row 9", "items holds 0", "from 1"),
    "half an item": row("lastfm", history([1, 2, 1.5]), "row 9", "items holds 1.5", "whole numbers"),
    "item is text": row("lastfm", history([1, 2, "3"]), "row 9", "items holds '3'", "whole numbers"),
    "item is NaN": row("lastfm", history([1, 2, float("nan")]), "row 9", "items holds nan", "whole numbers"),
    "item of no number": row("lastfm", history([1, 2, 99]), "row 9", "items holds 99", "raise it"),
    "items are text": row("lastfm", history("1 2 3"), "row 9", "items is '1 2 3'", "a list"),
    "items are null": row("lastfm", history(None), "row 9", "items is None", "a list"),
    "no items": row("lastfm", {"user": 9}, "row 9", "no column 'items'"),
    "no user": row("lastfm", {"items": [1, 2, 3]}, "row 9", "no column 'user'"),
    "user is null": row("lastfm", history([1, 2, 3], user=None), "row 9", "user is None"),
    "user is a list": row("lastfm", history([1, 2, 3], user=[1]), "row 9", "user is [1]"),
    "cutoff is a number": setting("lastfm", "data.benchmarks.lastfm.cutoffs=5", "cutoffs=5", "a list"),
    "no cutoffs": setting("lastfm", "data.benchmarks.lastfm.cutoffs=[]", "cutoffs is []", "positive numbers"),
    "falling cutoffs": setting("lastfm", "data.benchmarks.lastfm.cutoffs=[5,2]", "cutoffs is [5, 2]", "rise"),
    "no history": setting("lastfm", "data.benchmarks.lastfm.history=0", "history is 0", "at least 1"),
    "item count is text": setting("lastfm", "data.benchmarks.lastfm.items=many", "items='many'", "whole number"),
    "unknown index": setting("lastfm", "data.benchmarks.lastfm.index=alphabetic", "'alphabetic'", "random"),
    "unknown metric": setting("lastfm", "data.benchmarks.lastfm.metric=accuracy", "'accuracy'", "hit@2"),
    "title is null": setting("lastfm", "data.benchmarks.lastfm.title=null", "title=None", "a text"),
}

MARK = "executed"
HOSTILE = """
open({mark!r}, "w").close()
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
class Evil(PreTrainedConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM): ...
class EvilTokenizer(PreTrainedTokenizerFast): ...
"""
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def write(name: str, content: str | bytes):
    """Replace a file of a folder."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(*names: str):
    """Remove files of a folder."""
    return lambda folder: [(folder / name).unlink() for name in names]


def edit_json(name: str, **changes):
    """Change values of a JSON file, `a__b` inside `a`; None removes one."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        for key, value in changes.items():
            *above, last = key.split("__")
            node = values
            for part in above:
                node = node[part]
            node[last] = value
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


def set_version(version: str | None):
    """Let another version have made a run; None is one that did not say so yet."""

    def change(folder: Path) -> None:
        config = OmegaConf.load(folder / "config.yaml")
        assert config.pop("version") == __version__
        OmegaConf.save({**config} if version is None else {**config, "version": version}, folder / "config.yaml")

    return change


def edit_weights(change, name: str = "model.safetensors"):
    """Change tensors of a safetensors file."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return edit


def halve(name: str):
    """Cut a file in the middle."""
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def hostile(change, place: str = ""):
    """Put Python code into the folder, and a change that asks for it."""

    def both(folder: Path) -> None:
        (folder / place / "evil.py").write_text(HOSTILE.format(mark=str(folder / MARK)))
        change(folder)

    return both


def bomb(zipped: bool):
    """Weights as a pickle that runs a command, plain or in torch's archive."""

    def place(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        charge = Bomb(folder / MARK)
        if zipped:
            torch.save({"weight": charge}, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(charge))

    return place


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    """Damage one entry of the first weight."""
    tensors[min(tensors)].view(-1)[0] = float("nan")


AUTO = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel"}
AUTO_TOKENIZER = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
MODELS = {  # a change to a good folder of a small Llama
    "no config.json": (remove("config.json"), ("config.json",)),
    "config.json is no JSON": (write("config.json", "{"), ("not a valid JSON file",)),
    "config.json is empty": (write("config.json", ""), ("not a valid JSON file",)),
    "config.json is an array": (write("config.json", "[]"), ("config.json",)),
    "config.json is binary": (write("config.json", b"\xff\xfe\0"), ("not a valid JSON file",)),
    "unknown family": (edit_json("config.json", model_type="evil"), ("evil",)),
    "family is a number": (edit_json("config.json", model_type=5), ("`5`",)),
    "another family": (edit_json("config.json", model_type="mamba"), ("'mamba' is not supported",)),
    "no family": (edit_json("config.json", model_type=None, architectures=None), ("model_type",)),
    "width is text": (edit_json("config.json", hidden_size="big"), ("hidden_size",)),
    "negative width": (edit_json("config.json", hidden_size=-16), (".path=", "negative dimension -16")),
    "heads do not divide": (edit_json("config.json", num_key_value_heads=3), ("num_key_value_heads=3", "divisor")),
    "another width": (edit_json("config.json", hidden_size=32), ("shape", "config.json", "do not belong together")),
    "fewer words": (edit_json("config.json", vocab_size=100), ("259 tokens", "100 rows")),
    "code of an unknown family": (
        hostile(edit_json("config.json", model_type="evil", auto_map=AUTO)),
        ("custom code",),
    ),
    "code beside a known family": (hostile(edit_json("config.json", auto_map=AUTO)), ("auto_map", "never run")),
    "code of a tokenizer": (
        hostile(edit_json("tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=AUTO_TOKENIZER)),
        ("custom code",),
    ),
    "code beside a known tokenizer": (
        hostile(edit_json("tokenizer_config.json", auto_map=AUTO_TOKENIZER)),
        ("auto_map", "never run"),
    ),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), ("AutoTokenizer cannot read it",)),
    "tokenizer is no JSON": (write("tokenizer.json", "{"), ("AutoTokenizer cannot read it",)),
    "tokenizer config is no JSON": (write("tokenizer_config.json", "{"), ("AutoTokenizer cannot read it",)),
    "no end token": (edit_json("tokenizer_config.json", eos_token=None, pad_token=None), ("no end token",)),
    "no weights": (remove("model.safetensors"), ("no file named model.safetensors",)),
    "half of the weights": (halve("model.safetensors"), ("cannot read it",)),
    "empty weights": (write("model.safetensors", b""), ("cannot read it",)),
    "weights are text": (write("model.safetensors", "x" * 500), ("cannot read it",)),
    "a weight is NaN": (edit_weights(not_a_number), ("model.embed_tokens.weight", "not finite")),
    "a weight is infinite": (
        edit_weights(lambda tensors: tensors[WEIGHT].fill_(float("inf"))),
        (WEIGHT, "not finite"),
    ),
    "a weight of another shape": (
        edit_weights(lambda tensors: tensors.update({WEIGHT: torch.zeros(3, 3)})),
        (WEIGHT, "(3, 3)", "(16, 16)"),
    ),
    "a weight is missing": (edit_weights(lambda tensors: tensors.pop(WEIGHT)), (WEIGHT, "missing")),
    "a pickle bomb": (bomb(zipped=False), ("pickle", "never run")),
    "a pickle bomb in an archive": (bomb(zipped=True), ("pickle", "never run")),
    "an index that leaves the folder": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {WEIGHT: "../../x"}}))(
                folder
            ),
        ),
        ("cannot read it",),
    ),
}
EVALUATIONS = {  # options of eval.py; <run> is a finished run
    "nothing to evaluate": ([], ("give run=<run dir>",)),
    "no such run": (["run=/no/such"], ("run=/no/such", "a finished training run")),
    "run is a file": (["run=<file>"], ("run=<file>", "a finished training run")),
    "run elsewhere": (["run=../../x"], ("run=../../x", "a finished training run")),
    "run is empty": (["run=<empty>"], ("run=<empty>", "a finished training run")),
    "a run and a Copilot": (["run=<run>", "copilot.path=<run>/export"], ("give run=<run dir>",)),
    "a Pilot alone": (["pilot.path=<run>/export"], ("give run=<run dir>",)),
    "no such Copilot": (["pilot.path=<run>/export", "copilot.path=/no/such"], ("copilot.path=/no/such",)),
    "no such Pilot": (["pilot.path=/no/such", "copilot.path=<run>/export"], ("pilot.path=/no/such",)),
    "negative λ": (["run=<run>", "fusion.weight=-1"], ("fusion.weight=-1", "positive")),
    "λ is text": (["run=<run>", "fusion.weight=x"], ("fusion.weight=x", "a number, a list")),
    "fusion space": (["run=<run>", "fusion.space=log"], ("fusion.space=log", "probability, logits")),
    "feedback": (["run=<run>", "fusion.feedback=x"], ("fusion.feedback=x", "observed, own")),
    "modes": (["run=<run>", "evaluation=greedy", "evaluation.modes=[x]"], ("evaluation.modes=['x']",)),
    "likelihood": (["run=<run>", "evaluation=greedy", "evaluation.modes=[likelihood]"], ("add generation",)),
    "batch": (["run=<run>", "evaluation=greedy", "evaluation.batch_size=0"], ("evaluation.batch_size=0",)),
    "data without a path": (["run=<run>", "data=jsonl"], ("data.path=<folder>",)),
    "data elsewhere": (["run=<run>", "data=jsonl", "data.path=/no/such"], ("/no/such/test.jsonl", "does not exist")),
    "run folder is a file": (["run=<run>", "paths.run_dir=<file>"], ("paths.run_dir=<file>", "is a file")),
    "a key that nothing reads": (["run=<run>", "+foo=1"], ("foo=1: nothing reads this key", "leave it out")),
    "a key that is elsewhere": (["run=<run>", "+evaluation.beams=1"], ("evaluation.beams=1", "evaluation.num_beams?")),
    "a key of the run's data": (["run=<run>", "+data.benchmarks.x.version=2"], ("data.benchmarks={", "data=<name>")),
    "a key of the run's Pilot": (["run=<run>", "+pilot.dtype=bfloat16"], ("pilot.dtype=bfloat16: nothing reads",)),
    "beams of the run's own decoding": (["run=<run>", "evaluation.num_beams=0"], ("evaluation.num_beams=0",)),
    "unknown key": (["run=<run>", "nope=3"], ("nope", "not in struct")),
    "unknown data": (["run=<run>", "data=nope"], ("data/nope", "gsm8k")),
}
EXPORTS = {  # a change to a finished run
    "config is no JSON": (write("export/config.json", "{"), ("not a valid JSON file",)),
    "config of another model": (edit_json("export/config.json", model_type="t5"), ("'t5'", "no export of ours")),
    "unknown fusion": (edit_json("export/config.json", fusion={"_target_": "no.such.Rule"}), ("no.such.Rule",)),
    "negative λ": (edit_json("export/config.json", weight=-1), ("weight=-1",)),
    "unknown feedback": (
        edit_json("export/config.json", feedback="x"),
        ("fusion.feedback=x: use one of observed, own",),
    ),
    "unknown Pilot": (edit_json("export/config.json", pilot__model_type="evil"), ("evil",)),
    "Pilot of another width": (edit_json("export/config.json", pilot__d_model=32), ("shape",)),
    "Copilot of another width": (edit_json("export/config.json", copilot__pilot_width=7), ("weight",)),
    "unknown pattern": (edit_json("export/config.json", copilot__pattern=9), ("pattern=9",)),
    "Copilot is text": (edit_json("export/config.json", copilot="x"), ("cannot read it",)),
    "Copilot is gone": (edit_json("export/config.json", copilot=None), ("copilot.", "do not belong together")),
    "code of a config": (
        hostile(edit_json("export/config.json", model_type="evil", auto_map=AUTO), "export"),
        ("custom code",),
    ),
    "code beside the config": (hostile(edit_json("export/config.json", auto_map=AUTO), "export"), ("never run",)),
    "code of a tokenizer": (
        hostile(
            edit_json("export/tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=AUTO_TOKENIZER),
            "export",
        ),
        ("custom code",),
    ),
    "no tokenizer": (remove("export/tokenizer.json"), ("AutoTokenizer cannot read it",)),
    "tokenizer is no JSON": (write("export/tokenizer.json", "{"), ("AutoTokenizer cannot read it",)),
    "no weights": (remove("export/model.safetensors"), ("model.safetensors",)),
    "half of the weights": (halve("export/model.safetensors"), ("cannot read it",)),
    "a weight is NaN": (edit_weights(not_a_number, "export/model.safetensors"), ("not finite",)),
    "a weight is missing": (
        edit_weights(lambda tensors: tensors.pop(min(tensors)), "export/model.safetensors"),
        ("missing",),
    ),
    "config.yaml is no YAML": (write("config.yaml", "{"), ("config.yaml", "cannot be read")),
    "config.yaml is a list": (write("config.yaml", "- 1\n"), ("config.yaml", "not the config of a run")),
    "config.yaml is empty": (write("config.yaml", ""), ("config.yaml", "not the config of a run")),
    "config.yaml runs code": (
        write("config.yaml", "a: !!python/object/apply:os.system ['touch executed']\n"),
        ("config.yaml", "cannot be read"),
    ),
    "made by an older version": (
        set_version(None),
        ("a version before 0.2.0", f"this is tcopilot {__version__}", "evaluate it with the version that made it"),
    ),
    "made by another version": (set_version("0.9.1"), ("made by version 0.9.1", "evaluate it with tcopilot 0.9.1")),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What the cases refer to: a file, an empty folder, a small Llama and a finished run."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    tokenizer, small = byte_tokenizer(), {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": len(tokenizer)}
    config = LlamaConfig(hidden_size=16, intermediate_size=32, tie_word_embeddings=True, **small, **special)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    composed.train(folder / "run", *composed.SMALL, "fusion.weight=[0,1]")
    return folder


@pytest.fixture
def placed(stock):
    """Put the places of the stock into a text."""

    def place(text: str) -> str:
        for name in ("file", "empty", "run"):
            text = text.replace(f"<{name}>", f"{stock}/{name}") if f"<{name} dir>" not in text else text
        return text

    return place


@pytest.fixture
def untrained(monkeypatch):
    """Fail a test that gets as far as a round; the estimate of memory runs one too, without weights."""
    monkeypatch.setattr(run, "budget", lambda *_: None)
    monkeypatch.setattr(TCopilotModule, "training_step", lambda *_: pytest.fail("a round was trained"))


@pytest.fixture
def refusal(capsys, tmp_path, placed):
    """Compose and run as the program does, Hydra's handling of errors included; return the one message."""

    def attempt(*overrides: str, name: str = "train") -> str:
        overrides = tuple(map(placed, overrides))
        own = any(text.startswith("paths.run_dir=") for text in overrides)
        capsys.readouterr()

        def program() -> None:
            cfg = composed.compose_config(*overrides, *([] if own else [f"paths.run_dir={tmp_path}/out"]), name=name)
            (run.train if name == "train" else run.evaluate)(cfg)

        with pytest.raises(SystemExit) as left:
            run_and_report(program)
        printed = capsys.readouterr()
        assert left.value.code == 1
        assert "Traceback" not in printed.err + printed.out
        assert "\nerror:" not in printed.err
        assert not (tmp_path / "out" / "export").exists()
        return printed.err

    return attempt


def check(message: str, says: tuple[str, ...], placed) -> None:
    """One block of problems, with all that it must say."""
    assert message.startswith("error: ")
    assert "\n    " not in message
    for part in map(placed, says):
        assert part in message


@pytest.mark.parametrize("name", composed.sampled(CONFIGS))
def test_a_bad_config_is_refused(name, refusal, placed, untrained):
    overrides, says = CONFIGS[name]
    check(refusal(*composed.SMALL, *overrides), says, placed)


@pytest.mark.parametrize("name", HYDRA)
def test_what_hydra_refuses_is_one_message_too(name, refusal, untrained):
    overrides, says = HYDRA[name]
    message = refusal(*overrides)
    for part in says:
        assert part in message


@pytest.mark.parametrize("name", composed.sampled(DATA))
def test_bad_data_is_refused(name, refusal, placed, tmp_path, untrained):
    kind, content, overrides, says = DATA[name]
    rows, files, more = KINDS[kind]
    folder = tmp_path / "rows"
    folder.mkdir()
    for file_name in files:
        (folder / f"{file_name}.jsonl").write_text(lines(rows))
    if content is not None:
        write(f"{files[0]}.jsonl", content)(folder)
    message = refusal(f"data={kind}", f"data.path={folder}", "debug=limit", *more, *overrides)
    check(message, says, placed)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.mkdir(), ("train.jsonl does not exist",)),
        (lambda path: path.symlink_to(path.name), ("train.jsonl does not exist",)),
        (lambda path: path.symlink_to("/proc/self/mem"), ("train.jsonl cannot be read",)),
    ],
    ids=["a folder", "a link to itself", "a file that cannot be read"],
)
def test_a_data_file_that_is_none_is_refused(make, says, refusal, placed, tmp_path, untrained):
    if not Path("/proc/self/mem").exists():
        pytest.skip("no /proc on this system")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "test.jsonl").write_text(lines(ROWS))
    make(tmp_path / "rows" / "train.jsonl")
    check(refusal("data=jsonl", f"data.path={tmp_path}/rows", "debug=limit"), says, placed)


@pytest.mark.parametrize("name", composed.sampled(MODELS))
def test_a_bad_model_folder_is_refused_and_never_run(name, refusal, placed, stock, tmp_path, untrained):
    change, says = MODELS[name]
    shutil.copytree(stock / "llama", tmp_path / "model")
    change(tmp_path / "model")
    message = refusal(*composed.SMALL, f"pilot.path={tmp_path}/model")
    assert not (tmp_path / "model" / MARK).exists()
    check(message, says, placed)


@pytest.mark.parametrize("name", ["a weight is NaN", "half of the weights", "a pickle bomb"])
def test_a_bad_donor_is_refused(name, refusal, placed, stock, tmp_path, untrained):
    change, says = MODELS[name]
    shutil.copytree(stock / "llama", tmp_path / "model")
    change(tmp_path / "model")
    donor = f"copilot.path={tmp_path}/model"
    message = refusal(*composed.SMALL, f"pilot.path={stock}/llama", donor)
    assert not (tmp_path / "model" / MARK).exists()
    check(message, (donor, *says), placed)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_bad_options_of_an_evaluation_are_refused(name, refusal, placed):
    overrides, says = EVALUATIONS[name]
    message = refusal(*overrides, name="eval")
    for part in map(placed, says):
        assert part in message


def read(run_dir: Path) -> None:
    """Read all of a finished run."""
    build.read_config(run_dir / "config.yaml", f"run={run_dir}")
    run = RunDirectory(run_dir)
    config, _ = build.read_export(run)
    build.load_export(run, config)


@pytest.fixture
def damaged(stock, tmp_path, monkeypatch):
    """Copy the finished run and change it."""
    monkeypatch.chdir(tmp_path)

    def make(change) -> Path:
        shutil.copytree(stock / "run", tmp_path / "damaged")
        change(tmp_path / "damaged")
        return tmp_path / "damaged"

    return make


@pytest.mark.parametrize("name", EXPORTS)
def test_a_damaged_run_cannot_be_read(name, damaged, tmp_path):
    change, says = EXPORTS[name]
    folder = damaged(change)
    with pytest.raises((ConfigError, ModelSourceError)) as refused:
        read(folder)
    assert not list(tmp_path.rglob(MARK))
    for part in (str(folder), *says):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run=5"], "run=5: no export/config.json there"),
        (["run=[1]"], "no export/config.json there"),
        (["run=<whole>", "paths.run_dir=null"], "paths.run_dir=None: give the folder"),
        (["run=<whole>", "paths.run_dir=/proc/x"], "paths.run_dir=/proc/x: "),
        (["run=<broken>"], "results.json: not JSON"),
    ],
)
def test_odd_values_of_an_evaluation_are_refused(overrides, says, damaged, refusal):
    whole = damaged(lambda _: None)
    if "run=<broken>" in overrides:
        (whole / "results.json").write_text("{")
    given = [value.replace("<whole>", str(whole)).replace("<broken>", str(whole)) for value in overrides]
    assert says in refusal(*given, name="eval")


@pytest.mark.parametrize("resume", ["5", "[1]"])
def test_a_run_to_resume_that_is_no_text_is_refused(resume, refusal):
    assert "no config.yaml there" in refusal(f"resume={resume}")


def test_a_whole_run_can_be_read(damaged):
    read(damaged(lambda _: None))


@pytest.mark.parametrize("name", composed.sampled(EXPORTS))
def test_the_evaluation_of_a_damaged_run_is_refused(name, damaged, refusal, placed):
    change, says = EXPORTS[name]
    check(refusal(f"run={damaged(change)}", name="eval"), says, placed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: shutil.rmtree(folder / "checkpoints"), ("no checkpoint in",)),
        (remove("config.yaml"), ("no config.yaml",)),
        (set_version(None), ("a version before 0.2.0", "the version that made it")),
    ],
    ids=["no checkpoints", "no config", "an older version"],
)
def test_a_run_that_cannot_go_on_is_refused(change, says, damaged, refusal, placed, untrained):
    folder = damaged(change)
    check(refusal(f"resume={folder}"), (f"resume={folder}", *says), placed)


def accepted(monkeypatch, tmp_path: Path, *overrides: str) -> None:
    """Hold that a run gets as far as its models."""
    monkeypatch.setattr(run.build, "fused_model", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        run.train(composed.compose_config(*overrides, f"paths.run_dir={tmp_path}/out"))


@pytest.mark.parametrize(
    "content",
    [
        lines(ROWS).replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + lines(ROWS).encode(),
        lines(ROWS).rstrip("\n").encode(),
        lines([*ROWS, {"prompt": "a\0b", "target": "x"}]).encode(),
        b"\n\n" + lines(ROWS).encode() + b"  \n",
    ],
    ids=["Windows line ends", "a byte-order mark", "no last line end", "an escaped NUL", "blank lines"],
)
def test_files_of_other_systems_are_read(content, tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_bytes(content)
    (tmp_path / "test.jsonl").write_text(lines(ROWS))
    accepted(monkeypatch, tmp_path, "data=jsonl", f"data.path={tmp_path}", "debug=limit")


def test_without_a_progress_bar_its_callback_stays_away():
    cfg = composed.compose_config(*composed.SMALL, "trainer.enable_progress_bar=false", "paths.run_dir=x")
    trainer = make_trainer(cfg, make_callbacks(cfg), None, 4)
    assert trainer.progress_bar_callback is None


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_its_last_good_state(refusal, placed, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "budget", lambda *_: None)
    exploding = ["pilot.optimizer.lr=1e30", "pilot.clip=null", "callbacks.checkpoint.every_n_rounds=1"]
    message = refusal(*composed.SMALL, *exploding)
    check(
        message,
        ("pilot gradient norm nan", "pilot.optimizer.lr", f"Last good state: {tmp_path}/out/checkpoints/"),
        placed,
    )


def test_a_traceback_is_there_for_whoever_asks(capsys, tmp_path):
    cfg = composed.compose_config(*composed.SMALL, "rounds=0", "traceback=true", f"paths.run_dir={tmp_path}/out")
    with pytest.raises(SystemExit):
        run_and_report(lambda: run.train(cfg))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "overrides", "says"),
    [
        ("train.py", ["epochs=3"], "Key 'epochs' is not in struct"),
        ("train.py", ["pilot=tiny_t6"], "Could not find 'pilot/tiny_t6'"),
        (
            "train.py",
            [*composed.SMALL, "seed=-1", "+trainer.max_epochs=0"],
            "error: 2 problems in the config or data:",
        ),
        ("train.py", ["rounds=${nope}"], "error: 1 problem in the config or data:"),
        (
            "train.py",
            ["objective=null"],
            "objective=null: objective is a config group; leave it out, or",
        ),
        ("train.py", ["data=jsonl", "data.path=/no/such"], "/no/such/train.jsonl does not exist"),
        ("eval.py", ["run=/no/such"], "give the folder of a finished training run"),
    ],
    ids=["unknown key", "unknown group", "two problems", "reference", "no group", "no data", "no run"],
)
def test_the_programs_say_it_without_a_traceback(script, overrides, says, tmp_path):
    done = composed.forked(script, *overrides, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.rglob("export"))
