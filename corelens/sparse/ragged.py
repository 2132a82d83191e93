"""Keys and values of heads that hold different numbers of tokens, packed without padding, and
attention over them.

Heads that hold the same number stand together: such a group is a dense [count, room, d] view of the
packed storage, so that one call of SDPA reads it, a KV head's query heads as its rows. On CUDA in
half precision one call of `torch.nn.attention.varlen` reads all groups.

A head grows by each new token, or it is a ring: its first `sink` tokens stay, and each new one
takes the place of the oldest of the others. Room is added 64 tokens at a time, so the storage is
rarely copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hooks.rows import Call

# tokens that a growing head gets room for at a time: each copy of the storage serves as many tokens
SLACK = 64


@dataclass
class Group:
    """Some heads of the same length, side by side in the packed storage.

    Args:
        first: their first slot in the packed storage.
        count: how many heads.
        room: slots a head has.
        length: slots a head uses.
        limit: if set, each head is a ring of that many slots; None: it grows.
    """

    first: int
    count: int
    room: int
    length: int
    limit: int | None

    def of(self, packed: Tensor) -> Tensor:
        """The slots of this group, as a view [count, room, …] of a packed tensor."""
        return packed[self.first : self.first + self.count * self.room].unflatten(
            0, (self.count, self.room)
        )


class Ragged:
    """One layer's keys and values, packed: every sample and KV head has its own number of them.

    Args:
        key, value: those of the prompt.
        keep: which of them stay.
        limits: for each KV head how many tokens it may hold, the oldest going first; None: no
            limit; 0: the head gets no storage.
        sink: how many first tokens a limited head never lets go.
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
        # A head that never holds anything gets no storage. The others are sorted so that heads of
        # equal length and limit are neighbours: each such group is one dense view. Rings stand
        # apart, for they wrap around at their own limit.
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
        # The head at each place of the storage, as the number sample · kv_heads + KV head.
        self.heads = torch.tensor(held, dtype=torch.long, device=device)
        row, position = keep.flatten(0, 1)[self.heads].nonzero(as_tuple=True)
        whose = self.heads[row]
        self.keys = key[whose // self.kv_heads, whose % self.kv_heads, position]
        self.values = value[whose // self.kv_heads, whose % self.kv_heads, position]
        self.token_positions = position.int()  # original positions
        # Where each head writes next: behind what it holds; a full ring over its oldest token,
        # the first behind the sink.
        offset: list[int] = []
        for group in self.groups:
            full_ring = group.length == group.limit
            offset += [min(sink, group.length) if full_ring else group.length] * group.count
        self._place(torch.tensor(offset, dtype=torch.long, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, as the storage holds them. (Positions take four more a
        token.)"""
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
        if self.rings:  # past its end a ring goes on behind its sink
            self.slots = torch.where(self.slots == self.ends, self.wraps, self.slots)
            self.lengths = torch.minimum(self.lengths + 1, self.limits)
        else:
            self.lengths += 1
        for group in self.groups:
            group.length = (
                group.length + 1 if group.limit is None else min(group.length + 1, group.limit)
            )

    def _make_room(self) -> None:
        """Copy the storage into one with room for some more tokens a head."""
        # Where each head writes next, counted from its own start, stays the same when starts move.
        offset, first, grown = self.slots - self.starts, 0, []
        for group in self.groups:
            room = (
                group.length + SLACK
                if group.limit is None
                else min(group.length + SLACK, group.limit)
            )
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
        """Compute where each head's slots lie, as the kernels need it; `offset`: which of its own
        slots a head writes next."""
        device = offset.device

        def by_head(values: list[int], dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        every = [(group, number) for group in self.groups for number in range(group.count)]
        self.rings = any(group.limit is not None for group in self.groups)
        self.starts = by_head([group.first + number * group.room for group, number in every])
        self.slots = self.starts + offset
        self.lengths = by_head([group.length for group, _ in every], torch.int32)
        self.limits = by_head([group.limit or 1 << 30 for group, _ in every], torch.int32)
        self.ends = torch.where(self.limits < 1 << 30, self.starts + self.limits, -1)
        self.wraps = self.starts + self.sink
        self.bounds = nn.functional.pad(self.starts.int(), (0, 1), value=len(self.keys))
        self.queries = torch.arange(len(every) + 1, dtype=torch.int32, device=device)
        self.room = max((group.room for group in self.groups), default=0)

    # --- reading

    def attend(
        self, query: Float[Tensor, "batch head 1 d"], call: Call
    ) -> Float[Tensor, "batch 1 head d_value"]:
        """Attention of the newest token over all that is held; a head that holds nothing gives
        0."""
        if call.bias is not None:
            raise CorelensError(
                "a position bias over an evicted cache",
                "rotary positions",
                "decode with a full cache",
            )
        group = query.shape[1] // self.kv_heads
        every = rearrange(query[:, :, 0], "batch (kv g) d -> (batch kv) g d", g=group)
        sink_logits = (
            None
            if call.sink_logits is None
            else call.sink_logits.float().view(-1, group)[self.heads % self.kv_heads]
        )
        read = varlen if by_varlen(every, self.values, call) else grouped
        z = every.new_zeros(*every.shape[:2], self.values.shape[-1])
        if self.groups:
            z[self.heads] = read(self, every[self.heads], call, sink_logits)
        return rearrange(z, "(batch kv) g d -> batch 1 (kv g) d", batch=self.batch)

    def positions(self) -> list[list[Int[Tensor, " held"]]]:
        """The original positions that are held, ascending, for each sample and KV head."""
        held = [self.token_positions.new_empty(0).long()] * (self.batch * self.kv_heads)
        heads = iter(self.heads.tolist())
        for group in self.groups:
            for head_positions in group.of(self.token_positions)[:, : group.length]:
                held[next(heads)] = head_positions.long().sort().values
        return [held[sample * self.kv_heads :][: self.kv_heads] for sample in range(self.batch)]

    def dense(
        self,
    ) -> tuple[Float[Tensor, "b kv key d"], Float[Tensor, "b kv key e"], Bool[Tensor, "b kv key"]]:
        """Keys and values on the axis of original positions, zero where nothing is held, and a mask
        of what is held."""
        slots = torch.cat(
            [
                group.of(torch.arange(len(self.keys), device=self.keys.device))[
                    :, : group.length
                ].flatten()
                for group in self.groups
            ]
            or [self.heads]
        )
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
    """Attention group by group: SDPA; with a soft cap or sinks, scores and softmax in float32."""
    outputs, done = [], 0
    for group in store.groups:
        members = slice(done, done + group.count)
        done += group.count
        q = query[members]
        key, value = (
            group.of(store.keys)[:, : group.length],
            group.of(store.values)[:, : group.length],
        )
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
    """Whether `varlen` can read this: half precision on CUDA, no soft cap, heads of a width that
    its kernels know."""
    width = query.shape[-1]
    known = width % 8 == 0 and width <= 256 and value.shape[-1] == width
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and known
        and call.softcap is None
    )


def varlen(
    store: Ragged,
    query: Float[Tensor, "head g d"],
    call: Call,
    sink_logits: Float[Tensor, "head g"] | None,
) -> Float[Tensor, "head g d_value"]:
    """All heads in one call: each is a sequence of one query token with its own number of keys.

    A sink takes its share of a softmax that is already done: z · Σ / (Σ + exp(sink)) = z ·
    sigmoid(lse − sink).
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
