"""Measure a run's memory before weights load: a round, validation and decoding on tensors that have shapes only.

There are no formulas, so the measure follows whatever models, losses and optimisers do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from tcopilot.app.memory.live_memory import LiveMemory
from tcopilot.app.trainer import FIXED, quiet_lightning
from tcopilot.data.batch import Batch
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.rounds import ABOUT_RECORD, LoggedRound
from tcopilot.models.caches import LEAST_ROOM
from tcopilot.models.families import skeleton
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.quantization import is_packed, packed_bytes, settings_of
from tcopilot.training.callbacks import MistakeLogCallback
from tcopilot.training.module import TCopilotModule
from tcopilot.training.sharding import kept_whole

aten = torch.ops.aten


@dataclass
class Load:
    """The largest shapes that pass through the models of one process."""

    rows: int  # of one forward pass of the Pilot in training
    source: int  # tokens of the longest prompt
    target: int  # tokens of the longest target
    parts: int = 1  # micro-batches of a round
    validation_rows: int = 0  # of one validation batch; 0 for none
    prompts: int = 1  # of one decoding pass
    copies: int = 1  # of each prompt in it: number of λ times beams
    answer: int = 0  # tokens of the longest answer; 0 if nothing is decoded


@dataclass
class Footprint:
    """Bytes on the device that trains, without the Mistake Log."""

    parameters: int  # of both models, buffers included
    gradients: int  # of all that is trained
    optimizer: int  # state of both optimisers
    training: int  # the peak of training
    decoding: int  # the peak of decoding, parameters included


def measure(
    make: Callable[[], TCopilotModule],
    load: Load,
    log: MistakeLog | None,
    precision: str = "32-true",
    on_gpu: bool = False,
    tied: bool = True,
    shards: int = 1,
) -> Footprint:
    """Run a round, a validation batch and a decoding step without memory, and count what they would take.

    Args:
        make: builds the module that would be trained; called where torch puts tensors on its meta device.
        load: the shapes.
        log: the run's log, of which storage and types are taken; it stays empty. None without a Copilot.
        precision: the Trainer's.
        on_gpu: count as on a GPU, where optimisers update all parameters at once.
        tied: whether input and output embeddings are one, which tensors without values cannot tell.
        shards: processes that the Pilot is divided among while it is trained.
    """
    if log is not None:
        log = _FullLog(1, storage=copy.deepcopy(log.storage), dtype=log.dtype)
    with _ShapesOnly(tied), torch.device("meta"):
        module = make()
    with FakeTensorMode(), _ShapesOnly(tied) as memory:
        _take_off_meta(module)
        parameters, trained = memory.live, [p for p in module.parameters() if p.requires_grad]
        trainer = _fit(module, load, log, precision, on_gpu, memory)
        training = memory.peak - (0 if log is None else log.nbytes)
        states = {p: _bytes(state.values()) for one in trainer.optimizers for p, state in one.state.items()}
        decoding = _decoding(module.model, load, memory) if load.answer else 0
    pilot = module.model.pilot
    divided = {*pilot.parameters()} - kept_whole(pilot)
    sizes = _bytes(divided), _bytes(divided.intersection(trained)), sum(states.get(weight, 0) for weight in divided)
    weights, gradients, state = (size - size // shards for size in sizes)  # what other processes hold
    # Gradients count in full at the peak, since it is not known how many of them exist by then.
    return Footprint(
        parameters - weights, _bytes(trained) - gradients, sum(states.values()) - state, training - weights - state,
        parameters + decoding,
    )  # fmt: skip


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _take_off_meta(module: nn.Module) -> None:
    """Mark parameters and buffers as CPU tensors, so that operations choose the kernels that they use on a CPU.

    Models are built on the meta device first, since adapters move what they wrap, which `FakeTensorMode` refuses.
    """
    made: dict[Tensor, Tensor] = {}
    for tensors in (tensors for part in module.modules() for tensors in (part._parameters, part._buffers)):
        for name, old in tensors.items():
            if old is not None and old not in made:
                new = torch.empty(old.shape, dtype=old.dtype)
                made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            tensors[name] = made.get(old)


class _ShapesOnly(LiveMemory):
    """Counts tensors without values, and returns fixed answers where code asks for a tensor's values."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self._tied = tied

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked several times an operation, and makes no tensor
        if func is aten._local_scalar_dense.default:
            return 1  # finite, true, a first row: nothing that is counted depends on it
        if func is aten.equal.default:
            return self._tied
        if func is aten.nonzero.default:
            func, args = aten.zeros.default, ([args[0].numel(), args[0].dim()],)  # all rows are as long as the longest
            kwargs = {"dtype": torch.int64, "device": "cpu"}
        if func is aten._unique2.default:
            func, args, kwargs = aten.clone.default, args[:1], {}  # no token is compared for two reasons
            return super().__torch_dispatch__(func, types, args, kwargs), *args, *args
        if func is aten.index.Tensor and args[1][-1].dtype == torch.bool:
            func, args = aten.clone.default, args[:1]  # cutting off padding that is not there
        return super().__torch_dispatch__(func, types, args, kwargs)


class _FullLog(MistakeLog):
    """A log whose records are all as long as the longest."""

    def _record(self, logged: LoggedRound, row: int) -> dict[str, Tensor]:
        return {name: rows[0] for name, rows in logged.tensors.items() if name not in ABOUT_RECORD}


def _fit(
    module: TCopilotModule, load: Load, log: MistakeLog | None, precision: str, on_gpu: bool, memory: LiveMemory
) -> Trainer:
    """Train one round and validate."""
    module.steps_per_round = 1  # further steps take less
    module.compile_backend = None  # what torch refuses to compile here it would never compile again
    module.log = module.log_dict = module.on_validation_epoch_end = lambda *_, **__: None  # no figures to report
    module._apply = lambda *_: module  # tensors without memory cannot be moved, as Lightning would
    module._sum_over_ranks = lambda value: value  # every process makes its own estimate
    module.micro_batch_size = load.rows

    def give_optimizers_state(trainer: Trainer, _: Any) -> None:
        """Create this state first, since all later rounds have it from their start."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if on_gpu and group.get("foreach", False) is None:
                    group["foreach"] = True  # torch's choice where parameters lie on a GPU
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        memory.reset_peak()

    callbacks: list[Callback] = [LambdaCallback(on_train_start=give_optimizers_state)]
    callbacks += [] if log is None else [MistakeLogCallback(log)]
    with quiet_lightning():
        trainer = Trainer(
            accelerator="cpu", devices=1, precision=precision, callbacks=callbacks, **FIXED, logger=False,
            limit_val_batches=int(load.validation_rows > 0), num_sanity_val_steps=0, enable_model_summary=False,
            enable_progress_bar=False,
        )  # fmt: skip
        # A third micro-batch would take what the second does, which is read while gradients of the first are held.
        batches = [_batch(rows, load) for rows in (load.rows * min(2, load.parts), load.validation_rows)]
        trainer.fit(module, *(DataLoader([batch], batch_size=None) for batch in batches))
    return trainer


def _batch(rows: int, load: Load) -> Batch:
    source, target = torch.zeros(rows, load.source).long(), torch.zeros(rows, load.target).long()
    ids = torch.zeros(rows).long()
    return Batch(source, source == 0, target, target == 0, ids, ids)


@torch.no_grad()
def _decoding(model: TCopilotModel, load: Load, memory: LiveMemory) -> int:
    """Return the peak of reading the prompts and of one step, beyond what is held now.

    The step allocates room for later columns. If an answer is longer than that room, the rest of it is read with the
    prompts.
    """
    model.eval()
    held = memory.live
    memory.reset_peak()
    prompts = torch.zeros(load.prompts * load.copies, load.source).long()
    known = prompts.new_zeros(len(prompts), max(0, load.answer - LEAST_ROOM))
    token, mask = prompts[:, :1], torch.ones_like(prompts)
    if model.config.is_encoder_decoder:
        given = {"attention_mask": mask, "decoder_input_ids": torch.cat([token, known], dim=1)}
        found = model(prompts, **given, use_cache=True, copies=load.copies)
        encoded = found.encoder_last_hidden_state.repeat_interleave(load.copies, dim=0)
        step = {"encoder_outputs": (encoded,), "attention_mask": mask, "decoder_input_ids": token}
    else:
        seen = torch.cat([mask, torch.ones_like(known)], dim=1)
        given = {"attention_mask": seen, "target_start": prompts.shape[1], "logits_to_keep": 1}
        found = model(torch.cat([prompts, known], dim=1), **given, use_cache=True, copies=load.copies)
        step = {"input_ids": token, "attention_mask": torch.cat([seen, token], dim=1)}
    step["past_key_values"] = found.past_key_values
    del found
    model(**step, use_cache=True)
    return memory.peak - held


def pack_layers(pilot: nn.Module, config: PreTrainedConfig, bits: str, dtype: torch.dtype) -> None:
    """Replace the layers that transformers would quantise for this config, beneath adapters too, by stand-ins.

    This is needed since bitsandbytes cannot compute on tensors without values.
    """
    plain = skeleton(config)
    AutoHfQuantizer.from_config(settings_of(bits, dtype), pre_quantized=False).preprocess_model(plain, device_map=None)
    names = {name for name, part in plain.named_modules() if is_packed(part)}
    for name, part in list(pilot.named_modules()):
        if name.removesuffix(".base_layer") in names and isinstance(part, nn.Linear):
            pilot.set_submodule(name, _PackedLinear(part, bits, dtype))


class _PackedLinear(nn.Module):
    """Holds as many bytes as a quantised layer, and needs as many more while it computes."""

    def __init__(self, layer: nn.Linear, bits: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.keeps_inputs = (layer.out_features, layer.in_features), dtype, bits == "8bit"
        self.weight = nn.Parameter(torch.empty(packed_bytes(bits, *self.shape), dtype=torch.uint8), False)
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        product = _Product.apply(inputs, self.shape, self.dtype, self.keeps_inputs)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """A product with a matrix that is unpacked only during the product, in both passes."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, shape: tuple[int, int], dtype: torch.dtype, keeps_inputs: bool) -> Tensor:
        ctx.save_for_backward(*([inputs] if keeps_inputs else []))
        ctx.unpack = lambda like: torch.empty(shape, dtype=dtype, device=like.device).to(like.dtype)
        return nn.functional.linear(inputs, ctx.unpack(inputs))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ ctx.unpack(gradient), None, None, None
