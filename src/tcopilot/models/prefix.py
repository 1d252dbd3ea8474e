"""The beginning that all prompts of a batch share, read once: shots, a system prompt, a template's first words.

Only a decoder-only Pilot can do this, since its states at a token depend on no later token. An encoder reads each
prompt as a whole.

Shapes: B batch, T columns of prompt and target, S shared tokens, R = T − S, P Pilot width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import ModelOutput

from tcopilot.models.family_check import reads_past_gaps


def can_share(pilot: PreTrainedModel, columns: int, cache: Cache | None = None) -> bool:
    """Whether reading a prefix first gives, in texts of that many columns, the results of a single pass.

    This is refused if activations are recomputed, since transformers then keeps no keys and values; if the Pilot
    is compiled, since both parts would be; if its family measures distances in columns, padding between prefix and
    text among them, or texts are as long as a sliding window, which counts these columns too; if the cache is static,
    or a backward pass will read it; and if the Pilot is sharded among processes, which must all run it equally often.
    """
    config = pilot.config.get_text_config()
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)  # the latter GPT-Neo's
    recomputes = pilot.training and any(getattr(part, "gradient_checkpointing", False) for part in pilot.modules())
    is_compiled = "forward" in vars(pilot)
    takes_rows = cache is None or (isinstance(cache, DynamicCache) and not torch.is_grad_enabled())
    is_sharded = isinstance(pilot, FSDPModule)
    is_short = window is None or columns < window
    can_run = not recomputes and not is_compiled and not is_sharded and takes_rows
    return is_short and can_run and reads_past_gaps(pilot.config)


def run_after_prefix(
    pilot: PreTrainedModel, shared: int, ids_BT: Tensor, mask_BT: Tensor, cache: Cache | None = None, **given: Any
) -> tuple[ModelOutput, Tensor | None]:
    """Run a decoder-only Pilot on left-padded texts that all begin with the same S tokens; these are read once.

    Gradients flow through the prefix, summed over the rows. A cache, which must be empty, is left as a single pass
    over the texts would leave it.

    Returns:
        The output for the columns behind the first S, and with `output_hidden_states` also the embedded texts
        [B, T, P].
    """
    rows, positions_BT = len(ids_BT), position_ids(mask_BT)
    padding_B1 = mask_BT.long().argmax(dim=1, keepdim=True)
    columns_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    prefix_1S = ids_BT[:1].gather(1, padding_B1[:1] + columns_T[:shared])
    kept = DynamicCache() if cache is None else cache
    begun = pilot(input_ids=prefix_1S, past_key_values=kept, use_cache=True, **given | {"logits_to_keep": 1})
    for layer in kept.layers:
        layer.keys, layer.values = (held.expand(rows, -1, -1, -1) for held in (layer.keys, layer.values))
    rest_BR = mask_BT[:, shared:].bool() & (positions_BT[:, shared:] >= shared)  # padding moves prefixes to the right
    out = pilot(
        input_ids=ids_BT[:, shared:],
        attention_mask=torch.cat([rest_BR.new_ones(rows, shared), rest_BR], dim=1).long(),
        position_ids=positions_BT[:, shared:],
        past_key_values=kept,
        use_cache=True,
        **given,
    )
    # The prefix now stands in the first columns of every row; in a left-padded text it stands behind the padding.
    is_prefix_BT = (columns_T >= padding_B1) & (columns_T < padding_B1 + shared)
    from_BT = torch.where(is_prefix_BT, columns_T - padding_B1, columns_T)
    from_BT = torch.where(columns_T < padding_B1, columns_T + shared, from_BT)
    if cache is not None:
        for layer in cache.layers:
            for held in (layer.keys, layer.values):
                held.copy_(_taken(held, from_BT))
    if out.hidden_states is None:
        return out, None
    embedded = (begun.hidden_states[0].expand(rows, -1, -1), out.hidden_states[0])
    return out, _taken(torch.cat(embedded, dim=1), from_BT)


def position_ids(mask_BM: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding does not move a prompt.

    >>> position_ids(torch.tensor([[False, True, True]])).tolist()
    [[0, 0, 1]]
    """
    return (mask_BM.long().cumsum(-1) - 1).clamp_min(0)


def _taken(held: Tensor, from_BT: Tensor) -> Tensor:
    """Columns [B, …, T, D] of `held` in another order for each row."""
    between = (1,) * (held.dim() - 3)
    return held.gather(-2, from_BT.view(len(held), *between, -1, 1).expand_as(held))
