"""The answer of a solve as bytes of an .npz file: owners, exchange and claims. Enough to recompute every figure."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.problem import LayerProblem


@dataclass(frozen=True)
class Claims:
    """What the process of a solve says of it. Nothing here is verified yet."""

    termination: str
    message: str
    objective: float | None
    bound: float | None
    surrogate_bound: float | None
    refused: tuple[str, ...]
    """Claims of the backend that the solve refused itself."""
    raised: str | None
    """Name of the exception that ended it."""
    seconds: float
    cpu_seconds: float
    trajectory: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class Answer:
    claims: Claims
    owner: NDArray[Any] | None
    """(m,) if it is right; nothing is checked."""
    exchange: Exchange | None

    def to_bytes(self) -> bytes:
        arrays: dict[str, Any] = {"claims": np.array(json.dumps(asdict(self.claims)))}
        if self.owner is not None and self.exchange is not None:
            arrays |= {"owner": self.owner, **self.exchange.arrays()}
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        return stream.getvalue()

    @staticmethod
    def of_bytes(data: bytes, problem: LayerProblem) -> Answer:
        """The answer in an .npz file. Raises InvalidArgument where it is none."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            told = json.loads(str(arrays.pop("claims")))
            steps = tuple((float(at), float(cost)) for at, cost in told.pop("trajectory"))
            claims = Claims(**{**told, "refused": tuple(told["refused"]), "trajectory": steps})
            owner = arrays.pop("owner", None)
            exchange = None if owner is None else Exchange.of_arrays(problem.n, problem.P, arrays)
        except Exception as error:  # damaged bytes make decoders raise anything
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise InvalidArgument("answer", f"no answer of a solve ({reason})", "an .npz file of a run") from None
        return Answer(claims, owner, exchange)
