import pytest
import torch
from family_models import of_families

from tcopilot import Copilot
from tcopilot.data.batch import PromptTargetCollator
from tcopilot.functional import token_errors
from tcopilot.models.copilot import PATTERNS
from tcopilot.models.families import input_embeddings
from tcopilot.models.kinds import empty_copilot
from tcopilot.models.log_attention import LogAttention
from tcopilot.models.modeling import fused_class
from tcopilot.models.states import StatePooler, trace_pilot
from tcopilot.training.error_statistics import correct_targets


@pytest.fixture
def teacher_forced(make_batch):
    """Hidden states, corrections and log p̂ of a Copilot on the Pilot's true errors."""

    def run(pilot, copilot, keep=False):
        states = trace_pilot(pilot, make_batch(pilot), copilot.pooler)
        log_probs = states.logits_BNV.detach().log_softmax(-1)
        errors = token_errors(log_probs.exp(), states.targets_BN)
        inputs = copilot.inputs(errors[:, :-1])
        hidden, _ = copilot(inputs, states.source_BMP, states.source_mask_BM, states.states_BNP, keep)
        return hidden, copilot.correct(hidden, log_probs), log_probs

    return run


@pytest.mark.parametrize("head", ["linear", "soft"])
@pytest.mark.parametrize("family", of_families())
def test_a_new_copilot_corrects_nothing(tiny_pilot, teacher_forced, family, head):
    pilot = tiny_pilot(family)
    _, corrections, _ = teacher_forced(pilot, Copilot.from_pilot(pilot, layers=2, head=head).eval())
    assert corrections.shape == (3, 5, 56)
    assert corrections.abs().max() < 1e-6


@pytest.mark.parametrize("family", ["t5", "bart", "llama", "qwen3", "gemma2"])
def test_positions_are_the_pilots_where_no_encoder_keeps_the_order(tiny_pilot, family):
    pilot, expected = tiny_pilot(family), "none" if family in ("t5", "bart") else "pilot"
    copilot = Copilot.from_pilot(pilot, layers=2)
    assert copilot.config.positions == copilot.config.to_dict()["positions"] == expected
    for given in ("none", "pilot"):
        assert Copilot.from_pilot(pilot, layers=2, positions=given).config.positions == given


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_padding_may_lie_beyond_the_last_learned_position(tiny_pilot, randomise, family):
    """A long prompt beside a long target: each row fits, and the columns of the batch do not."""
    pilot, collate = tiny_pilot(family, max_position_embeddings=24), PromptTargetCollator(0, "left")
    model = fused_class(False).from_pilot(pilot, layers=2)
    randomise(model.copilot)
    rows = [
        {"source_ids": [*range(3, 3 + prompt)], "target_ids": [*range(5, 5 + target)], "id": target, "benchmark": 0}
        for prompt, target in ((20, 4), (4, 20))
    ]
    _, together = correct_targets(model, collate(rows))
    for row, corrections in zip(rows, together, strict=True):
        _, alone = correct_targets(model, collate([row]))
        torch.testing.assert_close(corrections[: alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["linear", "soft"])
def test_a_new_copilot_learns_from_its_first_gradient(tiny_pilot, teacher_forced, head):
    pilot = tiny_pilot("llama")
    copilot = Copilot.from_pilot(pilot, layers=2, head=head)
    _, corrections, log_probs = teacher_forced(pilot, copilot)
    (corrections * log_probs).sum().backward()
    (parameter,) = copilot.head.parameters()
    assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("family", of_families())
def test_the_body_starts_from_the_donors_first_layers_name_by_name(tiny_pilot, family):
    pilot, donor = tiny_pilot(family), tiny_pilot(family, seed=7)
    copilot = Copilot.from_pilot(pilot, layers=3, donor=donor, pattern=1)
    given = donor.get_decoder().state_dict()
    own = copilot.body.state_dict()
    norms = {name: name.replace("self_attn.norm", "input_layernorm") for name in own}
    origin = {name: there.replace(".attention.", ".") for name, there in norms.items()}
    assert set(origin.values()) <= set(given)
    assert sum(name.endswith("self_attn.norm.weight") for name in own) == (0 if family in ("t5", "bart") else 1)
    for name, value in own.items():
        assert torch.equal(value, given[origin[name]]), name
    expected = "block.2." if family == "t5" else "layers.2."
    assert any(name.startswith(expected) for name in own)
    assert not any(name.startswith(expected.replace("2", "3")) for name in own)


@pytest.mark.parametrize("rows", [-2, 3])
@pytest.mark.parametrize("head", ["linear", "soft"])
def test_a_donor_with_other_padding_rows_reads_the_pilots_tokens(tiny_pilot, randomise, teacher_forced, head, rows):
    pilot = tiny_pilot("qwen2")
    vocab = pilot.config.vocab_size
    donor, tokens = tiny_pilot("qwen2", seed=7, width=16, vocab_size=vocab + rows), vocab - 4
    copilot = Copilot.from_pilot(pilot, layers=2, donor=donor, head=head, tokens=tokens)
    given = donor.get_input_embeddings().weight
    assert copilot.error_in.shape == (vocab, 16)
    assert torch.equal(copilot.error_in[:tokens], given[:tokens])
    assert copilot.error_in[vocab + rows :].abs().sum() == 0
    _, corrections, _ = teacher_forced(pilot, randomise(copilot))
    assert corrections.shape[-1] == vocab
    assert corrections.isfinite().all()
    for size in (None, vocab + rows + 1):
        with pytest.raises(ValueError, match="share the vocabulary"):
            Copilot.from_pilot(pilot, layers=2, donor=donor, tokens=size)


@pytest.mark.parametrize("family", of_families())
def test_the_copilots_weights_are_its_own(tiny_pilot, family):
    pilot = tiny_pilot(family)
    before = {name: value.clone() for name, value in pilot.state_dict().items()}
    copilot = Copilot.from_pilot(pilot, layers=2)
    with torch.no_grad():
        for parameter in copilot.parameters():
            parameter += 1.0
    for name, value in pilot.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("layers", [2, 3, 4, None])
@pytest.mark.parametrize("family", of_families())
def test_a_copilot_of_another_width_and_any_depth_reads_the_pilot(
    tiny_pilot, randomise, teacher_forced, family, layers
):
    pilot, donor = tiny_pilot(family, width=48), tiny_pilot(family, width=32)
    copilot = randomise(Copilot.from_pilot(pilot, layers=layers, donor=donor)).eval()
    assert len(copilot.body.block if family == "t5" else copilot.body.layers) == (layers or 4)
    hidden, corrections, _ = teacher_forced(pilot, copilot)
    assert hidden.shape == (3, 5, 32)
    assert corrections.isfinite().all()
    assert corrections.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("pattern", "log_layers", "layer_range"),
    [(1, [1, 3], "all"), (2, [0, 1, 2, 3], "all"), (3, [1, 3], "first_half"), (4, [1, 3], "second_half")],
)
def test_insertion_patterns_choose_log_layers_and_pooled_layers(tiny_pilot, pattern, log_layers, layer_range):
    copilot = Copilot.from_pilot(tiny_pilot("llama"), pattern=pattern, pooling="max")
    found = [i for i, layer in enumerate(copilot.body.layers) if isinstance(layer.self_attn, LogAttention)]
    assert found == log_layers
    assert copilot.pooler == StatePooler("max", layer_range)


def test_another_vocabulary_is_refused(tiny_pilot):
    with pytest.raises(ValueError, match=r"Pilot \(llama, 56 tokens\) and Copilot \(llama, 60 tokens\) must be of"):
        Copilot.from_pilot(tiny_pilot("llama"), donor=tiny_pilot("llama", vocab_size=60))


def test_another_family_is_refused(tiny_pilot):
    with pytest.raises(ValueError, match=r"Pilot \(llama, 56 tokens\) and Copilot \(qwen2, 56 tokens\) must be of"):
        Copilot.from_pilot(tiny_pilot("llama"), donor=tiny_pilot("qwen2"))


@pytest.mark.parametrize("layers", [0, 5])
def test_a_depth_that_the_donor_does_not_have_is_refused(tiny_pilot, layers):
    with pytest.raises(ValueError, match=f"layers={layers}: the llama decoder has 4; choose 1 to 4"):
        Copilot.from_pilot(tiny_pilot("llama"), layers=layers)


@pytest.mark.parametrize("pattern", [1, 3, 4])
def test_one_layer_that_would_never_read_the_log_is_refused(tiny_pilot, pattern):
    with pytest.raises(ValueError, match=r"no layer would read the log; use copilot\.layers=2 or more"):
        Copilot.from_pilot(tiny_pilot("llama"), layers=1, pattern=pattern)


@pytest.mark.parametrize(("family", "pattern"), [("llama", 2), ("t5", 1), ("bart", 1)])
def test_one_layer_is_enough_where_it_reads_the_log(tiny_pilot, randomise, teacher_forced, family, pattern):
    pilot = tiny_pilot(family)
    copilot = randomise(Copilot.from_pilot(pilot, layers=1, pattern=pattern)).eval()
    assert teacher_forced(pilot, copilot)[1].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("head", "mlp", "linear, soft"),
        ("pattern", 5, "1, 2, 3, 4"),
        ("context", "future", "strict, inclusive"),
        ("positions", "own", "pilot, none"),
        ("pooling", "median", "mean, max, sum"),
    ],
)
def test_an_unknown_option_is_refused_with_the_known_ones(tiny_pilot, option, value, known):
    with pytest.raises(ValueError, match=f"copilot.{option}={value}: use one of {known}"):
        Copilot.from_pilot(tiny_pilot("llama"), **{option: value})


def test_an_unknown_start_of_the_error_input_is_refused(tiny_pilot):
    with pytest.raises(ValueError, match=r"copilot\.error_input=zeros: use one of embedding, normal"):
        Copilot.from_pilot(tiny_pilot("llama"), error_input="zeros")


@pytest.mark.parametrize("family", of_families("llama", "gemma", "bart"))
def test_errors_are_read_through_the_embedding_by_default(tiny_pilot, family):
    pilot = tiny_pilot(family)
    copilot = Copilot.from_pilot(pilot, layers=2)
    torch.testing.assert_close(copilot.error_in.data, input_embeddings(pilot))
    error = torch.zeros(1, 1, 56)
    error[0, 0, [5, 9]] = torch.tensor([0.75, -0.75])
    embedded = copilot.inputs(error)
    assert torch.equal(embedded[:, 0], copilot.start.expand(1, -1))
    torch.testing.assert_close(embedded[0, 1], 0.75 * (copilot.error_in[5] - copilot.error_in[9]))


def test_the_error_input_can_start_at_random_and_be_frozen(tiny_pilot):
    pilot = tiny_pilot("llama")
    copilot = Copilot.from_pilot(pilot, layers=2, error_input="normal", train_error_input=False)
    assert not torch.allclose(copilot.error_in, input_embeddings(pilot))
    assert 0.9 < copilot.error_in.std().item() < 1.1
    assert not copilot.error_in.requires_grad
    assert Copilot.from_pilot(pilot, layers=2).error_in.requires_grad


@pytest.mark.parametrize(
    ("family", "frozen", "error_input", "matrices"),
    [
        ("mistral", True, "embedding", 1),  # tied embeddings, frozen: one matrix is input map and unembedding
        ("mistral", False, "embedding", 2),  # a trained input map must not move the unembedding
        ("mistral", True, "normal", 2),
        ("gemma", True, "embedding", 2),  # tied, but scaled on the way in: the unembedding is another matrix
        ("llama", True, "embedding", 2),  # untied embeddings are two matrices
    ],
)
def test_the_soft_heads_unembedding_is_stored_once_where_it_is_tied(tiny_pilot, family, frozen, error_input, matrices):
    pilot = tiny_pilot(family, tie_word_embeddings=family != "llama")
    options = {"train_error_input": not frozen, "error_input": error_input}
    copilot = Copilot.from_pilot(pilot, layers=2, head="soft", **options)
    assert sum(value.shape[0] == 56 for value in copilot.state_dict().values()) == matrices
    assert not copilot.unembedding_VC.requires_grad


def test_the_soft_head_reads_the_donors_unembedding(tiny_pilot):
    pilot = tiny_pilot("llama")
    copilot = Copilot.from_pilot(pilot, layers=2, head="soft")
    assert torch.equal(copilot.unembedding_VC, pilot.lm_head.weight)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("family", of_families("t5", "bart", "gemma"))
def test_a_tied_unembedding_is_the_matrix_that_the_family_unembeds_with(tiny_pilot, family, scale):
    """Up to the constant by which Gemma and scaled BART multiply their input embeddings: it is M's to undo."""
    changes = {"scale_embedding": scale} if family == "bart" else {}
    pilot = tiny_pilot(family, tie_word_embeddings=True, **changes)
    copilot = Copilot.from_pilot(pilot, layers=2, head="soft", train_error_input=False)
    unembedding, expected = copilot.unembedding_VC, pilot.get_output_embeddings().weight
    assert torch.nn.functional.cosine_similarity(unembedding, expected).min() > 0.999


@pytest.mark.parametrize("head", ["linear", "soft"])
@pytest.mark.parametrize("family", of_families())
def test_gradients_reach_every_trainable_parameter(tiny_pilot, randomise, teacher_forced, family, head):
    pilot = tiny_pilot(family)
    copilot = randomise(Copilot.from_pilot(pilot, layers=2, head=head))
    _, corrections, log_probs = teacher_forced(pilot, copilot)
    (corrections * log_probs).sum().backward()
    without = [name for name, p in copilot.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(parameter.grad is None for parameter in pilot.parameters())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("family", of_families())
def test_gradient_checkpointing_of_the_body_leaves_the_gradients_as_they_are(
    tiny_pilot, randomise, teacher_forced, family
):
    pilot = tiny_pilot(family)
    copilot = randomise(Copilot.from_pilot(pilot, layers=3)).train()

    def gradients():
        copilot.zero_grad()
        torch.manual_seed(0)  # of dropout
        _, corrections, _ = teacher_forced(pilot, copilot)
        corrections.square().sum().backward()
        return {name: p.grad.clone() for name, p in copilot.named_parameters() if p.grad is not None}

    plain = gradients()
    copilot.body.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    layer = copilot.body.block[1].layer[-1] if family == "t5" else copilot.body.layers[1]
    part = layer if family == "t5" else layer.fc1 if family == "bart" else layer.mlp
    part.register_forward_pre_hook(lambda *given: runs.append(1))
    checkpointed = gradients()
    assert len(runs) == 2  # once forward, once again in the backward pass
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("context", ["strict", "inclusive"])
@pytest.mark.parametrize("positions", ["pilot", "none"])
@pytest.mark.parametrize("family", of_families())
def test_steps_through_the_state_equal_one_pass(tiny_pilot, randomise, family, positions, context):
    copilot = randomise(Copilot.from_pilot(tiny_pilot(family), layers=3, positions=positions, context=context)).eval()
    generator = torch.Generator().manual_seed(0)
    inputs, states = (torch.randn(2, 6, 32, generator=generator) for _ in range(2))
    source, mask = torch.randn(2, 3, 32, generator=generator), torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    with torch.no_grad():
        whole, none = copilot(inputs, source, mask, states)
        first, state = copilot(inputs[:, :2], source, mask, states[:, :2], keep=True)
        newest = int(context == "inclusive")  # row i + newest − 1 joins the log of target i
        steps = [
            copilot.step(inputs[:, i : i + 1], states[:, i + newest - 1 : i + newest], state) for i in range(2, 6)
        ]
    assert none is None
    torch.testing.assert_close(torch.cat([first, *steps], dim=1), whole, atol=1e-4, rtol=1e-4)


def test_a_config_survives_its_dictionary(tiny_pilot):
    copilot = Copilot.from_pilot(tiny_pilot("qwen3"), layers=2, head="soft", context="inclusive", pattern=4)
    again = empty_copilot(copilot.config.to_dict())
    assert again.config == copilot.config
    again.load_state_dict(copilot.state_dict())
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in copilot.state_dict().items()
    }


def test_the_documented_patterns_are_those_of_the_paper():
    assert PATTERNS == {
        1: ("even", "all"),
        2: ("every", "all"),
        3: ("even", "first_half"),
        4: ("even", "second_half"),
    }


@pytest.mark.parametrize("family", of_families("llama", "gemma2", "t5", "bart"))
def test_a_copilot_in_bfloat16_gives_float32_corrections(tiny_pilot, randomise, teacher_forced, family):
    pilot = tiny_pilot(family).bfloat16()
    copilot = randomise(Copilot.from_pilot(pilot, layers=2)).eval().bfloat16()
    hidden, corrections, _ = teacher_forced(pilot, copilot)
    assert hidden.dtype == torch.bfloat16
    assert corrections.dtype == torch.float32
    assert corrections.isfinite().all()
