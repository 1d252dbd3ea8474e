"""A Pilot divided among two processes: what each holds, and the plain Pilot that comes back."""

from types import SimpleNamespace

import composed
import pytest
from processes import run_in_processes
from small_training import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from tcopilot.app.checks.sharding import pilot_and_row_problems
from tcopilot.processes import rank, sum_over_processes
from tcopilot.training.sharding import ShardedPilot


def division_job(folder):
    for family, frozen in (("llama", True), ("t5", False)):
        model = tiny_model(family, kind="head", depths=[1.0]) if frozen else tiny_model(family)
        pilot, kind = model.pilot, type(model.pilot)
        embedding = pilot.get_input_embeddings().weight.requires_grad_(not frozen)
        before = {name: weight.detach().clone() for name, weight in pilot.state_dict().items()}
        tied = pilot.get_output_embeddings().weight is embedding

        sharded = ShardedPilot(pilot, init_device_mesh("cpu", (2,)))
        assert isinstance(pilot.get_input_embeddings().weight, DTensor) is not frozen  # the log reads a frozen one
        divided = [weight for weight in pilot.parameters() if isinstance(weight, DTensor)]
        assert len(divided) >= len(list(pilot.parameters())) - 2
        held = sum(weight.to_local().numel() for weight in divided)
        total = sum(weight.numel() for weight in divided)
        assert held < 0.6 * total
        assert sum_over_processes(embedding.new_tensor(held)).item() == total
        if frozen:
            assert model.copilot.unembedding_VC.equal(before["lm_head.weight"])  # gathered, if it is divided

        again = sharded.gathered()
        assert type(again) is kind
        assert again.state_dict().keys() == before.keys()
        assert all(weight.equal(before[name]) for name, weight in again.state_dict().items())
        assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied
    (folder / str(rank())).touch()


@pytest.mark.slow
def test_each_process_holds_half_of_a_divided_pilot_and_gets_back_all_of_it(tmp_path):
    run_in_processes(division_job, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_quantised_pilots_and_processes_without_validation_rows_are_refused():
    data = SimpleNamespace(rows_of=lambda split: [{}])
    plain, quantised = LlamaConfig(), LlamaConfig(quantization_config={"quant_method": "bitsandbytes"})
    whole, divided = (composed.compose_config("trainer=two_ranks", *more) for more in ((), ("trainer.strategy=fsdp",)))
    (rows,) = pilot_and_row_problems(whole, quantised, data)
    assert "trainer.devices=2 with 1 validation rows for 2 processes" in rows
    assert "trainer.limit_val_batches=0" in rows
    assert list(pilot_and_row_problems(divided, plain, data)) == [rows]
    _, cannot = pilot_and_row_problems(divided, quantised, data)
    assert "quantised weights cannot be sharded" in cannot
    frozen = ["pilot=frozen", "pilot.path=a", "copilot=head", "trainer=two_ranks", "trainer.limit_val_batches=0"]
    (fit,) = pilot_and_row_problems(composed.compose_config(*frozen), plain, data)  # all of whose passes are validated
    assert fit.endswith("raise data.validation_size, or lower trainer.devices")
    data.rows_of = lambda split: [{}, {}]
    assert not list(pilot_and_row_problems(whole, quantised, data))
