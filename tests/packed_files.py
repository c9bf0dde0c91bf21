"""The float architecture that packed_files_v1/in_turn was made of."""

from torch import Tensor, nn


class InTurn(nn.Module):
    """Decides by its images what it does, so that its members cannot be put into one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        if x.mean() > 0:
            x = self.body(x).relu() + x[:, :, 1:-1, 1:-1]
        return self.head(x.mean((2, 3)))
