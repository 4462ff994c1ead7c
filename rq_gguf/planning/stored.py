"""Errors by the types that matrices are really stored in: rows that a type's blocks do not fit take another."""

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration
from rq_gguf.format import GROUPS
from rq_gguf.planning.budget import ExpertShape
from rq_gguf.planning.error import measured_error
from rq_gguf.types import by_stored_type, rank


def stored_errors(calibration: Calibration, shape: ExpertShape, types: tuple[str, ...]) -> tuple[dict[str, NDArray[np.float64]], ...]:
    """Per group: stored type -> [layers, n_expert] error (error.measured_error) with all of an expert's instances in it, from few bits to
    many.

    Of several measured types that are stored as the same one any would do; taken is the one of that name, or else the last.
    UserError where a type was not measured.
    """
    found = []
    table, measured = measured_error(calibration, types), types
    if calibration.types:
        table, measured = measured_error(calibration, calibration.types), calibration.types
    for g in range(len(GROUPS)):
        columns = shape.columns(g)
        stand_ins = by_stored_type(measured, columns)
        names = sorted(by_stored_type(types, columns), key=rank)
        found.append({t: table[:, :, g, measured.index(t) if t in measured else stand_ins[t][-1]] for t in names})
    return tuple(found)
