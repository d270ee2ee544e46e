"""Kernels that are compiled ahead of a pass: the right ones, under the names that launches look for, and whatever fails."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized import settings
from arbitor.optimized.ahead import start
from arbitor.optimized.ahead.absent_gpu import DEVICE, said_of
from arbitor.optimized.ahead.start import Order, Others, Own, compiled_ahead
from arbitor.optimized.cuda import compiler
from arbitor.optimized.kernels import launch
from arbitor.optimized.training.runtime import Runtime
from arbitor.reference.config import with_modules
from arbitor.reference.presets import PRESETS
from conformance.import_lint import ROOT
from conformance.pretend_cuda import H200
from conformance.training import nano

ON_CUDA = Runtime(device="cuda", backend="triton", dtype=torch.bfloat16)

SMOKE = Order(
    config=nano.NANO.to_json(), dtype="bfloat16", context=16, windows=(2,), passes="smoke", gpu=H200
)
RUN = replace(SMOKE, passes="run", recorded=True)
FEW = replace(SMOKE, config=with_modules(nano.NANO, vq=False, graph=False, moe=False).to_json())

WALKS = {
    "smoke": SMOKE,
    "forward": replace(SMOKE, backward=False),
    "in float32": replace(SMOKE, dtype="float32"),
    "recorded": RUN,
    "launched": replace(RUN, recorded=False),
    "two passes a step, of two sizes": replace(RUN, accum=2, windows=(1, 4)),
    "votes of two passes": replace(RUN, accum=2),
    "sums of two passes": replace(RUN, accum=2, sums=True),
    "adapters": replace(RUN, recorded=False, adapters={"rank": 4, "alpha": 8.0, "targets": "all-linear"}),
    "means of gradients": replace(RUN, config=nano.MEANS.to_json()),
    "every module": replace(RUN, config=nano.WHOLE.to_json()),
    "two ranks": replace(RUN, config=nano.WHOLE.to_json(), ranks=(0, 1), of_ranks=2),
    "one of three ranks": replace(RUN, ranks=(1,), of_ranks=3),
    "ranks that send eight bits": replace(RUN, ranks=(1,), of_ranks=2, exchange="mxint8"),
    "ranks that launch": replace(RUN, recorded=False, accum=2, sums=True, ranks=(0, 1), of_ranks=2),
    "tiny": replace(RUN, config=PRESETS["tiny"].to_json()),
    "small": replace(SMOKE, config=PRESETS["small"].to_json()),
}


def at_work(what: str, *orders: Order, cache: Path) -> list[dict[str, Any]]:
    """Run ahead_at_work, and return what it prints."""
    dropped = ("TRITON_INTERPRET", "ARB_PATH", "ARB_VALUE_CHECKS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    paths = (str(ROOT), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["TRITON_CACHE_DIR"] = environment["ARB_CACHE"] = str(cache)
    # A GPU of this machine must change nothing.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "conformance.ahead_at_work", what],
        input="".join(f"{order.to_json()}\n" for order in orders),
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_walk_without_memory_notes_what_the_passes_launch(tmp_path: Path) -> None:
    """The same passes on tensors with memory ask Triton for the same specialisations, and for the same CUDA C++ kernels."""
    found = at_work("walks", *WALKS.values(), cache=tmp_path)
    walks = {}
    for name, of_walk in zip(WALKS, found, strict=True):
        real, absent = set(of_walk["real"]), set(of_walk["absent"])
        assert (name, real - absent, absent - real) == (name, set(), set())
        walks[name] = real
    assert len(walks["forward"]) < len(walks["smoke"]) < len(walks["every module"])
    # Passes whose gradients are summed leave other rows to the step.
    assert walks["sums of two passes"] - walks["votes of two passes"]
    assert not any(tmp_path.glob("**/*.cubin"))


def test_a_stream_is_itself() -> None:
    """A pass unpacks its weights together where it began. It would take each new stream for another place."""
    said = said_of(H200)
    assert said["current_stream"]() == said["current_stream"](DEVICE)


def test_launches_find_what_is_compiled_ahead(tmp_path: Path) -> None:
    """Launches of the first pass wait for their kernels, and compile none. Those of the next process start nothing."""
    [cold] = at_work("launches", FEW, cache=tmp_path)
    assert cold["compiled"] == [] and cold["done"] and len(cold["found"]) > 40
    assert cold["said"].startswith(f"kernels: {len(cold['found'])} compiled in "), cold["said"]
    [warm] = at_work("launches", FEW, cache=tmp_path)
    assert sorted(warm["found"]) == sorted(cold["found"])
    assert (warm["compiled"], warm["said"], warm["done"]) == ([], None, True)
    # One kernel less, and it is compiled again.
    shutil.rmtree(next(tmp_path.glob("**/_packed_product_kernel.json")).parent)
    [again] = at_work("launches", FEW, cache=tmp_path)
    assert again["compiled"] == [] and again["said"].startswith("kernels: 1 compiled in ")


def test_a_kernel_that_fails_costs_no_other(tmp_path: Path) -> None:
    [found] = at_work("crew", cache=tmp_path)
    # Each of the two that are left behind ends with what it does, and with nobody to work for none begins.
    assert found.pop("orphaned") <= 8
    assert found == {"done": ["a", "b", "c"], "refused": True, "unawaited": 0}


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let the processes of a test start with empty caches, and compile."""
    for name in ("TRITON_CACHE_DIR", "ARB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return tmp_path


@pytest.mark.usefixtures("caches")
def test_a_process_that_dies_is_not_waited_for() -> None:
    state = torch.get_rng_state()
    ahead = Own(SMOKE)
    ahead._process.kill()
    began = time.monotonic()
    assert ahead._wait(lambda: None) is None
    assert time.monotonic() - began < 10
    assert ahead.finish() == ahead.finish()
    assert "launched, since the process that compiles them ahead ended with status -9" in str(ahead.finish())
    assert ahead.has_ended() and not SMOKE.is_done()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_process_ends_with_what_has_started_it(caches: Path) -> None:
    """Also where that is killed, and can stop nothing."""
    code = (
        "import sys, time; from arbitor.optimized.ahead.start import Order, Own;"
        "ahead = Own(Order.from_json(sys.argv[1])); print(ahead._process.pid, flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", code, replace(RUN, config=nano.WHOLE.to_json()).to_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as starter:
        assert starter.stdout is not None
        status = Path("/proc") / starter.stdout.readline().strip() / "status"
        began = time.monotonic()
        while not any(caches.glob("**/*.cubin")) and time.monotonic() < began + 60:
            time.sleep(0.05)
        assert status.exists()
        starter.kill()

    def is_at_work() -> bool:
        return status.exists() and "State:\tZ" not in status.read_text()

    began = time.monotonic()
    while is_at_work() and time.monotonic() < began + 10:
        time.sleep(0.05)
    assert not is_at_work()


def test_what_compilers_print_is_no_report() -> None:
    """Nobody reads it. A pipe full of it would stop the processes that compile."""
    code = (
        "import os; from arbitor.optimized.ahead import __main__ as ahead;"
        "ahead.carry_out = lambda order: {'printed': os.write(1, bytes(2**20))}; ahead.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=SMOKE.to_json(), capture_output=True, text=True, cwd=ROOT
    )
    assert json.loads(done.stdout) == {"printed": 2**20}, done.stderr


@pytest.mark.usefixtures("caches")
def test_a_terminal_interrupts_no_process_that_a_step_waits_for() -> None:
    assert os.getpgid(Own(SMOKE)._process.pid) != os.getpgrp()


@pytest.mark.usefixtures("caches")
def test_an_order_that_cannot_be_walked_is_no_fault() -> None:
    order = replace(SMOKE, config="{}")
    assert Own(order).finish() is None


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
    monkeypatch.setattr(start, "MOST_SECONDS", 0)
    ahead = Own(SMOKE)
    assert ahead._wait(lambda: None) is None and not ahead.has_ended()
    assert str(ahead.finish()).endswith("ended with status -9")
    # Who is let go of is stopped.
    process = Own(SMOKE)._process
    assert process.poll() == -9


@pytest.mark.usefixtures("caches")
def test_looks_into_the_caches_wait_for_what_comes() -> None:
    from triton.runtime.cache import get_cache_manager

    ahead = Own(SMOKE)
    looks = iter([None, {}, {"kernel.json": "path"}])
    assert ahead._wait(lambda: next(looks)) == {"kernel.json": "path"}
    waits = []
    ahead._wait = lambda look: waits.append(look())  # type: ignore[method-assign]
    with ahead.awaited():
        get_cache_manager("00").get_group("kernel.json")
        get_cache_manager("00").get_file("__triton_launcher.so")
        # The process makes none of these.
        get_cache_manager("00").get_file("cuda_utils.so")
        compiler._wait(lambda: True)
    get_cache_manager("00").get_group("kernel.json")
    compiler._wait(lambda: True)
    assert waits == [None, None, True]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, caches: Path) -> Callable[..., Any]:
    """Return what asks for kernels as a run on an H200 does, with changes to the fields of SMOKE."""
    monkeypatch.setenv("ARB_AHEAD", "1")
    monkeypatch.setattr(start, "cores", lambda: 2)
    monkeypatch.setattr(start.Gpu, "here", staticmethod(lambda: H200))
    order = {field.name: getattr(SMOKE, field.name) for field in fields(SMOKE)}
    del order["dtype"], order["gpu"]
    return lambda runtime=ON_CUDA, **changes: compiled_ahead(runtime, **{**order, **changes})


def test_nothing_is_started_where_nothing_is_gained(
    monkeypatch: pytest.MonkeyPatch, caches: Path, asked: Callable[..., Any]
) -> None:
    started: list[Order] = []
    monkeypatch.setattr(start, "Own", lambda order, claim: started.append(order))
    asked()
    assert started == [SMOKE]
    for runtime in (replace(ON_CUDA, device="cpu"), replace(ON_CUDA, backend="reference")):
        assert asked(runtime) is None
    for name, value in (
        ("ARB_AHEAD", "0"),
        ("TRITON_INTERPRET", "1"),
        ("TRITON_INTERPRET", "True"),
        ("TRITON_ALWAYS_COMPILE", "1"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert asked() is None
    for name, value in (("executable", None), ("executable", ""), ("frozen", True)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, value, raising=False)
            assert asked() is None
    with monkeypatch.context() as patch:
        patch.delattr(os, "sched_getaffinity")
        assert asked() is None
    with monkeypatch.context() as patch:
        patch.setattr(start, "cores", lambda: 1)
        assert asked() is None
    SMOKE.files().write_text(json.dumps([str(caches)]))
    assert asked() is None and started == [SMOKE]

    def refused(order: Order, claim: Any) -> None:
        raise OSError("no process more")

    SMOKE.files().write_text("no list")
    monkeypatch.setattr(start, "Own", refused)
    assert asked() is None


def test_one_process_compiles_for_all_that_want_the_same(
    monkeypatch: pytest.MonkeyPatch, asked: Callable[..., Any]
) -> None:
    """The others wait until it has ended, with all that it has forked. Nobody waits for a process with another order."""
    own = asked()
    assert isinstance(own, Own)
    first, second = asked(), asked()
    assert isinstance(first, Others) and isinstance(second, Others)
    other = asked(windows=(3,))
    assert isinstance(other, Own)
    other._stop()
    looks = iter([None, "kernel"])
    assert first._wait(lambda: next(looks)) == "kernel" and not first.has_ended() and not second.has_ended()
    own._stop()
    monkeypatch.setattr(Order, "is_done", lambda order: True)
    assert first.finish() == "kernels: compiled by a process of another run, or of another rank"
    assert first.has_ended() and second.has_ended() and second._wait(lambda: None) is None


def test_whoever_waits_for_a_process_that_dies_takes_over(asked: Callable[..., Any]) -> None:
    """One of them does, and the others wait for it."""
    own, first, second = asked(), asked(), asked()
    own._stop()
    while not (first._claim.closed or first.has_ended()):
        time.sleep(0.01)
    assert isinstance(first._own, Own) and not first.has_ended() and not second.has_ended()
    first._own._stop()
    while not second._claim.closed:
        second.has_ended()
        time.sleep(0.01)
    assert isinstance(second._own, Own) and first.has_ended()
    second._own._stop()
    assert second.has_ended()


def test_who_is_forked_meanwhile_keeps_no_claim(
    monkeypatch: pytest.MonkeyPatch, asked: Callable[..., Any]
) -> None:
    own, waiting = asked(), asked()
    began, ends = os.pipe()
    if (child := os.fork()) == 0:
        os.close(ends)
        os.read(began, 1)
        os._exit(0)
    own._stop()
    with monkeypatch.context() as patch:
        patch.setattr(Order, "is_done", lambda order: True)
        waiting.finish()
    again = asked()
    assert isinstance(again, Own)
    again._stop()
    os.close(ends)
    os.waitpid(child, 0)


def test_a_folder_without_locks(
    monkeypatch: pytest.MonkeyPatch, caches: Path, asked: Callable[..., Any]
) -> None:
    """A process compiles for itself, and so does one that has waited, if locks are gone."""
    started: list[Any] = []
    own, waiting = asked(), asked()
    own._stop()
    monkeypatch.setattr(start, "Own", lambda order, claim: started.append(claim))

    def refused(file: Any, kind: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(start.fcntl, "flock", refused)
    assert isinstance(waiting, Others) and waiting.has_ended() and waiting._claim.closed
    asked()
    shutil.rmtree(caches / "ahead")
    (caches / "ahead").write_text("no folder")
    asked()
    assert [claim is None for claim in started] == [False, False, True]


def test_a_claim_can_be_locked_where_that_asks_for_reading(asked: Callable[..., Any]) -> None:
    """As on NFS, whose clients lock a file by its bytes."""
    own, waiting = asked(), asked()
    fcntl.lockf(waiting._claim, fcntl.LOCK_SH | fcntl.LOCK_NB)
    own._stop()


@pytest.mark.parametrize(
    "text", ["", "null", "5", '{"a": 1}', "[1]", "[null]", "[[]]", '["\\u0000"]', "[" * 10**5]
)
def test_a_list_that_is_none_says_nothing(caches: Path, text: str) -> None:
    """A number would be a file descriptor, which exists."""
    SMOKE.files().parent.mkdir()
    SMOKE.files().write_text(text)
    assert not SMOKE.is_done()


def test_a_user_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert not SMOKE.is_done()


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize("missing", ["FileCacheManager", "manager_class"])
def test_a_triton_whose_cache_has_other_names(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Launches wait for CUDA C++ kernels alone."""
    import triton
    from triton.runtime import cache

    ahead = Own(SMOKE)
    ahead._wait = lambda look: look()  # type: ignore[method-assign]
    if missing == "FileCacheManager":
        monkeypatch.delattr(cache, missing)
    else:
        monkeypatch.setattr(triton, "knobs", SimpleNamespace(cache=SimpleNamespace()))
    with ahead.awaited():
        assert compiler._wait(lambda: "found") == "found"


@pytest.mark.usefixtures("caches")
def test_what_failed_is_said() -> None:
    ahead = Own(SMOKE)
    ahead._process.kill()
    report = {"compiled": 0, "failed": 7, "seconds": 1.0, "at_a_time": 2}
    # A package that is imported for every process may print.
    told = f"a banner\n{json.dumps(report)}\n"
    ahead._process.communicate = lambda timeout: (told, None)  # type: ignore[method-assign, assignment]
    assert ahead.finish() == "kernels: 0 compiled in 1.0 s, up to 2 at a time; 7 failed"


def test_settings_say_whether_kernels_are_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARB_AHEAD")
    assert settings.compiles_ahead()
    monkeypatch.setenv("ARB_AHEAD", "no")
    with pytest.raises(ValueError, match="ARB_AHEAD is 'no', but must be one of 0, 1"):
        settings.compiles_ahead()


def test_every_part_of_an_order_names_other_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARB_CACHE", str(tmp_path))
    others = {
        "config": nano.WHOLE.to_json(),
        "dtype": "float32",
        "context": 32,
        "windows": (2, 3),
        "passes": "run",
        "gpu": replace(H200, multiprocessors=78),
        "backward": False,
        "recorded": True,
        "accum": 2,
        "sums": True,
        "adapters": {"rank": 4, "alpha": 8.0, "targets": "all-linear"},
        "ranks": (0, 1),
        "of_ranks": 2,
        "exchange": "mxint8",
    }
    orders = [SMOKE, *(replace(SMOKE, **{name: value}) for name, value in others.items())]
    assert set(others) == {field.name for field in fields(Order)}
    assert [Order.from_json(order.to_json()) for order in orders] == orders
    places = {order.files() for order in orders}
    for name, value in (("TRITON_CACHE_DIR", "/elsewhere"), ("ARB_PATH", "triton")):
        monkeypatch.setenv(name, value)
        places.add(SMOKE.files())
    monkeypatch.setenv("HOME", "/elsewhere")
    places.add(SMOKE.files())
    monkeypatch.setattr(start, "_version", lambda package: "another")
    places.add(SMOKE.files())
    assert len(places) == len(orders) + 4 and {place.parent for place in places} == {tmp_path / "ahead"}


def test_the_name_of_a_kernel_is_that_of_its_source() -> None:
    """What a called function needs is taken over after that function was hashed, whoever hashed it first."""
    order: list[str] = []

    class Called:
        @property
        def cache_key(self) -> str:
            order.append("hashed")
            return "its hash"

    class Finder:
        def _update_hash(self, func: Called, *more: str) -> tuple[str, ...]:
            order.append("taken over")
            return more

    release = SimpleNamespace(DependenciesFinder=Finder)
    launch.hash_callees_first(release)
    assert release.DependenciesFinder()._update_hash(Called(), "more") == ("more",)
    assert order == ["hashed", "taken over"]


@pytest.mark.parametrize("release", [SimpleNamespace(), SimpleNamespace(DependenciesFinder=object)])
def test_a_release_of_triton_with_other_names_is_left_alone(release: SimpleNamespace) -> None:
    before = dict(vars(release))
    launch.hash_callees_first(release)
    assert vars(release) == before
