"""A KV cache whose heads hold different numbers of tokens, packed without padding, and attention
over it.

The storage is one long tensor of slots; a slot holds the key (and value) of one token in one head.
A head here is one KV head of one sample. Heads that hold equally many tokens lie side by side as a
Group, which is a dense [count, room, d] view of the storage. One call of SDPA reads a group, with
the query heads of a KV head as rows. On CUDA in half precision one call of
`torch.nn.attention.varlen` reads all groups.

At each decode step a head appends a token. A head with a limit is a ring buffer: its first `sink`
tokens stay, and each new token overwrites the oldest of the others. Other heads get room for 64
more tokens when they are full, so the storage is rarely copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hooks.rows import Call

# slots that a full head gets: the storage is copied once in so many tokens
SLACK = 64


@dataclass
class Group:
    """Heads that hold equally many tokens, side by side in the packed storage.

    Args:
        first: their first slot.
        count: how many heads.
        room: slots of each head.
        length: how many of them hold a token.
        limit: each head is a ring buffer of that many slots; None: it grows without limit.
    """

    first: int
    count: int
    room: int
    length: int
    limit: int | None

    def of(self, packed: Tensor) -> Tensor:
        """This group's slots of a packed tensor, as a view [count, room, …]."""
        return packed[self.first : self.first + self.count * self.room].unflatten(
            0, (self.count, self.room)
        )


class Ragged:
    """One layer's keys and values, packed: each KV head of each sample holds its own number.

    Args:
        key, value: those of the prompt.
        keep: which of them are stored.
        limits: for each KV head how many tokens it may hold (then a new token overwrites the
            oldest); None: no limit; 0: the head stores nothing.
        sink: how many first tokens a head with a limit always keeps.
    """

    def __init__(
        self,
        key: Float[Tensor, "batch kv_head key d"],
        value: Float[Tensor, "batch kv_head key d_value"],
        keep: Bool[Tensor, "batch kv_head key"],
        limits: Sequence[int | None],
        sink: int = 0,
    ):
        self.batch, self.kv_heads, self.seen = key.shape[0], key.shape[1], key.shape[2]
        lengths, limit = keep.sum(2).flatten().tolist(), [*limits] * self.batch
        # Heads are sorted so that those of equal length and limit are neighbours: they become one
        # group. Heads with a limit are never grouped with others, because they wrap around there.
        held = [head for head in range(len(lengths)) if limit[head] != 0]
        held.sort(key=lambda head: (limit[head] is None, limit[head] or 0, lengths[head]))
        self.sink = sink
        self.groups: list[Group] = []
        for head in held:
            last = self.groups[-1] if self.groups else None
            if last is not None and (last.length, last.limit) == (lengths[head], limit[head]):
                last.count += 1
            else:
                first = 0 if last is None else last.first + last.count * last.room
                self.groups.append(Group(first, 1, lengths[head], lengths[head], limit[head]))

        device = key.device
        # The heads in the order of the storage, each as the number sample · kv_heads + KV head.
        self.heads = torch.tensor(held, dtype=torch.long, device=device)
        number, position = keep.flatten(0, 1)[self.heads].nonzero(as_tuple=True)
        sample, kv_head = self.heads[number] // self.kv_heads, self.heads[number] % self.kv_heads
        self.keys = key[sample, kv_head, position]
        self.values = value[sample, kv_head, position]
        self.token_positions = position.int()  # in the prompt, for each slot
        # The slot (counted from the head's first) that each head writes next: the one after its
        # tokens; in a full ring buffer the slot of the oldest token, which comes after the sink.
        offset: list[int] = []
        for group in self.groups:
            full_ring = group.length == group.limit
            offset += [min(sink, group.length) if full_ring else group.length] * group.count
        self._place(torch.tensor(offset, dtype=torch.long, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values. (Positions take four more a token.)"""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    # --- growing

    def append(
        self,
        key: Float[Tensor, "batch kv_head 1 d"],
        value: Float[Tensor, "batch kv_head 1 d_value"],
    ) -> None:
        """Append a new token in every head."""
        if any(group.length == group.room and group.length != group.limit for group in self.groups):
            self._make_room()
        self.keys.index_copy_(0, self.slots, key.flatten(0, 2)[self.heads])
        self.values.index_copy_(0, self.slots, value.flatten(0, 2)[self.heads])
        self.token_positions.index_fill_(0, self.slots, self.seen)
        self.seen += 1
        self.slots += 1
        if self.rings:  # after its last slot a ring buffer continues after its sink
            self.slots = torch.where(self.slots == self.ring_ends, self.ring_starts, self.slots)
            self.lengths = torch.minimum(self.lengths + 1, self.limits)
        else:
            self.lengths += 1
        for group in self.groups:
            group.length = (
                group.length + 1 if group.limit is None else min(group.length + 1, group.limit)
            )

    def _make_room(self) -> None:
        """Copy the storage into a larger one, with SLACK free slots a head (up to its limit)."""
        # The offset of a head's next slot from its own first slot does not change.
        offset, first, grown = self.slots - self.starts, 0, []
        for group in self.groups:
            room = group.length + SLACK
            room = room if group.limit is None else min(room, group.limit)
            grown.append(Group(first, group.count, room, group.length, group.limit))
            first += group.count * room
        for name in ("keys", "values", "token_positions"):
            old = getattr(self, name)
            new = old.new_empty(first, *old.shape[1:])
            for before, after in zip(self.groups, grown, strict=True):
                after.of(new)[:, : after.length] = before.of(old)[:, : before.length]
            setattr(self, name, new)
        self.groups = grown
        self._place(offset)

    slots: Int[Tensor, " head"]  # the slot that each head writes next
    lengths: Int[Tensor, " head"]

    def _place(self, offset: Int[Tensor, " head"]) -> None:
        """Compute the tables that `append` and the kernels read, from the groups.

        Args:
            offset: the slot that each head writes next, counted from its first.
        """
        device = offset.device

        def by_head(values: list[int], dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        members = [(group, number) for group in self.groups for number in range(group.count)]
        self.rings = any(group.limit is not None for group in self.groups)
        self.starts = by_head([group.first + number * group.room for group, number in members])
        self.slots = self.starts + offset
        self.lengths = by_head([group.length for group, _ in members], torch.int32)
        self.limits = by_head([group.limit or 1 << 30 for group, _ in members], torch.int32)
        self.ring_ends = torch.where(self.limits < 1 << 30, self.starts + self.limits, -1)
        self.ring_starts = self.starts + self.sink
        self.bounds = nn.functional.pad(self.starts.int(), (0, 1), value=len(self.keys))
        self.queries = torch.arange(len(members) + 1, dtype=torch.int32, device=device)
        self.room = max((group.room for group in self.groups), default=0)

    # --- reading

    def attend(
        self, query: Float[Tensor, "batch head 1 d"], call: Call
    ) -> Float[Tensor, "batch 1 head d_value"]:
        """Attention of the newest token over all stored tokens; 0 for a head that stores none."""
        if call.bias is not None:
            raise CorelensError(
                "a position bias over an evicted cache",
                "rotary positions",
                "decode with a full cache",
            )
        group = query.shape[1] // self.kv_heads
        queries = rearrange(query[:, :, 0], "batch (kv g) d -> (batch kv) g d", g=group)
        sink_logits = call.sink_logits
        if sink_logits is not None:
            sink_logits = sink_logits.float().view(-1, group)[self.heads % self.kv_heads]
        read = varlen if by_varlen(queries, self.values, call) else grouped
        z = queries.new_zeros(*queries.shape[:2], self.values.shape[-1])
        if self.groups:
            z[self.heads] = read(self, queries[self.heads], call, sink_logits)
        return rearrange(z, "(batch kv) g d -> batch 1 (kv g) d", batch=self.batch)

    def positions(self) -> list[list[Int[Tensor, " held"]]]:
        """The positions of the stored tokens, ascending, for each sample and KV head."""
        held = [self.token_positions.new_empty(0).long()] * (self.batch * self.kv_heads)
        heads = iter(self.heads.tolist())
        for group in self.groups:
            for head_positions in group.of(self.token_positions)[:, : group.length]:
                held[next(heads)] = head_positions.long().sort().values
        return [held[sample * self.kv_heads :][: self.kv_heads] for sample in range(self.batch)]

    def dense(
        self,
    ) -> tuple[Float[Tensor, "b kv key d"], Float[Tensor, "b kv key e"], Bool[Tensor, "b kv key"]]:
        """Keys and values by position, zero where none is stored, and a mask of the stored ones."""
        all_slots = torch.arange(len(self.keys), device=self.keys.device)
        used = [group.of(all_slots)[:, : group.length].flatten() for group in self.groups]
        slots = torch.cat(used or [self.heads])  # (without groups `heads` is empty)
        head = self.heads.repeat_interleave(self.lengths.long())
        where = head * self.seen + self.token_positions[slots]
        size = self.batch * self.kv_heads * self.seen
        key = self.keys.new_zeros(size, self.keys.shape[1]).index_copy_(0, where, self.keys[slots])
        value = self.values.new_zeros(size, self.values.shape[1]).index_copy_(
            0, where, self.values[slots]
        )
        held = torch.zeros(size, dtype=torch.bool, device=key.device).index_fill_(0, where, True)
        shape = (self.batch, self.kv_heads, self.seen)
        return key.unflatten(0, shape), value.unflatten(0, shape), held.view(shape)


# --- two ways to read


def grouped(
    store: Ragged,
    query: Float[Tensor, "head g d"],
    call: Call,
    sink_logits: Float[Tensor, "head g"] | None,
) -> Float[Tensor, "head g d_value"]:
    """Attention group by group: by SDPA, or by scores and a softmax in float32 where the call has a
    soft cap or sink logits, which SDPA does not support."""
    outputs, first = [], 0
    for group in store.groups:
        members = slice(first, first + group.count)
        first += group.count
        q = query[members]
        key = group.of(store.keys)[:, : group.length]
        value = group.of(store.values)[:, : group.length]
        if call.softcap is None and sink_logits is None:
            z = nn.functional.scaled_dot_product_attention(
                q[None], key[None], value[None], scale=call.scaling
            )[0]
        else:
            scores = (q @ key.transpose(1, 2)).float() * call.scaling
            if call.softcap is not None:
                scores = torch.tanh(scores / call.softcap) * call.softcap
            if sink_logits is not None:
                scores = torch.cat([scores, sink_logits[members, :, None]], dim=2)
            z = scores.softmax(dim=2)[..., : group.length].to(value.dtype) @ value
        outputs.append(z)
    return torch.cat(outputs)


def by_varlen(query: Tensor, value: Tensor, call: Call) -> bool:
    """Whether `varlen` supports this: half precision on CUDA, no soft cap, and a head width that
    its kernels have."""
    width = query.shape[-1]
    supported = width % 8 == 0 and width <= 256 and value.shape[-1] == width
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return half and supported and call.softcap is None


def varlen(
    store: Ragged,
    query: Float[Tensor, "head g d"],
    call: Call,
    sink_logits: Float[Tensor, "head g"] | None,
) -> Float[Tensor, "head g d_value"]:
    """All heads in one call: each is a sequence of one query token with its own number of keys.

    The kernel has no sink logits. Adding one afterwards enlarges the softmax's denominator from
    Σ = exp(lse) to Σ + exp(sink), so z becomes z · Σ / (Σ + exp(sink)) = z · sigmoid(lse − sink).
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    z, lse = varlen_attn(
        query,
        store.keys[:, None],
        store.values[:, None],
        store.queries,
        store.bounds,
        1,
        store.room,
        return_aux=AuxRequest(lse=True),
        scale=call.scaling,
        enable_gqa=True,
        seqused_k=store.lengths,
    )
    if sink_logits is not None:
        z = z * torch.sigmoid(lse.transpose(0, 1) - sink_logits)[..., None].to(z.dtype)
    return z
