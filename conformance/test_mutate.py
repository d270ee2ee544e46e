"""The mutation of the product finds what it must on a tiny product, and claims no more."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conformance import mutate
from conformance.import_lint import ROOT
from conformance.mutation import campaign
from conformance.mutation.campaign import records
from conformance.mutation.operators import mutants_of
from conformance.mutation.selection import Selection, Unit
from conformance.mutation.worker import PRODUCT
from conformance.system.command import TIMEOUT, until

SOURCE = '''"""A product."""

__all__ = ["grown", "waits"]

LIMIT: int = 10


def grown(size: int, by: int = 1) -> int:
    """Return a size grown."""
    if size > LIMIT:
        raise ValueError(f"size is {size + 0}, but must be at most 10")
    return size + by


def waits(rest: int) -> int:
    while rest > 0:
        rest -= 1
    return rest


def idle() -> int:
    return 5 + 6
'''
TESTS = """
import pytest
from arbitor.reference.things.thing import grown, waits

def test_grown():
    assert grown(3) == 4 and grown(10) == 11 and grown(3, 2) == 5

def test_waits():
    assert waits(2) == 0
"""
REFUSAL = """
def test_refused():
    with pytest.raises(ValueError):
        grown(11)
"""
OPTIONS = """
def pytest_addoption(parser):
    for name in ("--device", "--examples", "--impl"):
        parser.addoption(name)
"""
WITHOUT_CHECK = 'reference/things/thing.py grown: without `raise ValueError(f"size is {size + 0}, but must be at most 10")` #1'


def tree(folder: Path, tests: str = TESTS) -> Path:
    """Return a tree with one file of a product and its tests."""
    files = {
        "pyproject.toml": "[tool.pytest.ini_options]\n",
        "arbitor/__init__.py": "",
        "reference/things/thing.py": SOURCE,
        "conformance/__init__.py": "",
        "conformance/conftest.py": OPTIONS,
        "conformance/things/test_thing.py": tests,
        "conformance/things/test_other.py": "def test_other():\n    pass\n",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "arbitor" / "reference").symlink_to("../reference")
    return folder


def run(root: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the command on a tree. Return its exit status and the records by mutant."""
    out = root.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        status = mutate.main([*arguments, "reference", f"--out={out}"], root=root, preloaded=())
    return status, {record["id"]: record for record in records(out)}


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, dict[str, Any]]]:
    """All mutants of the tiny product, tried."""
    return run(tree(tmp_path_factory.mktemp("mutate") / "tree"), "--jobs", "2", "--timeout", "1")


def record_of(tried: tuple[int, dict[str, dict[str, Any]]], text: str) -> dict[str, Any]:
    """Return the record of the one mutant whose name holds a text."""
    (record,) = (record for name, record in tried[1].items() if text in name)
    return record


def test_a_missing_test_leaves_a_survivor(tried: tuple[int, dict[str, dict[str, Any]]]) -> None:
    assert tried[1][WITHOUT_CHECK]["status"] == "survived" and tried[0] == 1
    assert tried[1][WITHOUT_CHECK]["code"].startswith("raise ValueError")


@pytest.mark.parametrize(
    "change", ["-> `size - by`", "-> `size >= LIMIT`", "by: int = 2", "without `rest -= 1`"]
)
def test_a_test_kills(tried: tuple[int, dict[str, dict[str, Any]]], change: str) -> None:
    assert record_of(tried, change)["status"] in ("killed", "timeout")


def test_what_hangs_is_a_timeout(tried: tuple[int, dict[str, dict[str, Any]]]) -> None:
    assert record_of(tried, "without `rest -= 1`")["status"] == "timeout"


def test_what_no_test_calls_is_unreached(tried: tuple[int, dict[str, dict[str, Any]]]) -> None:
    assert record_of(tried, "-> `5 - 6`")["status"] == "unreached"


def test_the_test_that_kills_is_named(tried: tuple[int, dict[str, dict[str, Any]]]) -> None:
    assert record_of(tried, "-> `size - by`")["by"] == "conformance/things/test_thing.py::test_grown"


def test_messages_names_and_annotations_stay(tried: tuple[int, dict[str, dict[str, Any]]]) -> None:
    assert not [name for name in tried[1] if "__all__" in name or "size + 1" in name or "size - 0" in name]


def test_an_added_test_kills_the_survivor(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    assert run(root, "--only", "without `raise")[1][WITHOUT_CHECK]["status"] == "survived"
    tests = root / "conformance" / "things" / "test_thing.py"
    tests.write_text(TESTS + REFUSAL)
    status, found = run(root, "--survivors")
    assert (status, found[WITHOUT_CHECK]["status"]) == (0, "killed")


def test_shards_are_all_mutants_once(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    parts = [
        {
            m.id
            for m in mutate.chosen(root, mutate.parsed(["reference", "--shard", f"{part}/3", "--seed", "5"]))
        }
        for part in (1, 2, 3)
    ]
    whole = {m.id for m in mutants_of(root, "reference/things/thing.py")}
    assert set.union(*parts) == whole and sum(map(len, parts)) == len(whole) and all(parts)


def test_statements_are_deletions_and_negations(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    found = {m.what for m in mutate.chosen(root, mutate.parsed(["reference", "--kinds", "statements"]))}
    assert found == {
        'without `raise ValueError(f"size is {size + 0}, but must be at most 10")`',
        "without `rest -= 1`",
        "`size > LIMIT` -> `not (size > LIMIT)`",
        "`rest > 0` -> `not (rest > 0)`",
    }
    with pytest.raises(SystemExit):
        mutate.parsed(["--kinds", "statement"])


@pytest.mark.parametrize(
    ("source", "negated"),
    [
        ("if a == b:", "`a == b` -> `a != b`"),
        ("if not a:", "`not a` -> `a`"),
        ("if a < b:", "`a < b` -> `not (a < b)`"),
        ("c = a == b", ""),
    ],
)
def test_a_condition_is_negated_once(tmp_path: Path, source: str, negated: str) -> None:
    (tmp_path / "file.py").write_text(
        f"def f(a, b):\n    {source}\n        return 1\n" if ":" in source else source
    )
    found = [m.what for m in mutants_of(tmp_path, "file.py") if m.kind == "negate"]
    assert found == ([negated] if negated else [])


def test_looks_and_imports_for_type_checkers_stay(tmp_path: Path) -> None:
    source = "if TYPE_CHECKING:\n    import this\naxes.set_title(1)\naxes.plot(2)\n"
    (tmp_path / "file.py").write_text(source)
    deleted = [m.what for m in mutants_of(tmp_path, "file.py") if m.kind == "delete"]
    assert deleted == ["without `axes.plot(2)`"]


def test_patience_leaves_tests_out_and_says_so(tmp_path: Path) -> None:
    """The quick test uses the patience up, and the slow one, which kills, is not run."""
    slow = """
def test_slow():
    time.sleep(0.5)
    with pytest.raises(ValueError):
        grown(11)
"""
    root = tree(tmp_path / "tree", f"import time\n{TESTS}{slow}")
    found = run(root, "--only", "without `raise", "--patience", "1e-9")[1]
    assert (found[WITHOUT_CHECK]["status"], found[WITHOUT_CHECK]["left_out"]) == ("survived", 1)
    found = run(root, "--survivors")[1]
    assert (found[WITHOUT_CHECK]["status"], found[WITHOUT_CHECK]["left_out"]) == ("killed", 0)


def test_every_test_that_calls_a_function_is_found(tmp_path: Path) -> None:
    """The second caller kills: a call is seen again in each test, and in a fixture and the test that uses it."""
    later = """
@pytest.fixture(scope="module")
def shared():
    return grown(1)

def test_later(shared):
    assert shared == 2

def test_refused(shared):
    with pytest.raises(ValueError):
        grown(11)
"""
    root = tree(tmp_path / "tree", TESTS + later)
    found = run(root, "--only", "without `raise")[1]
    assert (found[WITHOUT_CHECK]["status"], found[WITHOUT_CHECK]["tests"]) == ("killed", 3)


def test_a_spent_budget_stops(tmp_path: Path) -> None:
    """Nothing is claimed of a mutant that the end of the budget cuts short."""
    root = tree(tmp_path / "tree")
    run(root, "--only", "idle")
    start = time.monotonic()
    _, found = run(root, "--budget", "2", "--only", "without `rest -= 1`", "--timeout", str(2 * TIMEOUT))
    assert time.monotonic() - start < TIMEOUT and not [name for name in found if "rest" in name]


def test_a_child_ends_by_itself_where_its_worker_was_killed(tmp_path: Path) -> None:
    """A mutant that hangs would keep a core busy for ever."""
    (tmp_path / "test_hangs.py").write_text(
        "import os, pathlib, time\n"
        "def test_hangs():\n"
        "    pathlib.Path('started').write_text(str(os.getpid()))\n"
        "    while True: time.sleep(0.01)\n"
    )
    request = {"args": ["-q", "test_hangs.py"], "seconds": 3, "keep": None, "known": []}
    worker = subprocess.Popen(
        [sys.executable, ROOT / "conformance/mutation/worker.py", "0"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    until(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text() != "")
    child = int((tmp_path / "started").read_text())
    worker.kill()
    worker.wait()
    until(lambda: not is_alive(child))


def is_alive(pid: int) -> bool:
    """Return whether a process runs. One that ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        # The second where it ends while the file is read.
        return False


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "tree")
    first = run(root, "--only", "size - by")[1]
    results = root.parent / "out" / "results.jsonl"
    before = results.read_text()
    assert run(root, "--only", "size - by")[1] == first and results.read_text() == before
    assert "0 of 1 mutants to try; 0 files" in capsys.readouterr().out


def test_a_campaign_that_is_killed_has_kept_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written while it goes on, and not at its end alone."""
    root, kept = tree(tmp_path / "tree"), []

    def try_mutant(ours: campaign.Campaign, *job: Any, **more: Any) -> None:
        kept.append(json.loads((ours.options.out / "baseline.json").read_text())["units"].keys())

    monkeypatch.setattr(campaign, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(campaign.Campaign, "try_mutant", try_mutant)
    run(root, "--only", "size - by", "--stages", "1")
    assert [list(units) for units in kept] == [["conformance/things/test_thing.py"]]


def test_a_red_baseline_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "tree", TESTS + "\ndef test_red():\n    assert grown(1) == 7\n")
    status, found = run(root, "--only", "size - by")
    assert status == 2 and not found
    assert (
        "test_thing.py fails without a mutation: conformance/things/test_thing.py::test_red"
        in capsys.readouterr().err
    )


def test_a_red_test_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "tree", TESTS + "\ndef test_red():\n    assert grown(1) == 7\n")
    status, found = run(root, "--only", "size - by", "--keep-going")
    (record,) = found.values()
    assert (status, record["status"]) == (2, "killed") and record["by"].endswith("test_grown")
    assert "left out, because they fail without a mutation:\nconformance/things/test_thing.py::test_red" in (
        capsys.readouterr().err
    )


def test_excused_mutants_are_left_out_and_must_exist(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    entry = {"mutant": WITHOUT_CHECK, "reason": "nobody grows that much"}
    (root / mutate.EXCUSES).write_text(json.dumps([entry]))
    assert WITHOUT_CHECK not in {m.id for m in mutate.chosen(root, mutate.parsed(["reference"]))}
    assert mutate.stale_excuses(root) == []
    (root / mutate.EXCUSES).write_text(
        json.dumps([{**entry, "mutant": WITHOUT_CHECK[:-1] + "2"}, {**entry, "reason": "equal"}])
    )
    assert len(mutate.stale_excuses(root)) == 2


def test_the_excuses_of_this_tree_hold() -> None:
    assert mutate.stale_excuses(ROOT) == []


def test_every_file_of_the_product_has_tests() -> None:
    """Also those of other folders: mutants lived while no test was left out, as tests of another folder saw them."""
    selection = Selection(ROOT)
    assert all(selection.stages(file)[0] for file in mutate.files(ROOT, PRODUCT))
    for file, tests in (
        ("optimized/training/media_mix.py", "conformance/sidecars/test_media_runs.py"),
        ("optimized/training/loop.py", "conformance/sidecars/test_media_runs.py"),
        ("optimized/training/plan.py", "conformance/system/test_names.py"),
        ("optimized/commands/audit.py", "conformance/system/test_cli.py"),
        ("optimized/commands/report.py", "conformance/system/test_finished_runs.py"),
    ):
        assert Unit(tests) in selection.stages(file)[1]
    # Of its name, whatever the folder, unless one is nearer.
    assert [unit.tests for unit in selection.stages("reference/graph/mxint8.py")[0]] == [
        "conformance/distributed/test_mxint8.py"
    ]
    for file in ("optimized/kernels/codebook.py", "sidecars/audio.py"):
        nearest = selection.stages(file)[0]
        assert nearest and not any(unit.tests.startswith("conformance/graph") for unit in nearest)


def test_paths_outside_of_the_product_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate.main(["bench"]) == 2
    assert (
        "bench must be a file or a folder within reference, optimized or sidecars" in capsys.readouterr().err
    )
