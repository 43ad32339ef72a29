"""What this machine can do: its instruction sets, caches and GPUs, and how fast it reads, copies and multiplies.

Hardware is asked once, here. An instruction set counts only where CPUID, XGETBV and, for AMX, Linux's permission all
agree. `PARCO_ISA` forces one for the whole process; one that the machine lacks is an error, since a quiet fallback
would make every timing a lie. The peaks are measured, not looked up: a virtual machine's share of its host is in no
data sheet.
"""

import functools
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch  # before parco._C: the extension then shares the libgomp that torch has loaded

try:
    from parco import _C
except ImportError as error:
    raise ImportError(
        f"parco's compiled part cannot be loaded ({error}): run `make build` in the clone, or reinstall parco"
    ) from error

ISAS = ("generic", "avx2", "avx512", "avx512_vbmi", "amx")
"""Levels of instruction set, each containing those before it. `avx2`: AVX2, FMA, F16C and BMI2. `avx512`: F, BW, VL
and DQ. `avx512_vbmi`: VBMI, VBMI2 and VNNI too. `amx`: AVX-512's BF16, AMX-TILE, AMX-INT8 and AMX-BF16 too."""

ELEMENTS = ("fp32", "bf16", "int16", "int8")

_FEATURES = ("avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
_RUN_SECONDS = 0.015
_REPEATS = 5
_PASSES = 3
_WAITING = 0.05
"""Of the probes' time, what threads may wait for a processor until the machine counts as busy."""
_TRIES = 4


@dataclass(frozen=True)
class Machine:
    """One machine. Sizes are in bytes: caches of one core (l1d, l2) or shared (l3), 0 where the CPU does not say."""

    cpu: str
    isas: tuple[str, ...]
    features: tuple[str, ...]
    cores: int
    l1d: int
    l2: int
    l3: int
    memory: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Peaks:
    """What this machine reached in small probes with all of torch's threads: upper bounds for any kernel.

    `read_bytes_per_second` and `copy_bytes_per_second` (each byte read and written) are of buffers larger than the last
    cache where memory allows. `multiply_adds_per_second` maps fp32, bf16, int16 and int8 to products on operands in the
    L1 cache with the best instructions of `isa()`.
    """

    read_bytes_per_second: float
    copy_bytes_per_second: float
    multiply_adds_per_second: Mapping[str, float]

    def multiply_adds(self, element: str) -> float:
        """Multiply-adds per second on `element`, or on fp32 where the processor does more of those: so a library would
        do them, as it does bf16's on AVX-512.
        """
        rates = self.multiply_adds_per_second
        return max(rates[element], rates["fp32"])


@functools.cache
def detect() -> Machine:
    """This machine. `cores` are the logical cores that this process may run on; `memory` is what it may use."""
    found = _C.machine_features()
    return Machine(
        cpu=found.model,
        isas=_isas(),
        features=tuple(name for name in _FEATURES if getattr(found, name)),
        cores=len(os.sched_getaffinity(0)),
        l1d=found.l1d,
        l2=found.l2,
        l3=found.l3,
        memory=_memory(),
        gpus=_gpus(),
    )


@functools.cache
def _isas() -> tuple[str, ...]:
    """The usable instruction sets, the least first. Apart from `detect`, because every operation asks, and looking for
    GPUs starts CUDA."""
    found = _C.machine_features()
    return ("generic", *(name for name in ISAS[1:] if getattr(found, name)))


def _gpus() -> tuple[str, ...]:
    """Names of the GPUs; none where CUDA cannot be started here (a forked process, a broken driver)."""
    try:
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    except RuntimeError:
        return ()


def _memory() -> int:
    """Bytes of physical memory, or the control group's limit where it is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.exists():
            text = path.read_text().strip()
            return min(physical, int(text)) if text.isdigit() else physical
    return physical


@functools.cache
def isa() -> str:
    """The instruction set that kernels use: the best of this machine, or the one that the variable PARCO_ISA names.

    Read once. Raises ValueError where PARCO_ISA is not one of the machine's, naming those that are.
    """
    usable = _isas()
    forced = os.environ.get("PARCO_ISA")
    if not forced:
        return usable[-1]
    if forced not in usable:
        problem = "this machine does not have" if forced in ISAS else "parco does not know"
        raise ValueError(
            f"PARCO_ISA={forced!r} names an instruction set that {problem}; usable here: {', '.join(usable)}"
        )
    return forced


def has(level: str) -> bool:
    """Whether kernels may use this instruction set, one of ISAS: whether `isa()` contains it."""
    return contains(isa(), level)


def contains(isa: str, level: str) -> bool:
    """Whether the first of two instruction sets, both of ISAS, is the second or one above it."""
    return ISAS.index(isa) >= ISAS.index(level)


def release_memory() -> None:
    """Give memory that was freed back to the system: for after much of it was used for a while, such as for matrices
    that have been stored in fewer bits. The C library keeps it otherwise, between blocks in use.
    """
    _C.machine_release_memory()


def cache_folder() -> Path:
    """Where measurements are kept: $PARCO_CACHE, or parco in $XDG_CACHE_HOME or in ~/.cache. Not created here."""
    if chosen := os.environ.get("PARCO_CACHE"):
        return Path(chosen)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "parco"
    return Path.home() / ".cache" / "parco"


def conditions() -> dict[str, str | int]:
    """What every measurement on this machine depends on, as the key under which it is kept: the CPU's model, the
    instruction set, torch.get_num_threads(), and parco's version and compiled extension.
    """
    return {
        "cpu": detect().cpu,
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "version": metadata.version("parco"),
        "extension": extension(),
    }


@functools.cache
def extension() -> str:
    """A hash of the compiled extension: kernels change more often than the version. Of its bytes, not of its path and
    time, so that two installations of one wheel share their measurements.
    """
    return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:16]


def peaks(refresh: bool = False) -> Peaks:
    """The measured peaks with torch.get_num_threads() threads, from the cache unless `refresh` asks for new ones.

    Measuring takes about two seconds. The cache is keyed by `conditions()`; a damaged entry is measured again and
    replaced. What was measured while other programs had the processors is no peak: it is measured again the next time,
    up to four times, and the best of each is kept. Where the cache folder cannot be written a warning says so.
    """
    key = conditions()
    path = cache_folder() / f"peaks-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    known, tries = _read(path, key)
    if known is not None and not refresh and not 0 < tries < _TRIES:
        return known
    began, waited = time.perf_counter(), _waited()
    found = _measure(isa(), torch.get_num_threads())
    waiting = sum(max(0.0, now - waited.get(thread, 0.0)) for thread, now in _waited().items())
    busy = waiting > _WAITING * torch.get_num_threads() * (time.perf_counter() - began)
    if known is not None and (busy or not refresh):
        found = best(known, found)
    # A measurement that was quiet stays one.
    tries = tries + 1 if busy and (known is None or tries) else 0
    try:
        _write(path, {"key": key, "peaks": asdict(found), "busy_tries": tries})
    except OSError as error:
        warnings.warn(f"the measured peaks cannot be kept for the next run: {error}", stacklevel=2)
    return found


def best(one: Peaks, other: Peaks) -> Peaks:
    """The better of each: a probe too is slowed by other work."""
    return Peaks(
        max(one.read_bytes_per_second, other.read_bytes_per_second),
        max(one.copy_bytes_per_second, other.copy_bytes_per_second),
        {e: max(one.multiply_adds_per_second[e], other.multiply_adds_per_second[e]) for e in ELEMENTS},
    )


def _waited() -> dict[str, float]:
    """Seconds that each thread of this process has waited for a processor so far; none where Linux does not count."""
    found: dict[str, float] = {}
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            found[task.parent.name] = int(task.read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):  # a thread that has ended
            continue
    return found


def _measure(level: str, threads: int) -> Peaks:
    # Twice the last cache, so that most of each pass comes from memory; bounded, so that a small machine holds it and
    # the probe stays short.
    size = min(max(2 * detect().l3, 128 << 20), 512 << 20, detect().memory // 16)
    return Peaks(
        read_bytes_per_second=_C.machine_read_bytes_per_second(level, size, threads, _PASSES),
        copy_bytes_per_second=_C.machine_copy_bytes_per_second(size // 2, threads, _PASSES),
        multiply_adds_per_second={
            element: _C.machine_multiply_adds_per_second(level, element, threads, _RUN_SECONDS, _REPEATS)
            for element in ELEMENTS
        },
    )


def _read(path: Path, key: dict[str, str | int]) -> tuple[Peaks | None, int]:
    """The peaks kept in `path` for `key`, or None where there are none or the file is damaged, and how often they were
    measured on a busy machine, 0 once it was not busy.
    """
    try:
        entry = cast(dict[str, Any], json.loads(path.read_text()))
        kept = Peaks(**entry["peaks"])
        rates = [
            kept.read_bytes_per_second,
            kept.copy_bytes_per_second,
            *(kept.multiply_adds_per_second[e] for e in ELEMENTS),
        ]
        right = entry["key"] == key and all(rate > 0 for rate in rates)
        return (kept, int(entry["busy_tries"])) if right else (None, 0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None, 0


def _write(path: Path, entry: dict[str, object]) -> None:
    """Whole or not at all: a reader in another process never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(entry, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
