"""What the workflows of CI run can be run by hand, and refuses what they say that it refuses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from conformance.import_lint import ROOT


def git(*words: str, cwd: Path) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *identity, *words], cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of version 1.2.3, whose branch `main` has a commit that may be released."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "check-tag", tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-12-01)\n\n## 1.2.30 (unreleased)\n")
    git("init", "--initial-branch", "main", cwd=tmp_path)
    git("add", ".", cwd=tmp_path)
    git("commit", "--message", "one", cwd=tmp_path)
    return tmp_path


def check_tag(repository: Path, tag: str, commit: str = "HEAD") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [repository / ".ci" / "check-tag", tag, commit, "main"], capture_output=True, text=True
    )


def test_a_tag_of_a_dated_version_on_main_may_be_released(repository: Path) -> None:
    done = check_tag(repository, "v1.2.3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "v1.2.3 may be released\n", "")


@pytest.mark.parametrize(
    ("heading", "tag", "says"),
    [
        ("1.2.3 (2026-12-01)", "v1.2.4", "the tag is v1.2.4, but pyproject.toml has version 1.2.3"),
        ("1.2.3 (unreleased)", "v1.2.3", "a release has the date there: ## 1.2.3 (YYYY-MM-DD)"),
        ("1.2.3 ", "v1.2.3", "a release has the date there"),
        ("1.2.4 (2026-12-01)", "v1.2.3", "CHANGELOG.md has no heading for 1.2.3"),
        ("1x2.3 (2026-12-01)", "v1.2.3", "CHANGELOG.md has no heading for 1.2.3"),
    ],
)
def test_a_tag_that_is_no_release_is_refused(repository: Path, heading: str, tag: str, says: str) -> None:
    (repository / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n")
    done = check_tag(repository, tag)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("check-tag: ") and says in done.stderr


def test_a_commit_beside_main_is_refused(repository: Path) -> None:
    git("checkout", "-b", "side", cwd=repository)
    git("commit", "--allow-empty", "--message", "two", cwd=repository)
    done = check_tag(repository, "v1.2.3", "side")
    assert done.returncode == 1 and "the commit side is not on main" in done.stderr
