"""Prediction files: written as rows are answered, read again after an interruption, shared by several processes."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tcopilot.processes import barrier, is_first, rank
from tcopilot.run_directory import write_whole

NOT_ESSENTIAL = (
    "weight",
    "architectures",
    "transformers_version",
    "_name_or_path",
    "name_or_path",
    "dtype",
    "use_cache",
)
"""Keys of a model's config that do not affect its distribution; the dtype is taken from the weights themselves."""

Prediction = dict[str, Any]
"""The answer to one row at one λ: the row's `id`, the answer, and `scores`, a value for each metric."""


class PredictionFiles:
    """The files of one benchmark and split, `<stem>-weight=<λ>.jsonl`, one JSON line per row.

    Process 0 writes to this file and each other process to its own beside it; `finish` joins them. A line that was cut
    short by an interruption is ignored, and its row is answered again.
    """

    def __init__(self, folder: Path, stem: str, weights: Sequence[float]) -> None:
        self._files = {weight: folder / f"{stem}-weight={weight:g}.jsonl" for weight in weights}

    def done(self) -> dict[float, dict[int, Prediction]]:
        """Return the stored predictions of all processes, by λ and row id."""
        found: dict[float, dict[int, Prediction]] = {}
        for weight, file in self._files.items():
            lines = [line for path in (file, *_parts(file)) if path.exists() for line in _whole_lines(path)]
            found[weight] = {prediction["id"]: prediction for prediction in lines}
        return found

    def append(self, predictions: Mapping[float, Iterable[Prediction]]) -> None:
        """Append the predictions of a batch to the files, so that an interruption loses at most the current batch."""
        for weight, some in predictions.items():
            path = self._files[weight]
            path = path if is_first() else path.with_name(f"{path.name}.rank{rank()}")
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" if _is_cut_short(path) else "")
                file.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in some)

    def finish(
        self, ids: Sequence[int], judged: Callable[[Prediction], Prediction] = lambda prediction: prediction
    ) -> dict[float, list[Prediction]]:
        """Join the files of all processes, each row once and in the order of `ids`, and return the predictions by λ.

        Every process must call this. `judged` scores the predictions anew, because metrics may have changed since they
        were stored.
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


def claim(folder: Path, stem: str, key: Mapping[str, Any]) -> None:
    """Keep the predictions of a stem (see `PredictionFiles`) if they were made under the same key, else remove them.

    The key holds everything that an answer depends on, as plain JSON values; `key.json` stores the keys of all stems.
    """
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "key.json"
        key = json.loads(json.dumps(key, default=str))
        try:
            known = dict(json.loads(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            known = {}
        if known.get(stem) != key:
            for old in folder.glob(f"{escape(stem)}-weight=*.jsonl*"):
                old.unlink()
            known = {name: of_name for name, of_name in known.items() if isinstance(of_name, dict)} | {stem: key}
            write_whole(file, json.dumps(known, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    barrier()


def digest_of(value: Any) -> str:
    """Return a hash of plain values as 16 hex digits, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash (16 hex digits) of what defines a model's distribution: its config without λ and its weights."""
    digest = hashlib.sha256(digest_of(_essential(model.config.to_dict())).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.is_meta:  # a layer of a recorded Pilot; the recording has its own digest
            continue
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _essential(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {key: _essential(value) for key, value in settings.items() if key not in NOT_ESSENTIAL}


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
