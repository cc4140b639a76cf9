"""Attention of both models: causal, over whole sequences or document by document, in sliding windows or not.

Attention is torch's scaled_dot_product_attention (flash kernels on CPU and CUDA, no S x S matrix). Documents are
attended to one after another, each causally, and what lies between them is not computed. Rejected: a mask, with which
all of it is computed and hidden. Forward and backward of one sequence of 2048 tokens (4 heads of 64, fp32, one CPU
core): 54 ms as 4 documents, 158 ms with their mask, 99 ms as a whole. In a layer with a sliding window some queries at
a time meet the keys of their windows alone, under a mask of the size of these. Torch's kernels have no soft cap of the
scores: with one, some queries at a time meet all of their keys, and what they made is made again in backward.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

#: Queries of a layer with a sliding window that are worked on at once. More would meet more keys outside their windows.
_WINDOW_ROWS = 512


class ScaledDotProductAttention(nn.Module):
    """Causal attention of megatron-core's core_attention interface, by torch's fused kernels.

    soft_cap: c of c tanh(score / c), which takes the place of the scores; 0: none.
    """

    soft_cap = 0.0

    @classmethod
    def capped_at(cls, soft_cap: float) -> type["ScaledDotProductAttention"]:
        return type(cls.__name__, (cls,), {"soft_cap": soft_cap}) if soft_cap else cls

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object = None,
    ):
        super().__init__()
        assert not attention_dropout
        self.softmax_scale = softmax_scale
        #: How many keys a query meets at most, itself among them; None: all before it.
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):  # type: ignore[arg-type]
            assert config.window_size is not None
            self.window = config.window_size[0] + 1
        self.cp_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        """query [s, b, heads/tp, c], key and value [s, b, groups/tp, c] -> [s, b, heads/tp * c]; always causal.

        attention_mask: of `data.batches.find_documents`, on the CPU; None where tokens attend to other documents too.
        As an argument it takes megatron-core's own way through recomputation, which has no other.
        With context parallelism s is this rank's part of the sequence, in two pieces (`own_part_of_sequence`).
        """
        assert attention_bias is None and packed_seq_params is None
        documents = None if attention_mask is None else attention_mask.tolist()
        if documents is not None and len(documents) == query.shape[1]:
            documents = None  # no row holds more than one
        if self.cp_group.size() == 1:
            return self._attend_piece(query, key, value, 0, documents)
        size, rank, piece = self.cp_group.size(), self.cp_group.rank(), len(query) // 2
        key, value = self._gather_sequence(key, value)
        pieces = ((query[:piece], rank), (query[piece:], 2 * size - 1 - rank))
        return torch.cat([self._attend_piece(part, key, value, place * piece, documents) for part, place in pieces])

    def _attend_piece(
        self, query: Tensor, key: Tensor, value: Tensor, begin: int, documents: list[list[int]] | None
    ) -> Tensor:
        """Attention of the queries of a piece of the sequence that begins at `begin`; keys are of all of it."""
        end = begin + len(query)  # what comes later is not attended to
        if documents is None:
            return self._attend(query, key[:end], value[:end])
        rows = []
        split_rows = zip(query.split(1, dim=1), key.split(1, dim=1), value.split(1, dim=1), strict=True)
        for row, (queries, keys, values) in enumerate(split_rows):
            inside = [(first, min(last, end)) for of, first, last in documents if of == row and begin < last]
            inside = [(first, last) for first, last in inside if first < end]
            num_keys = [last - first for first, last in inside]
            of_documents = zip(
                queries.split([last - max(first, begin) for first, last in inside]),
                keys[inside[0][0] : end].split(num_keys),
                values[inside[0][0] : end].split(num_keys),
                strict=True,
            )
            rows.append(torch.cat([self._attend(*of_document) for of_document in of_documents]))
        return torch.cat(rows, dim=1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of queries that are the last of the keys' tokens."""
        if self.window is not None and self.window < len(key):
            return self._attend_in_rows(query, key, value, self.window)
        if self.soft_cap:
            return self._attend_in_rows(query, key, value, len(key))
        mask = None
        if len(query) < len(key):
            from torch.nn.attention.bias import causal_lower_right  # here, since it imports torch.compile's front end

            mask = causal_lower_right(len(query), len(key))
        return self._attend_under(mask, query, key, value)

    def _attend_in_rows(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        """The same, of no more than `window` keys to each query, the last of them its own."""
        rows, before = min(window, _WINDOW_ROWS), len(key) - len(query)
        parts = []
        for begin in range(before, len(key), rows):
            end, first = min(begin + rows, len(key)), max(begin + 1 - window, 0)
            size, offset = (end - begin, end - first), begin - first  # of the part's first query among its keys
            mask = torch.ones(size, dtype=torch.bool, device=query.device).tril_(offset).triu_(offset + 1 - window)
            queries = query[begin - before : end - before]
            parts.append(self._attend_under(mask, queries, key[first:end], value[first:end]))
        return torch.cat(parts)

    def _attend_under(self, mask: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention under a mask that torch takes; None: causal, of as many queries as keys."""
        if self.soft_cap:
            from torch.utils.checkpoint import checkpoint  # here, since it imports torch.compile's front end

            attend = partial(capped_attention, cap=self.soft_cap, scale=self.softmax_scale)
            return checkpoint(attend, mask, query, key, value, use_reentrant=False, preserve_rng_state=False)
        is_grouped = query.shape[2] != key.shape[2]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads/tp, s, c]
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=is_grouped,
        )
        return context.permute(2, 0, 1, 3).flatten(2)  # [s, b, heads/tp * c]

    def _gather_sequence(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence, in its order, from every context parallel rank's two pieces."""
        both = torch.cat([key, value], dim=-1)
        gathered = gather_from_sequence_parallel_region(both, group=self.cp_group)  # backward: reduce-scatter
        pieces = gathered.chunk(2 * self.cp_group.size())  # pieces 0, 2 cp - 1, 1, 2 cp - 2, ...
        # Not by a list of indexes: CUDA would wait while it is copied to the device, in every layer.
        key, value = torch.cat(pieces[::2] + pieces[::-2]).chunk(2, dim=-1)
        return key, value


def capped_attention(
    mask: Tensor, query: Tensor, key: Tensor, value: Tensor, *, cap: float, scale: float | None
) -> Tensor:
    """Attention whose scores are softly capped, the softmax in fp32 or better. Shapes as of
    `ScaledDotProductAttention`; mask [queries, keys], True where a query meets a key."""
    queries_of_group = query.shape[2] // key.shape[2]
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads/tp, s, c]
    query = query.unflatten(1, (-1, queries_of_group))  # [b, groups/tp, heads of a group, s, c]
    scores = query @ key.unsqueeze(2).transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    capped = torch.tanh(wide / cap) * cap
    weights = capped.masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype)
    context = (weights @ value.unsqueeze(2)).flatten(1, 2)
    return context.permute(2, 0, 1, 3).flatten(2)  # [s, b, heads/tp * c]
