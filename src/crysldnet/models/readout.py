"""From the features of atoms to those of a crystal.

Shapes: ``B`` crystals, ``N`` atoms, ``D`` features.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch_geometric.utils import scatter, softmax


class AttentionPooling(nn.Module):
    """Weighted mean over a crystal's atoms, Σ_i softmax(w·h_i) h_i, with weights that are learned.

    It begins as the mean. Like the mean it doesn't change when the cell is repeated.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, features: Tensor, crystal: Tensor, n_crystals: int) -> Tensor:
        """Map [N, D] to [B, D]."""
        weight = softmax(self.score(features), crystal, num_nodes=n_crystals)
        return scatter(weight * features, crystal, 0, n_crystals, "sum")
