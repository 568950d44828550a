"""What rows say together: what is known of each instance, and how solvers compare. Pure functions of rows."""

from repurpose_opt.bench.claims import SAME, Known, judged, known
from repurpose_opt.bench.curves import Profile, anytime, profile, times_to_target
from repurpose_opt.bench.pairs import Paired, paired, win_tie_loss
from repurpose_opt.bench.summary import SHIFT_SECONDS, Recommended, Summary, recommendations, size_of, summaries

__all__ = [
    "SAME",
    "SHIFT_SECONDS",
    "Known",
    "Paired",
    "Profile",
    "Recommended",
    "Summary",
    "anytime",
    "judged",
    "known",
    "paired",
    "profile",
    "recommendations",
    "size_of",
    "summaries",
    "times_to_target",
    "win_tie_loss",
]
