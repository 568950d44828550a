"""A platform: what its workers compute and hold, and what the links between them carry."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repurpose_opt.errors import InvalidArgument, RepurposeError

Numbers: TypeAlias = NDArray[np.float64]
Topology: TypeAlias = Literal["fully_connected", "switch"]

HOPS: Mapping[str, int] = {"fully_connected": 1, "switch": 2}
"""Links that a message passes, by topology."""
_RATES = ("operations", "memory_bandwidth", "memory")
_LINKS = ("bandwidth", "latency")
_DEFAULTS = {"memory_bandwidth": math.inf, "memory": math.inf, "latency": 0.0, "overhead": 0.0}
_REQUIRED = ("operations", "bandwidth")


@dataclass(frozen=True, eq=False)
class Platform:
    """P workers and the links between them; infinity where something is no limit.

    Raises InvalidArgument where a field has another shape, a rate or capacity is not above 0, or a time is negative
    or infinite.
    """

    name: str
    operations: Numbers
    """(P,) a second, of each worker; a multiply-accumulate is two."""
    memory_bandwidth: Numbers
    """(P,) bytes a second between a worker and its memory."""
    memory: Numbers
    """(P,) bytes of memory."""
    bandwidth: Numbers
    """(P, P) bytes a second from worker p (row) to worker k (column); the diagonal has no meaning."""
    latency: Numbers
    """(P, P) seconds a hop; the diagonal has no meaning."""
    topology: Topology = "fully_connected"
    overhead: float = 0.0
    """Seconds that each exchange costs each worker that takes part in it, whatever is sent."""
    assumptions: tuple[str, ...] = ()
    """What is not given by whoever described the platform."""

    def __post_init__(self) -> None:
        P = len(self.operations)
        for name in (*_RATES, *_LINKS):
            given: Numbers = getattr(self, name)
            shape = (P,) if name in _RATES else (P, P)
            if given.shape != shape:
                raise InvalidArgument(name, f"shape {given.shape}", f"{shape}, for {P} workers")
            if name in _LINKS:
                given = given[~np.eye(P, dtype=bool)]
            _check(name, given)
        _check("overhead", np.array([self.overhead]))
        if self.topology not in HOPS:
            raise InvalidArgument("topology", repr(self.topology), ", ".join(HOPS))

    @property
    def n_workers(self) -> int:
        return len(self.operations)

    @property
    def hops(self) -> int:
        return HOPS[self.topology]

    @staticmethod
    def of(
        name: str,
        n_workers: int,
        *,
        operations: ArrayLike,
        bandwidth: ArrayLike,
        memory_bandwidth: ArrayLike = math.inf,
        memory: ArrayLike = math.inf,
        latency: ArrayLike = 0.0,
        topology: Topology = "fully_connected",
        overhead: float = 0.0,
        assumptions: tuple[str, ...] = (),
    ) -> Platform:
        """A platform of which each field is one number for all, or one for each worker or pair of workers."""
        given = {"operations": operations, "memory_bandwidth": memory_bandwidth, "memory": memory}
        rates = {key: _filled(key, value, (n_workers,)) for key, value in given.items()}
        links = {
            key: _filled(key, value, (n_workers, n_workers))
            for key, value in {"bandwidth": bandwidth, "latency": latency}.items()
        }
        return Platform(name, **rates, **links, topology=topology, overhead=overhead, assumptions=assumptions)


def datacenter(n_workers: int) -> Platform:
    """The Datacenter platform of RePurpose (AAAI 2023): 125 TOPS, 32 GB and NVLink at 150 GB/s a worker."""
    return Platform.of(
        "datacenter",
        n_workers,
        operations=125e12,
        memory_bandwidth=900e9,
        memory=32e9,
        bandwidth=150e9,
        latency=500e-9,
        assumptions=(
            "latency of 500 ns and memory bandwidth of 900 GB/s: the paper does not give them",
            "150 GB/s for each pair of workers, in each direction; 1 GB is 10^9 bytes",
        ),
    )


def edge(n_workers: int) -> Platform:
    """The Edge platform of RePurpose (AAAI 2023): 0.5 TOPS, 1 GB and Ethernet at 100 MB/s a worker."""
    return Platform.of(
        "edge",
        n_workers,
        operations=0.5e12,
        memory_bandwidth=10e9,
        memory=1e9,
        bandwidth=100e6,
        latency=50e-6,
        assumptions=(
            "latency of 50 µs and memory bandwidth of 10 GB/s: the paper does not give them",
            "100 MB/s for each pair of workers, in each direction; 1 MB is 10^6 bytes",
        ),
    )


PLATFORMS = {"datacenter": datacenter, "edge": edge}


def read_platform(path: Path, n_workers: int) -> Platform:
    """The platform in a TOML file, whose keys are the fields of Platform: one number for all, or lists.

    `operations` and `bandwidth` are required; what else is missing is no limit and takes no time. Raises
    RepurposeError, naming the file and the key.
    """
    try:
        return _of_content(tomllib.loads(path.read_text(encoding="utf-8")), path.stem, n_workers)
    except OSError as error:
        raise RepurposeError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RepurposeError(f"{path}: not a TOML file ({error})") from None
    except InvalidArgument as error:
        raise RepurposeError(f"{path}: {error}") from None


def _of_content(content: Mapping[str, Any], name: str, n_workers: int) -> Platform:
    texts = {"name": name, "topology": "fully_connected"}
    keys = (*_REQUIRED, *_DEFAULTS, *texts)
    for key in content:
        if key not in keys:
            raise InvalidArgument(key, "an unknown key", ", ".join(keys))
    for key in _REQUIRED:
        if key not in content:
            raise InvalidArgument(key, "nothing", "a number for all, or lists")
    for key in texts:
        if not isinstance(content.get(key, ""), str):
            raise InvalidArgument(key, repr(content[key]), "text")
    given: dict[str, Any] = {**_DEFAULTS, **texts, **content}
    given["overhead"] = float(_filled("overhead", given["overhead"], ()))
    missing = [f"{key} of {value:g}: not given" for key, value in _DEFAULTS.items() if key not in content]
    return Platform.of(n_workers=n_workers, assumptions=tuple(missing), **given)


def _filled(name: str, given: ArrayLike, shape: tuple[int, ...]) -> Numbers:
    """One number for all, or as many as `shape` says."""
    allowed = "a number" if shape == () else f"a number for all, or {' × '.join(map(str, shape))} of them"
    try:
        array = np.asarray(given)
    except ValueError:
        raise InvalidArgument(name, "rows of different lengths", allowed) from None
    if array.dtype.kind not in "iuf":
        raise InvalidArgument(name, repr(given), allowed)
    if array.ndim and array.shape != shape:
        raise InvalidArgument(name, f"{' × '.join(map(str, array.shape))} numbers", allowed)
    return np.broadcast_to(array.astype(np.float64), shape)


def _check(name: str, given: Numbers) -> None:
    is_time = name in ("latency", "overhead")
    fine = (given >= 0) & (given < math.inf) if is_time else given > 0
    if not fine.all():
        allowed = "finite seconds ≥ 0" if is_time else "numbers > 0, infinity for no limit"
        raise InvalidArgument(name, f"{given[~fine][0]:g}", allowed)
