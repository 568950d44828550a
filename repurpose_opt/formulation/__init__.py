"""What is minimised: the protocol, and the three formulations that come with the package."""

from repurpose_opt.formulation.edge import Edge
from repurpose_opt.formulation.lossless import Lossless, incidence, nets
from repurpose_opt.formulation.protocol import Formulation
from repurpose_opt.formulation.volume import Volume

__all__ = ["Edge", "Formulation", "Lossless", "Volume", "incidence", "nets"]
