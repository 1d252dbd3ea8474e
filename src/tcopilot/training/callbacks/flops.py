"""What a run costs in floating-point operations, measured on the rounds themselves."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from tcopilot.data.batch import Batch
from tcopilot.processes import sum_over_processes

aten = torch.ops.aten
Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, *(_for_all_heads(shape, query) for shape in (key, value)))


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, *(_for_all_heads(shape, query) for shape in (key, value)))


def _for_all_heads(shape: Shape, query: Shape) -> Shape:
    """Give keys or values that heads share the shape of one copy per query head, since as much is computed."""
    return shape[0], query[1], *shape[2:]


ATTENTION = {  # torch 2.11 knows neither shared heads nor the attention of CPUs
    aten._scaled_dot_product_efficient_attention: aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_flash_attention: aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_cudnn_attention: aten._scaled_dot_product_cudnn_attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
FORMULAS = (  # from the shapes of arguments and result
    flop_registry
    | dict.fromkeys(ATTENTION, shape_wrapper(_attention))
    | dict.fromkeys(ATTENTION.values(), shape_wrapper(_attention_backward))
)
QUANTISED = {  # bitsandbytes' operations by name, as it may be absent; gradients use torch's own products
    "bitsandbytes::gemm_4bit": lambda inputs, weight, shape, *_, **__: 2 * inputs.numel() * shape[0],
    "bitsandbytes::int8_scaled_mm": lambda inputs, weight, *_, **__: 2 * inputs.numel() * len(weight),
    "bitsandbytes::int8_mixed_scaled_mm": lambda inputs, packed, weight, *_, **__: 2 * inputs.numel() * len(weight),
}


class FlopCounter(TorchDispatchMode):
    """Adds up what torch's formulas give for every operation inside it.

    `torch.utils.flop_counter.FlopCounterMode` also tells modules apart, by hooks that `torch.autograd.grad` refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch compile in this mode, and count the operations of compiled code."""
        return True

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        packet = operation._overloadpacket
        if (formula := FORMULAS.get(packet) or QUANTISED.get(packet._qualified_op_name)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class FlopCount(Callback):
    """Counts the operations of matrix products and attention in some rounds: passes, log, updates of both models.

    A counted round takes up to twice its time, so few are counted. Rounds differ in the lengths of their rows; the
    total is the counted operations per padded token, times the padded tokens of all rounds. Of `every_n_rounds` the
    middle one is counted.
    """

    per_rank = True

    def __init__(self, every_n_rounds: int = 100) -> None:
        self.every_n_rounds = every_n_rounds
        self._sums = {"flops": 0, "counted_tokens": 0, "tokens": 0}
        self._counter: FlopCounter | None = None

    def total(self) -> float | None:
        """Operations of all rounds so far, over all processes, which must all call this; None if none was counted."""
        flops, counted, tokens = sum_over_processes(
            torch.tensor(list(self._sums.values()), dtype=torch.float64)
        ).tolist()
        return flops / counted * tokens if counted else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start to count if this round is one to be counted."""
        every = min(self.every_n_rounds, pl_module.rounds)
        if pl_module.round % every == every // 2:
            self._counter = FlopCounter()
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add the round to the sums."""
        tokens = batch.padded_tokens
        self._sums["tokens"] += tokens
        if self._counter is not None:
            self._sums["flops"] += self._counter.flops
            self._sums["counted_tokens"] += tokens
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting a round that failed."""
        self._stop()

    def state_dict(self) -> dict[str, int]:
        """The sums so far."""
        return dict(self._sums)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the sums."""
        self._sums = dict(state_dict)

    def _stop(self) -> None:
        if self._counter is not None:
            counter, self._counter = self._counter, None
            counter.__exit__(None, None, None)
