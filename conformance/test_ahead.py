"""Kernels that are compiled ahead of a pass: the right ones, under the names that launches look for, and whatever fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized import settings
from arbitor.optimized.ahead import start
from arbitor.optimized.ahead.absent_gpu import DEVICE, said_of
from arbitor.optimized.ahead.start import Ahead, Order, compiled_ahead
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
    "sums of two passes": replace(RUN, accum=2, sums=True),
    "two passes a step": replace(RUN, accum=2),
    "adapters": replace(RUN, recorded=False, adapters={"rank": 4, "alpha": 8.0, "targets": "all-linear"}),
    "means of gradients": replace(RUN, config=nano.MEANS.to_json()),
    "every module": replace(RUN, config=nano.WHOLE.to_json()),
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
    counts = {}
    for name, of_walk in zip(WALKS, found, strict=True):
        real, absent = set(of_walk["real"]), set(of_walk["absent"])
        assert (name, real - absent, absent - real) == (name, set(), set())
        counts[name] = len(real)
    assert counts["forward"] < counts["smoke"] < counts["every module"]
    # Sums vote at the rate of a step, which is a number. Passes that are recorded vote at a tensor.
    of_walks = dict(zip(WALKS, found, strict=True))
    assert set(of_walks["sums of two passes"]["real"]) - set(of_walks["two passes a step"]["absent"])
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
    assert at_work("crew", cache=tmp_path) == [{"done": ["a", "b", "c"], "refused": True}]


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
    ahead = Ahead(SMOKE)
    ahead._process.kill()
    began = time.monotonic()
    assert ahead._wait(lambda: None) is None
    assert time.monotonic() - began < 10
    assert ahead.finish() == ahead.finish()
    assert "launched, since the process that compiles them ahead ended with status -9" in str(ahead.finish())
    assert ahead.has_ended() and not SMOKE.is_done()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("caches")
def test_an_order_that_cannot_be_walked_is_no_fault() -> None:
    order = replace(SMOKE, config="{}")
    assert Ahead(order).finish() is None


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
    monkeypatch.setattr(start, "MOST_SECONDS", 0)
    ahead = Ahead(SMOKE)
    assert ahead._wait(lambda: None) is None and not ahead.has_ended()
    assert str(ahead.finish()).endswith("ended with status -9")
    # Who is let go of is stopped.
    process = Ahead(SMOKE)._process
    assert process.poll() == -9


@pytest.mark.usefixtures("caches")
def test_looks_into_the_caches_wait_for_what_comes() -> None:
    from triton.runtime.cache import get_cache_manager

    ahead = Ahead(SMOKE)
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


def test_nothing_is_started_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
    started: list[Order] = []
    monkeypatch.setenv("ARB_AHEAD", "1")
    monkeypatch.setattr(start, "cores", lambda: 2)
    monkeypatch.setattr(start.Gpu, "here", staticmethod(lambda: H200))
    monkeypatch.setattr(start, "Ahead", started.append)
    order = {field.name: getattr(SMOKE, field.name) for field in fields(SMOKE)}
    del order["dtype"], order["gpu"]
    compiled_ahead(ON_CUDA, **order)
    assert started == [SMOKE]
    for runtime in (replace(ON_CUDA, device="cpu"), replace(ON_CUDA, backend="reference")):
        assert compiled_ahead(runtime, **order) is None
    for name, value in (("ARB_AHEAD", "0"), ("TRITON_INTERPRET", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert compiled_ahead(ON_CUDA, **order) is None
    with monkeypatch.context() as patch:
        patch.setattr(start, "cores", lambda: 1)
        assert compiled_ahead(ON_CUDA, **order) is None
    SMOKE.files().parent.mkdir()
    SMOKE.files().write_text(json.dumps([str(caches)]))
    assert compiled_ahead(ON_CUDA, **order) is None and started == [SMOKE]

    def refused(order: Order) -> None:
        raise OSError("no process more")

    SMOKE.files().write_text("no list")
    monkeypatch.setattr(start, "Ahead", refused)
    assert compiled_ahead(ON_CUDA, **order) is None


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
    }
    orders = [SMOKE, *(replace(SMOKE, **{name: value}) for name, value in others.items())]
    assert set(others) == {field.name for field in fields(Order)}
    assert [Order.from_json(order.to_json()) for order in orders] == orders
    places = {order.files() for order in orders}
    for name, value in (("TRITON_CACHE_DIR", "/elsewhere"), ("ARB_PATH", "triton")):
        monkeypatch.setenv(name, value)
        places.add(SMOKE.files())
    assert len(places) == len(orders) + 2 and {place.parent for place in places} == {tmp_path / "ahead"}


def test_the_name_of_a_kernel_is_that_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a called function needs is taken over after that function was hashed, whoever hashed it first."""
    order: list[str] = []

    class Called:
        @property
        def cache_key(self) -> str:
            order.append("hashed")
            return "its hash"

    monkeypatch.setattr(launch, "_update_hash", lambda finder, func: order.append("taken over"))
    launch.DependenciesFinder._update_hash(object(), Called())
    assert order == ["hashed", "taken over"]
