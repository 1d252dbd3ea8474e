"""Keys that stand in a config and change nothing: slips, which are refused, and settings that a run has no use for.

Which keys a run has read is noted while it reads them (`watch`), so that no list has to say which part reads what.
"""

import difflib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tcopilot.app.checks.controls import trains_frozen
from tcopilot.app.checks.recordings import OF_FITS, OF_ROUNDS, fits_from_recording
from tcopilot.data.generated_tasks import GeneratedTask
from tcopilot.data.module import TCopilotDataModule
from tcopilot.run_directory import flatten

REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # `${rounds}`; a resolver such as `${oc.env:HOME}` names no key
_numbers = itertools.count()


def slips(cfg: DictConfig, known: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Keys that no run reads.

    Args:
        cfg: the composed config, not resolved.
        known: the keys of each group that this package reads key by key. Other groups are given whole to the
            constructor of a class, which refuses what it does not know.
    """
    plain = OmegaConf.to_container(cfg, resolve=False)
    referred = set(REFERENCE.findall(str(plain)))
    for group, names in known.items():
        node = OmegaConf.select(cfg, group) if group else cfg
        for name in node if isinstance(node, DictConfig) else ():
            key = f"{group}.{name}" if group else str(name)
            if name in names or any(is_within(other, key) for other in referred):
                continue
            prefix = f"{group}." if group else ""
            deeper = [
                other
                for other in flatten(plain)
                if other.startswith(prefix) and other.endswith(f".{name}") and other != key
            ]
            near = [prefix + other for other in difflib.get_close_matches(str(name), names, n=1)]
            mend = f"did you mean {(deeper or near)[0]}?" if deeper or near else "leave it out"
            yield f"{key}={node[name]}: nothing reads this key; {mend}"


def watch(cfg: DictConfig) -> tuple[DictConfig, set[str]]:
    """A resolved copy of a config, and the set of those of its keys that have been read so far, by whatever means."""
    read: set[str] = set()
    leaves: list[tuple[str, Any, list[str]]] = []
    resolver = f"watched_{next(_numbers)}"

    def note(number: int) -> Any:
        key, value, referred = leaves[number]
        read.update((key, *referred))
        return value

    def watched(raw: Any, value: Any, key: str) -> Any:
        if isinstance(value, dict) and value:
            return {
                name: watched(raw[name], item, f"{key}.{name}" if key else str(name)) for name, item in value.items()
            }
        leaves.append((key, value, REFERENCE.findall(raw) if isinstance(raw, str) else []))
        return f"${{{resolver}:{len(leaves) - 1}}}"

    OmegaConf.register_new_resolver(resolver, note)
    raw, resolved = (OmegaConf.to_container(cfg, resolve=resolve) for resolve in (False, True))
    return OmegaConf.create(watched(raw, resolved, "")), read


def set_in_files(cfg: DictConfig, plain: DictConfig | None, given: Iterable[str]) -> list[str]:
    """The settings, as `key=value`, in which a config differs from another, and which no override has given.

    Args:
        cfg: the composed config, not resolved.
        plain: what the files of the same groups say by themselves, so that the difference is what experiments have
            set; None if it is not known.
        given: the overrides of the command line.
    """
    if plain is None:
        return []
    keys = [key_of(override) for override in given]
    own, others = (flatten(OmegaConf.to_container(config, resolve=False)) for config in (cfg, plain))
    return [
        f"{key}={value}"
        for key, value in own.items()
        if (key not in others or others[key] != value) and not any(is_within(key, other) for other in keys)
    ]


def idle_overrides(
    cfg: DictConfig,
    read: Collection[str],
    data: TCopilotDataModule,
    given: Collection[str],
    plain: DictConfig | None = None,
) -> list[str]:
    """The settings given for this run, such as `pilot.clip=2`, that change nothing in it.

    Args:
        cfg: the config of the run.
        read: the keys that building the models and the log has read.
        data: the prepared data.
        given: the overrides of the command line.
        plain: see `set_in_files`, whose settings are judged too.
    """
    # Groups that are given whole to a constructor, or read once training has ended.
    used = {*read, "data", "trainer", "callbacks", "logger", "paths", "evaluation"}
    used |= {str(key) for key in cfg if not isinstance(cfg[key], DictConfig)}
    used |= {"mistake_log", "fusion.per", "fusion.select_by"} if cfg.copilot.enabled else set()
    idle = {key for key, is_idle in _without_effect(cfg, data, read).items() if is_idle}
    found = []
    for override in (*given, *set_in_files(cfg, plain, given)):
        key = key_of(override)
        if OmegaConf.select(cfg, key, throw_on_missing=False) is None:
            continue  # a group such as `experiment`, or null, which asks for nothing
        if key in idle or not any(is_within(key, other) or is_within(other, key) for other in used):
            found.append(override)
    return found


def _without_effect(cfg: DictConfig, data: TCopilotDataModule, read: Collection[str]) -> dict[str, bool]:
    """Whether settings that are read at all events can change nothing, by what else is given.

    Reading tells nothing of them: a data module takes its settings whole, and what only evaluation reads has not been
    read yet when a run's summary is shown.
    """
    tasks, alone = data.benchmarks.values(), len(data.benchmarks) == 1
    fits = fits_from_recording(cfg)
    takes_rows_once = fits and not trains_frozen(cfg)  # and in an order of its own; controls train on the mixture
    unranked = all(task.catalogue is None for task in tasks)
    return {
        "data.path": all(isinstance(task, GeneratedTask) for task in tasks),
        "data.weights": alone or takes_rows_once,
        "data.batch_size": takes_rows_once and "data.batch_size" not in read,
        "data.epochs": data.rounds is not None,
        "data.shuffle_buffer": not data.streaming,
        "data.group_by_length": data.streaming or takes_rows_once,
        "data.num_workers": takes_rows_once,
        "data.overflow": cfg.data.max_source_length is None and cfg.data.max_target_length is None,
        "evaluation.ranking": unranked,
        "evaluation.ranking_beams": unranked or cfg.evaluation.ranking != "beam",
        "evaluation.compile": cfg.evaluation.decoding != "static",
        "fusion.per": alone and cfg.fusion.per == "benchmark",
        **{key: fits for key in OF_ROUNDS if fits},
        **{key: fits for key in ("mistake_log", *_settings_of_log(cfg))},
        "mistake_log.log.dtype": fits and cfg.mistake_log["from"] is not None,
        **{key: not fits for key in OF_FITS},
    }


def _settings_of_log(cfg: DictConfig) -> list[str]:
    """The keys of the log that fills up while a Pilot trains; of these a recording has only the type of its states."""
    return [f"mistake_log.log.{key}" for key in flatten(OmegaConf.to_container(cfg.mistake_log.log))]


def is_within(key: str, group: str) -> bool:
    """Whether a dotted key is a group or lies below it."""
    return key == group or key.startswith(f"{group}.")


def key_of(override: str) -> str:
    """The key that an override sets; of the choice of a group's file, the place where it goes.

    >>> key_of("+pilot.clip=2"), key_of("optimizer@pilot.optimizer=adamw")
    ('pilot.clip', 'pilot.optimizer')
    """
    return override.partition("=")[0].lstrip("+~").rpartition("@")[2]
