"""A small GPT over bytes: 256 tokens, learned positions, pre-norm blocks, output tied to the embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `ByteGPT`.

    Attributes:
        layers: transformer blocks.
        heads: attention heads; must divide `width`.
        width: elements of a token's vector.
        context: longest sequence, in bytes.
        dropout: probability with which an element is dropped, in attention and after each sublayer.
    """

    layers: int = 4
    heads: int = 4
    width: int = 160
    context: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each added to its input after a layer norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch x context x width tensor to one of the same shape."""
        dropout = self.dropout if self.training else 0.0
        # batch x context x 3 width -> three of batch x heads x context x width/heads
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + F.dropout(self.attention_out(heads.transpose(1, 2).flatten(-2)), dropout)
        return x + F.dropout(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))), dropout)


class ByteGPT(nn.Module):
    """A language model over bytes; the same seed gives the same weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(256, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        for name, param in self.named_parameters():
            if param.ndim < 2:
                continue  # norms and biases as torch made them
            # Two additions to the residual stream a block: their sum must not grow with the depth.
            depth = (2 * config.layers) ** -0.5 if name.endswith(("attention_out.weight", "mlp_out.weight")) else 1.0
            nn.init.normal_(param, std=0.02 * depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch x context, int64) to the logits of each next byte (batch x context x 256)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)
