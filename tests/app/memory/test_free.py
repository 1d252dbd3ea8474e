"""Free memory within the limits of control groups."""

from types import SimpleNamespace

import pytest

from tcopilot.app.memory import free

GB = 10**9


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/job", {"job/memory.max": 4 * GB, "job/memory.current": 3 * GB, "job/memory.stat": "inactive_file 5"},
         GB + 5),
        ("0::/a/b", {"a/memory.max": 2 * GB, "a/memory.current": 0, "a/memory.stat": "anon 1", "a/b/memory.max": "max",
                     "a/b/memory.current": 0, "a/b/memory.stat": "anon 1"}, 2 * GB),
        ("0::/", {"memory.max": "max", "memory.current": 1, "memory.stat": "anon 1"}, 9 * GB),
        ("0::/elsewhere", {"memory.max": 3 * GB, "memory.current": GB, "memory.stat": "anon 1"}, 2 * GB),
        ("3:cpu,memory:/x", {"memory/x/memory.limit_in_bytes": 5 * GB, "memory/x/memory.usage_in_bytes": GB,
                             "memory/x/memory.stat": "cache 7"}, 4 * GB),
        ("4:cpu:/x", {}, 9 * GB),
        (None, {}, 9 * GB),
    ],
)  # fmt: skip
def test_the_tightest_limit_counts(own, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(free.psutil, "virtual_memory", lambda: SimpleNamespace(available=9 * GB))
    monkeypatch.setattr(free, "CGROUPS", tmp_path)
    monkeypatch.setattr(free, "OWN", tmp_path / "own")
    if own is not None:
        (tmp_path / "own").write_text(f"{own}\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert free.available_memory() == expected
