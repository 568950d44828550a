"""Files that other people's solvers read, and what those solvers write."""

from repurpose_opt.formats.common import Written
from repurpose_opt.formats.hgr import write_hgr
from repurpose_opt.formats.metis import write_metis
from repurpose_opt.formats.mps import write_mps
from repurpose_opt.formats.partition import nearest_placement, read_partition

__all__ = ["Written", "nearest_placement", "read_partition", "write_hgr", "write_metis", "write_mps"]
