"""Where the target of each row of a decoder-only text begins: one rule, and rows of different starts side by side.

A fused model needs to know it, since the tokens before the first target are X̃ and all later ones are targets.

Shapes: B batch, T columns of the text, M columns of the longest prompt, N target columns.
"""

import warnings

import torch
from torch import Tensor

IGNORED_LABEL = -100
UNKNOWN = (
    "Neither target_start nor labels tell where the target begins, so the whole text counts as target from its second "
    "token on. For an answer to a prompt give target_start, the prompt's number of columns, as generate does."
)


def find_starts(
    length: int, target_start: int | Tensor | None = None, assistant_masks_BT: Tensor | None = None,
    labels_BT: Tensor | None = None, mask_BT: Tensor | None = None, past: int = 0,
) -> int | Tensor:  # fmt: skip
    """Return the column of the first target, or one for each row [B] where they differ.

    The first of these that is given decides: the argument `target_start`, a chat template's mask of the assistant's
    tokens, the labels. Without any, the whole text is target, and a warning says so. A target has at least one token
    before it: where mask or labels begin with a row's first token, its second one is the first target.

    Args:
        length: T, of the whole text.
        target_start: given by the caller, for all rows or for each.
        assistant_masks_BT: 1 where a token is the assistant's.
        labels_BT: `IGNORED_LABEL` where a token is no target.
        mask_BT: attention mask over the whole text, None for no padding.
        past: number of columns in a cache; all other arguments but the mask then cover later columns only.

    Raises:
        ValueError: if the target would begin with the first column, or, without a cache, beyond the text.
    """
    if isinstance(target_start, int):
        if not 1 <= target_start <= length:
            raise ValueError(
                f"target_start={target_start} with {length} tokens: a prompt of at least one token comes before the "
                f"target"
            )
        return target_start
    if target_start is not None:
        return _one_or_all(target_start.clamp(1, length))
    marked_BN = assistant_masks_BT
    if marked_BN is None and labels_BT is not None:
        marked_BN = labels_BT != IGNORED_LABEL
    if marked_BN is None:
        warnings.warn(UNKNOWN, stacklevel=4)
    if mask_BT is None or mask_BT.dim() != 2:
        least_B: int | Tensor = past + 1
    else:
        least_B = mask_BT.long().argmax(dim=1).clamp_min(past) + 1
    if marked_BN is None:
        return least_B if isinstance(least_B, int) else _one_or_all(least_B.clamp_max(length))
    marked_BN = marked_BN.bool()
    first_B = past + marked_BN.int().argmax(dim=1)
    first_B = torch.where(marked_BN.any(dim=1), first_B, length)
    return _one_or_all(torch.maximum(first_B, torch.as_tensor(least_B, device=first_B.device)).clamp_max(length))


def _one_or_all(starts_B: Tensor) -> int | Tensor:
    first, last = int(starts_B.min()), int(starts_B.max())
    return first if first == last else starts_B


class TargetColumns:
    """Prompts and targets of a text, cut out; rows that start at different columns are moved to start together.

    Attributes:
        first: the first column of any row's target.
        last: the first target column of the row with the longest prompt, M.
        count: how many of the last columns have logits that predict a target, in the row that starts first.
    """

    def __init__(self, starts: int | Tensor, length: int) -> None:
        self._starts_B = None if isinstance(starts, int) else starts
        self.first, self.last = (starts, starts) if isinstance(starts, int) else (int(starts.min()), int(starts.max()))
        self.count = length - self.first + 1

    def prompts(self, text: Tensor) -> Tensor:
        """The prompts' columns [B, M, …] of a text [B, T, …], left-padded by copies of its first."""
        text = text[:, : self.last]
        return text if self._starts_B is None else _moved(text, self._starts_B - self.last)

    def prompt_mask(self, mask_BT: Tensor) -> Tensor:
        """Which of the prompts' columns hold a token [B, M]."""
        mask_BM = self.prompts(mask_BT).bool()
        if self._starts_B is None:
            return mask_BM
        columns_M = torch.arange(self.last, device=mask_BM.device)
        return mask_BM & (columns_M >= self.last - self._starts_B[:, None])

    def targets(self, later: Tensor | None) -> Tensor | None:
        """The last columns of a text, from the first start (or the column before) on, moved to start together."""
        return later if later is None or self._starts_B is None else _moved(later, self._starts_B - self.first)

    def in_place(self, fused_BNV: Tensor | None, pilot_BNV: Tensor) -> Tensor | None:
        """Undo `targets`; columns before a row's target are the Pilot's."""
        if fused_BNV is None or self._starts_B is None:
            return fused_BNV
        later_B1 = (self._starts_B - self.first)[:, None]
        is_target_BN = torch.arange(fused_BNV.shape[1], device=fused_BNV.device) >= later_B1
        return torch.where(is_target_BN[..., None], _moved(fused_BNV, -later_B1[:, 0]), pilot_BNV.float())


def _moved(text: Tensor, by_B: Tensor) -> Tensor:
    """Column c becomes column c + `by_B` of the same row; what lies outside is the nearest column."""
    columns_BT = torch.arange(text.shape[1], device=text.device) + by_B[:, None]
    columns_BT = columns_BT.clamp(0, text.shape[1] - 1)
    return torch.take_along_dim(text, columns_BT.view(*columns_BT.shape, *(1,) * (text.dim() - 2)), dim=1)
