"""What a run of several processes, among which a Pilot may be divided (`trainer.strategy=fsdp`), cannot have."""

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedConfig

from tcopilot.app.checks.recordings import fits_from_recording
from tcopilot.app.trainer import process_count
from tcopilot.data.module import TCopilotDataModule


def pilot_and_row_problems(cfg: DictConfig, pilot: PreTrainedConfig, data: TCopilotDataModule) -> Iterator[str]:
    """Refuse fewer validation rows than processes, each of which takes part in validation, and a quantised Pilot."""
    rows, processes, fits = len(data.rows_of("validation")), process_count(cfg), fits_from_recording(cfg)
    if (fits or cfg.trainer.limit_val_batches) and 0 < rows < processes:
        mend = "lower trainer.devices" if fits else "set trainer.limit_val_batches=0"  # a fit always validates
        yield (
            f"trainer.devices={cfg.trainer.devices} with {rows} validation rows for {processes} processes: each needs "
            f"one; raise data.validation_size, or {mend}"
        )
    if cfg.trainer.strategy == "fsdp" and getattr(pilot, "quantization_config", None) is not None:
        yield (
            f"trainer.strategy=fsdp with pilot.path={cfg.pilot.path}: quantised weights cannot be sharded; use "
            f"trainer=ddp, or a Pilot that is not quantised"
        )


def sharding_problems(cfg: DictConfig) -> Iterator[str]:
    """List the settings that contradict a divided Pilot."""
    if cfg.trainer.strategy != "fsdp":
        return
    given = "with trainer.strategy=fsdp"
    if process_count(cfg) == 1:
        yield (
            f"trainer.devices={cfg.trainer.devices} {given}: one process cannot shard the Pilot; give "
            f"trainer.devices=<2 or more>, or use trainer=gpu"
        )
    if fits_from_recording(cfg):
        yield f"pilot.frozen=true and copilot={cfg.copilot.kind} {given}: a recording is not sharded; use trainer=ddp"
    if cfg.compile is not False:
        yield f"compile={cfg.compile} {given}: sharded layers cannot be compiled; use compile=false"
    optimizer = str(OmegaConf.select(cfg, "pilot.optimizer._target_", default=""))
    if optimizer.startswith("bitsandbytes.") and not cfg.pilot.frozen:
        yield (
            f"pilot.optimizer._target_={optimizer} {given}: its 8-bit states cannot be sharded; use "
            f"optimizer@pilot.optimizer=adamw"
        )
    if cfg.data.eval_batch_size == 1:
        yield (
            f"data.eval_batch_size=1 {given}: all processes must run the Pilot equally often, so the last batch may "
            f"have to be split; use 2 or more"
        )
    if cfg.control is not None:
        yield (
            f"control={cfg.control} {given}: controls keep the run's own Pilot in memory beside the one that they "
            f"train; use control=null, and train a Pilot alone as a run of its own (copilot=none)"
        )
