"""A transformer over an image's codes, whose sequence has one element per position, not per code.

A transformer over the H·W positions gives each a context; the m codes of a position follow one
another in residual MLPs on the context and the codes before them. This is the factorisation of
Lee et al., "Autoregressive Image Generation using Residual Quantization", CVPR 2022, with MLPs in
place of their depth transformer. With causal=False the same network fills in masked positions, as
Chang et al., "MaskGIT", CVPR 2022, do.

Symbols: B images, L = H·W positions, m slots, K codevectors, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .spec import Prior

if TYPE_CHECKING:
    from .config import PriorConfig
    from .spaces import CodeSpace

BLOCK = 2**26  # numbers in the widest layer's output for the codes of a block


class Cache:
    """Keys and values of the positions so far, of one block."""

    def __init__(self, size: int) -> None:
        self.size, self.filled = size, 0
        self.stored: Tensor | None = None  # (2, B, heads, size, D/heads)

    def extend(self, keys_values: Tensor) -> Tensor:
        """Append those of new positions, (2, B, heads, t, D/heads); return all so far."""
        if self.stored is None:
            shape = list(keys_values.shape)
            shape[3] = self.size
            self.stored = keys_values.new_empty(shape)
        start, self.filled = self.filled, self.filled + keys_values.shape[3]
        self.stored[:, :, :, start : self.filled] = keys_values
        return self.stored[:, :, :, : self.filled]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (B,) of the batch."""
        if self.stored is not None:
            self.stored = self.stored[:, rows]


class Block(nn.Module):
    """Self-attention and MLP, each after a LayerNorm and added to its input: (B, L, D) → same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mlp = MLP(width, dropout)

    def forward(self, x: Tensor, *, causal: bool, cache: Cache | None = None) -> Tensor:
        split = self.queries_keys_values(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        split = split.permute(2, 0, 3, 1, 4)  # (3, B, heads, L, D/heads)
        queries, keys_values = split[0], split[1:]
        if cache is not None:  # x is one position, which sees all before it
            keys_values = cache.extend(keys_values)
        rate = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(
            queries,
            keys_values[0],
            keys_values[1],
            dropout_p=rate,
            is_causal=causal and cache is None,
        )
        x = x + F.dropout(self.output(seen.transpose(1, 2).flatten(2)), rate)
        return self.mlp(x)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """LayerNorm and two linear layers around a GELU, added to their input: (…, D) → same shape."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
            nn.Linear(4 * width, width), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class CodeTransformer(Prior):
    """Probability of an image's codes (B, H, W, m), given its class where there are classes.

    Args:
        config: hyper-parameters.
        space: the codes.
        num_classes: 0 for a prior without classes. Label −1 stands for no class.
        causal: positions follow one another in raster order; otherwise masked ones are filled in.
    """

    space: CodeSpace

    def __init__(
        self, config: PriorConfig, space: CodeSpace, num_classes: int = 0, *, causal: bool = True
    ) -> None:
        super().__init__()
        width, slots = config.width, space.num_slots
        self.space, self.num_classes, self.causal = space, num_classes, causal
        self.codes = nn.Embedding(slots * space.num_embedding, width)
        self.blank = nn.Parameter(torch.empty(width))  # before the first position, or masked
        self.rows = nn.Parameter(torch.empty(space.height, 1, width))
        self.columns = nn.Parameter(torch.empty(space.width, width))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.earlier_codes = nn.Embedding(slots * space.num_embedding, width)
        self.slots = nn.Parameter(torch.empty(slots, width))
        self.depth = nn.Sequential(
            *(MLP(width, config.dropout) for _ in range(config.depth_layers)), nn.LayerNorm(width)
        )
        self.head = nn.Linear(width, space.num_embedding)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.blank, self.rows, self.columns, self.slots):
            nn.init.normal_(table, std=0.02)

    def forward(
        self, codes: Tensor, labels: Tensor | None = None, masked: Tensor | None = None
    ) -> Tensor:
        """Negative log-likelihood of each code, in nats: (B, H, W, m) → (B, H, W, m).

        Args:
            codes: (B, H, W, m), int64.
            labels: (B,), int64; −1, the default, stands for no class.
            masked: (B, H, W), bool, the positions to be filled in; not for a causal model, in which
                every code is predicted from those before it, so that their sum is exact.
        """
        self.check(codes)
        codes = codes.flatten(1, 2)  # (B, L, m)
        embedded = self.embed(self.codes, codes).sum(2)
        if self.causal:
            embedded = torch.cat([self.blank.expand_as(embedded[:, :1]), embedded[:, :-1]], dim=1)
        elif masked is not None:
            embedded = torch.where(masked.flatten(1)[:, :, None], self.blank, embedded)
        contexts = self.contexts(embedded, labels)
        # Each slot sees the context and the codes of the slots before it.
        earlier = F.pad(self.embed(self.earlier_codes, codes)[:, :, :-1], (0, 0, 1, 0)).cumsum(2)
        nats = self.code_nats(contexts[:, :, None] + earlier + self.slots, codes)
        height, width = self.space.height, self.space.width
        return nats.view(len(codes), height, width, self.space.num_slots)

    def code_nats(self, states: Tensor, codes: Tensor) -> Tensor:
        """Negative log-likelihood (B·L·m,) of codes (B, L, m) from states (B, L, m, D).

        Where logits and activations would be large they exist for a block of codes at a time, and
        are computed again in the backward pass.
        """

        def block_nats(states: Tensor, codes: Tensor) -> Tensor:
            logits = self.head(self.depth(states)).flatten(0, -2).float()
            return F.cross_entropy(logits, codes.flatten(), reduction="none")

        size = max(1, BLOCK // max(self.head.out_features, 4 * self.head.in_features))
        if codes.numel() <= size:
            return block_nats(states, codes)
        blocks = zip(*(torch.split(x.flatten(0, 2), size) for x in (states, codes)))
        parts = [checkpoint(block_nats, *block, use_reentrant=False) for block in blocks]
        return torch.cat(parts)

    def check(self, codes: Tensor) -> None:
        """Raise ValueError if these are no codes of this space."""
        space = self.space
        if codes.shape[1:] != (space.height, space.width, space.num_slots):
            expected = f"(B, {space.height}, {space.width}, {space.num_slots})"
            raise ValueError(f"codes of shape {tuple(codes.shape)} are not {expected}")

    def embed(self, table: nn.Embedding, codes: Tensor) -> Tensor:
        """Embeddings of codes (…, m), each slot with vectors of its own: (…, m, D)."""
        first = torch.arange(self.space.num_slots, device=codes.device) * self.space.num_embedding
        return table(codes + first)  # type: ignore[no-any-return]

    def places(self) -> Tensor:
        """Embeddings of the positions, (L, D)."""
        return (self.rows + self.columns).flatten(0, 1)

    def contexts(
        self, embedded: Tensor, labels: Tensor | None, caches: list[Cache] | None = None
    ) -> Tensor:
        """Embedded inputs (B, t, D) → contexts of the same shape.

        With caches, the inputs are those of the next position only.
        """
        start = caches[0].filled if caches else 0
        x = embedded + self.places()[start : start + embedded.shape[1]]
        if self.classes is not None:
            none = torch.full((len(x),), -1, device=x.device) if labels is None else labels
            x = x + self.classes(none % (self.num_classes + 1))[:, None]
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            x = block(x, causal=self.causal, cache=caches[number] if caches else None)
        return self.norm(x)  # type: ignore[no-any-return]

    def slot_codes(self, contexts: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Codes (b, m) of positions whose contexts are (b, D), one slot after another.

        choose: logits (b, K) of a slot, and its number → codes (b,).
        """
        state, chosen = contexts, []
        for slot in range(self.space.num_slots):
            code = choose(self.head(self.depth(state + self.slots[slot])), slot)
            chosen.append(code)
            state = state + self.earlier_codes(code + slot * self.space.num_embedding)
        return torch.stack(chosen, dim=-1)
