"""The predictions file: written as answers come, read back after a stop, divided among processes."""

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
"""Keys of a model's config on which its distribution does not depend; types are those of the weights themselves."""

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


def claim(folder: Path, stem: str, key: Mapping[str, Any]) -> None:
    """Keep the predictions of a stem (see `PredictionFiles`) if they were made under the same key, else remove them.

    The key is everything that an answer depends on, in plain JSON values; `key.json` has those of all stems.
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
    """Return 16 hex digits of plain values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hex digits of all that a model's distribution depends on: its config but for λ, and every weight."""
    digest = hashlib.sha256(digest_of(_essential(model.config.to_dict())).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.is_meta:  # the layers of a Pilot that was recorded, which has a digest of its own
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
