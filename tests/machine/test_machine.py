import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parco import _C, machine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path))
    return tmp_path


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_instruction_sets_are_those_the_kernel_reports() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    added = {
        "generic": set[str](),
        "avx2": {"avx2", "fma", "f16c", "bmi2"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_vbmi": {"avx512vbmi", "avx512_vbmi2", "avx512_vnni"},
        "amx": {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
    }
    found = machine.detect().isas
    assert found[0] == "generic"
    assert list(found) == [name for name in machine.ISAS if name in found], "in order of level"
    needed = set[str]()
    for name in machine.ISAS:
        needed |= added[name]
        assert (name in found) == (needed <= flags), name
    for feature in ("avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16"):
        assert (feature in machine.detect().features) == (feature in flags)


def test_the_machine_is_described_in_full() -> None:
    found = machine.detect()
    assert found.cpu.strip() == found.cpu != ""
    assert found.cores == len(os.sched_getaffinity(0))
    assert 8 << 10 <= found.l1d <= found.l2
    assert found.memory > 256 << 20
    assert len(found.gpus) == torch.cuda.device_count()
    assert machine.detect() is found


@pytest.mark.parametrize("isa", machine.detect().isas)
def test_every_instruction_set_of_this_machine_can_be_forced(isa: str) -> None:
    ran = in_fresh_process("from parco import machine; print(machine.isa())", PARCO_ISA=isa)
    assert ran.stdout.split() == [isa], ran.stderr


def test_without_force_the_best_is_used() -> None:
    ran = in_fresh_process("from parco import machine; print(machine.isa())", PARCO_ISA="")
    assert ran.stdout.split() == [machine.detect().isas[-1]], ran.stderr


@pytest.mark.parametrize(
    ("isa", "problem"), [("sse9", "does not know"), ("amx", "does not have"), ("AVX2", "does not know")]
)
def test_an_instruction_set_that_cannot_be_had_is_an_error(
    isa: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa in machine.detect().isas:
        pytest.skip(f"this machine has {isa}")
    monkeypatch.setenv("PARCO_ISA", isa)
    machine.isa.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"{isa}.*{problem}.*usable here: generic"):
            machine.isa()
    finally:
        machine.isa.cache_clear()


def test_a_level_contains_those_before_it() -> None:
    for i, isa in enumerate(machine.ISAS):
        assert [machine.contains(isa, level) for level in machine.ISAS] == [j <= i for j in range(len(machine.ISAS))]
    assert [level for level in machine.ISAS if machine.has(level)][-1] == machine.isa()


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert machine.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PARCO_CACHE")
    assert machine.cache_folder() == tmp_path / "shared" / "parco"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.cache_folder() == tmp_path / ".cache" / "parco"


def test_peaks_are_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_waited", dict)
    first = machine.peaks()
    assert first.read_bytes_per_second > 0
    assert first.copy_bytes_per_second > 0
    assert set(first.multiply_adds_per_second) == set(machine.ELEMENTS)
    assert all(rate > 0 for rate in first.multiply_adds_per_second.values())

    (path,) = cache.iterdir()
    kept = json.loads(path.read_text())
    assert kept["key"]["threads"] == torch.get_num_threads()

    other = machine.Peaks(1.0, 1.0, dict.fromkeys(machine.ELEMENTS, 1.0))
    monkeypatch.setattr(machine, "_measure", lambda level, threads: other)
    assert machine.peaks() == first, "the second time comes from the cache"
    assert machine.peaks(refresh=True) == other
    assert machine.peaks() == other, "what was measured anew is kept"


def test_peaks_of_another_build_of_the_extension_are_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_waited", dict)
    reads_in_turn(monkeypatch, [3.0, 2.0])
    assert machine.peaks().read_bytes_per_second == 3.0
    monkeypatch.setattr(machine, "extension", lambda: "another build")
    assert machine.peaks().read_bytes_per_second == 2.0


def test_an_extension_is_known_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is installed, and in every process."""
    copy = tmp_path / "_C.so"
    copy.write_bytes(Path(_C.__file__).read_bytes())
    here = machine.extension()
    assert in_fresh_process("from parco import machine; print(machine.extension())").stdout.split() == [here]
    monkeypatch.setattr(_C, "__file__", str(copy))
    assert machine.extension.__wrapped__() == here
    copy.write_bytes(copy.read_bytes() + b"1")
    assert machine.extension.__wrapped__() != here


def reads_in_turn(monkeypatch: pytest.MonkeyPatch, speeds: list[float]) -> None:
    """Every measurement finds the next of these speeds of reading."""
    left = iter(speeds)
    monkeypatch.setattr(
        machine, "_measure", lambda *_: machine.Peaks(next(left), 1.0, dict.fromkeys(machine.ELEMENTS, 4.0))
    )


def test_what_was_measured_on_a_busy_machine_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter(range(0, 1000, 10))
    monkeypatch.setattr(machine, "_waited", lambda: {"1": float(next(waited)), "2": 0.0})
    reads_in_turn(monkeypatch, [3.0, 2.0, 7.0, 5.0, 9.0])
    found = [machine.peaks().read_bytes_per_second for _ in range(5)]
    assert found == [3.0, 3.0, 7.0, 7.0, 7.0], "the best so far, and four times are enough"
    assert machine.peaks(refresh=True).read_bytes_per_second == 9.0


def test_a_busy_refresh_takes_nothing_from_a_quiet_measurement(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([{"1": 0.0}, {"1": 0.0}, {"1": 0.0, "2": 0.0}, {"1": 10.0}, {}, {}])
    monkeypatch.setattr(machine, "_waited", lambda: next(waited))
    reads_in_turn(monkeypatch, [3.0, 2.0, 1.0])
    found = [machine.peaks(refresh=refresh).read_bytes_per_second for refresh in (False, True, False, True, False)]
    assert found == [3.0, 3.0, 3.0, 1.0, 1.0], "a thread has ended; a quiet refresh replaces what was known"


def test_a_quiet_measurement_ends_the_tries(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([0.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(machine, "_waited", lambda: {"1": next(waited)})
    reads_in_turn(monkeypatch, [3.0, 2.0])
    assert [machine.peaks().read_bytes_per_second for _ in range(4)] == [3.0] * 4


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not count waiting")
def test_waiting_for_a_processor_is_counted() -> None:
    code = """
import os, time
from parco import machine
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
one = os.fork()
work(0.5)
if one:
    os.waitpid(one, 0)
    print(sum(machine._waited().values()))
"""
    waited = float(in_fresh_process(code).stdout)
    assert waited > 0.1, "two processes on one processor wait for each other"


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"key": {}, "peaks": {"read_bytes_per_second": 1}}', "\x00"])
def test_a_damaged_cache_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    right = machine.Peaks(3.0, 2.0, dict.fromkeys(machine.ELEMENTS, 5.0))
    monkeypatch.setattr(machine, "_measure", lambda level, threads: right)
    machine.peaks()
    (path,) = cache.iterdir()
    path.write_text(damage)
    assert machine.peaks() == right
    assert json.loads(path.read_text())["peaks"]["read_bytes_per_second"] == 3.0
    assert list(cache.iterdir()) == [path], "no temporary file stays behind"


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path / "file"))
    right = machine.Peaks(3.0, 2.0, dict.fromkeys(machine.ELEMENTS, 5.0))
    monkeypatch.setattr(machine, "_measure", lambda level, threads: right)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert machine.peaks() == right


@pytest.mark.parametrize("isa", machine.detect().isas)
@pytest.mark.parametrize("element", machine.ELEMENTS)
def test_every_probe_of_every_instruction_set_runs(isa: str, element: str) -> None:
    assert _C.machine_multiply_adds_per_second(isa, element, threads=2, seconds=1e-4, repeats=3) > 0
    assert _C.machine_read_bytes_per_second(isa, bytes=100_000, threads=2, repeats=3) > 0


def test_probes_refuse_what_they_cannot_run() -> None:
    with pytest.raises(ValueError, match="isa"):
        _C.machine_multiply_adds_per_second("sse9", "fp32", threads=1, seconds=1e-4, repeats=1)
    with pytest.raises(ValueError, match="element"):
        _C.machine_multiply_adds_per_second("generic", "fp13", threads=1, seconds=1e-4, repeats=1)
    with pytest.raises(ValueError, match="threads"):
        _C.machine_copy_bytes_per_second(4096, threads=0, repeats=1)


def test_the_extension_shares_the_openmp_runtime_of_torch() -> None:
    code = "import parco.machine; print(open('/proc/self/maps').read())"
    ran = in_fresh_process(code)
    runtimes = {line.split()[-1] for line in ran.stdout.splitlines() if "libgomp" in line}
    assert len(runtimes) == 1, ran.stdout + ran.stderr
    assert Path(runtimes.pop()).is_relative_to(Path(torch.__file__).parent)


def test_kernels_do_not_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a forked process, where CUDA cannot be started again."""

    def fails() -> int:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "device_count", fails)
    machine.isa.cache_clear()
    assert machine.isa() in machine.ISAS
    assert machine.detect.__wrapped__().gpus == ()


def test_multiply_adds_of_an_element_are_those_of_fp32_where_these_are_more() -> None:
    found = machine.Peaks(1.0, 1.0, {"fp32": 3.0, "bf16": 2.0, "int16": 4.0, "int8": 8.0})
    assert [found.multiply_adds(element) for element in machine.ELEMENTS] == [3.0, 3.0, 4.0, 8.0]
