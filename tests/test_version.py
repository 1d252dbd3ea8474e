"""The commit of the code that made a run."""

import pytest

from tcopilot.version import git_revision


@pytest.fixture
def fake_git(tmp_path, monkeypatch):
    """Put a `git` first on the path that knows one commit and prints the given changes."""

    def install(changes: str) -> None:
        git = tmp_path / "git"
        git.write_text(f'#!/bin/sh\ncase "$*" in *rev-parse*) echo abc;; *status*) printf "{changes}";; esac\n')
        git.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


@pytest.mark.parametrize(("changes", "expected"), [("", "abc"), (" M train.py", "abc-dirty")])
def test_git_revision_says_whether_files_differ(fake_git, changes, expected):
    fake_git(changes)
    assert git_revision() == expected


def test_git_revision_is_unknown_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == "unknown"


def test_git_revision_is_unknown_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_DIR", raising=False)  # set while a commit hook runs
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision(tmp_path) == "unknown"
