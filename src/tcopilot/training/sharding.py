"""FSDP2: weights, gradients and optimiser state of a Pilot, divided among the processes of a job.

A layer is gathered for its own forward and backward pass and freed after it. The Copilot, which is small beside
the Pilot and is read outside of forward passes, stays whole in every process.
"""

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from tcopilot.mistake_log.storage import is_frozen
from tcopilot.models.families import LAYERS
from tcopilot.processes import undivided


def kept_whole(pilot: PreTrainedModel) -> set[nn.Parameter]:
    """Weights that are not divided: a frozen embedding or head, through which the Mistake Log rebuilds X̃ and p̂."""
    ends = pilot.get_input_embeddings(), pilot.get_output_embeddings()
    return {parameter for end in ends if is_frozen(end) for parameter in end.parameters()}


class ShardedPilot:
    """Divides a Pilot in place, layer by layer, and can make a plain Pilot of its weights again.

    Args:
        pilot: a Pilot with the same weights in all processes.
        mesh: the processes, in one dimension.
    """

    def __init__(self, pilot: PreTrainedModel, mesh: DeviceMesh) -> None:
        shared = {id(part): part for part in (pilot.config, *pilot.parameters())}  # nothing is copied but modules
        self._plain, self._sharded = copy.deepcopy(pilot, shared), pilot
        kept = kept_whole(pilot)
        stacks = [
            part
            for name, part in pilot.named_modules()
            if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] in LAYERS
        ]
        for part in (*reversed([layer for stack in stacks for layer in stack]), pilot):  # inner parts come first
            divided = [p for p in part.parameters() if not isinstance(p, DTensor) and p not in kept]
            fully_shard(part, mesh=mesh, ignored_params=kept)
            for parameter in divided:  # frees the memory of the plain Pilot
                parameter.data = parameter.data.new_empty(0)

    def gathered(self) -> PreTrainedModel:
        """The plain Pilot with the weights of now, on the CPU of every process; all must call this."""
        for part in self._sharded.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        weights = dict(self._sharded.named_parameters())
        for name, parameter in self._plain.named_parameters():
            parameter.data = undivided(weights[name].detach()).cpu()
        return self._plain.train(self._sharded.training)


class ShardingStrategy(ModelParallelStrategy):
    """Lightning's strategy for modules that divide themselves, with the same states as any other run.

    States hold whole tensors, so the program's own checkpoints fit, and a run can resume with or without sharding.
    """

    restore_checkpoint_after_setup = False  # as other strategies do: by then the module has divided itself
    lightning_restore_optimizer = True  # by `load_optimizer_state_dict`

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights, whole in the first process; all processes must call this."""
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimiser, whole in the first process; all processes must call this."""
        return self._gathered(Strategy.optimizer_state(self, optimizer))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of the program's own."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each process its part of the weights."""
        own = self.lightning_module.state_dict()
        given = {name: _divided_as(own.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(given, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each process its part of the optimisers' states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _divided_as(parameters[number], value) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def teardown(self) -> None:
        """Let go of the optimisers, before the Pilot is gathered."""
        self._reset_optimizers_and_schedulers()
        super().teardown()

    def _gathered(self, value: Any) -> Any:
        """The value with whole tensors, on the CPU; only the first process, which saves them, keeps any."""
        if isinstance(value, dict):
            return {name: self._gathered(part) for name, part in value.items()}
        if isinstance(value, DTensor):
            full = undivided(value)
            return full.cpu() if self.is_global_zero else full.new_empty(0)
        return value


def _divided_as(like: Any, value: Any) -> Any:
    """Divide a whole tensor as `like`, of the same shape, is divided; anything else stays as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
