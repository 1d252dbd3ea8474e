"""The predictions file: written as answers come, read back after a stop, divided among processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcopilot.processes import barrier, is_first, rank
from tcopilot.run_directory import write_whole

Prediction = dict[str, Any]
"""One row at one λ: its `id`, what was said, and `scores`, a value for each metric."""


class PredictionFiles:
    """The files of one benchmark and split, `<stem>-weight=<λ>.jsonl`, one JSON line per row.

    Process 0 writes to the file itself, the others beside it; `finish` joins them. A line that a stop has cut short
    is left out and its row asked again.
    """

    def __init__(self, folder: Path, stem: str, weights: Sequence[float]) -> None:
        self._files = {weight: folder / f"{stem}-weight={weight:g}.jsonl" for weight in weights}

    def done(self) -> dict[float, dict[int, Prediction]]:
        """Return what is there, of all processes: λ to row id to prediction."""
        found: dict[float, dict[int, Prediction]] = {}
        for weight, file in self._files.items():
            lines = [line for path in (file, *_parts(file)) if path.exists() for line in _whole_lines(path)]
            found[weight] = {prediction["id"]: prediction for prediction in lines}
        return found

    def append(self, predictions: Mapping[float, Iterable[Prediction]]) -> None:
        """Add the predictions of a batch and hand them to the operating system at once."""
        for weight, some in predictions.items():
            path = self._files[weight]
            path = path if is_first() else path.with_name(f"{path.name}.rank{rank()}")
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" if _is_cut_short(path) else "")
                file.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in some)

    def finish(
        self, ids: Sequence[int], judged: Callable[[Prediction], Prediction] = lambda prediction: prediction
    ) -> dict[float, list[Prediction]]:
        """Join the files of all processes, each row once and in the order of `ids`; every process calls this.

        `judged` scores a prediction, in case it was stored before its metrics were changed. Returned are the
        predictions at each λ.
        """
        barrier()
        ordered = {weight: [judged(by_id[number]) for number in ids] for weight, by_id in self.done().items()}
        barrier()
        if is_first():
            for weight, file in self._files.items():
                lines = (json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in ordered[weight])
                write_whole(file, "".join(lines))
                for part in _parts(file):
                    part.unlink()
        barrier()
        return ordered


def claim(folder: Path, key: Mapping[str, Any]) -> None:
    """Keep the predictions in a folder if they were made under the same key, else remove them.

    The key is everything that an answer depends on, in plain JSON values.
    """
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(key, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        file = folder / "key.json"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            for old in folder.glob("*.jsonl*"):
                old.unlink()
            file.write_text(text, encoding="utf-8")
    barrier()


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits that change with the weights; sums of each tensor, rounded as devices disagree."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            total, size = tensor.sum(dtype=torch.float64), tensor.abs().sum(dtype=torch.float64)
            digest.update(f"{name} {tuple(tensor.shape)} {total.item():.6g} {size.item():.6g};".encode())
    return digest.hexdigest()[:16]


def _parts(file: Path) -> list[Path]:
    return sorted(file.parent.glob(f"{file.name}.rank*"))


def _is_cut_short(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return size > 0 and file.read() != b"\n"


def _whole_lines(path: Path) -> list[Prediction]:
    predictions = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                prediction = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n") and isinstance(prediction, dict) and "id" in prediction:
                predictions.append(prediction)
    return predictions
