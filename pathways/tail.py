"""A model along a pathway: only the part of it that a pathway can reach.

A pathway is imposed at one token of a prompt, the last one. Attention only looks back. So most of a
forward pass does not depend on the pathway:

                            earlier tokens              the last token
    layers above            keys and values: fixed      depends on the pathway
    ------------------------------------------------------------------ first critical layer
    layers below            fixed                       fixed

`Tail.cut` computes what is fixed, once: the `Prefix`. Then `tail(prefix, pathway)` costs one token
through the layers above. That is exact, and far cheaper than full forward passes.

Letters in the shape comments, beside those of moe.py:
    n prompts    R rows of a pathway, one for each critical router
    P tokens from the imposed one on (1, if that is the last)    S tokens before them
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from lab.tools.checks import annotated, evaluation, require_shape
from lab.tools.kinds import one_of
from moe import Cache, Imposed, Router, unwrapped
from pathways.checks import (
    TOKENS,
    require_blocks,
    require_layers,
    require_prompts,
    require_routers,
)
from pathways.prompts import MOST_TOKENS, by_length, trimmed


class Prefix(NamedTuple):
    """What no pathway changes, of n prompts."""

    x: torch.Tensor  # (n, P, D) tokens from the imposed one on, entering the first critical layer
    valid: torch.Tensor  # (n, P) bool, false at padding
    keys: torch.Tensor  # (n, S, L, G, C) of the tokens before, in the L layers from there up
    values: torch.Tensor  # (n, S, L, G, C)
    past: torch.Tensor  # (n, S) bool, false at padding


def joined_prefix(rows) -> Prefix:
    """The prefixes of single prompts, each five tensors with or without padding, as one."""
    columns = [pad_sequence(column, batch_first=True) for column in zip(*rows, strict=True)]
    x, valid, keys, values, past = columns
    return Prefix(x, valid, by_layer(keys), by_layer(values), past)


def by_layer(tensor):
    """Keys or values (n, S, L, G, C), with those of a layer together in memory: it is faster."""
    return tensor.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)


class Tail:
    """The part of a model that a pathway reaches: the layers from the first critical one up.

    layers: the critical blocks, whose routers follow the pathway; None: all that have a router.
    token: where the pathway is imposed. The paper, and all but one ablation, takes the last token.
    """

    @annotated
    def __init__(self, model, layers: list[int] | None = None, token: str = "last"):
        model = unwrapped(model)
        if layers is None:
            layers = [i for i, block in enumerate(model.blocks) if routers_of(block)]
            require_routers(len(layers))
        require_blocks(layers, len(model.blocks))
        token = one_of("token", token, TOKENS)
        self.model = model
        self.token = token
        self.first = min(layers)
        self.device = model.embedding.weight.device
        self.routers = [r for layer in layers for r in routers_of(model.blocks[layer])]
        self.routers_above = routers_of(model.blocks[self.first :])

    def cut(self, tokens, lengths) -> Prefix:
        """Prompts (n, T), padded on the right, of lengths (n,) -> what no pathway changes."""
        require_prompts("", tokens, lengths, self.model.config.vocab_size)
        if tokens.numel() <= MOST_TOKENS:
            return self.cut_together(tokens, lengths)
        rows = dict(self.cut_each(tokens, lengths))
        return joined_prefix([rows[i] for i in range(len(tokens))])

    def cut_each(self, tokens, lengths):
        """The same prompt by prompt, read in portions of alike lengths.

        Yields (place of a prompt, its row of a Prefix, padded as its portion is).
        """
        for places in by_length(lengths):
            prefix = self.cut_together(*trimmed(tokens, lengths, places))
            yield from zip(places.tolist(), zip(*prefix, strict=True), strict=True)

    def cut_together(self, tokens, lengths) -> Prefix:
        """The same in one pass, as long as the longest prompt."""
        model = self.model
        tokens, lengths = tokens.to(self.device), lengths.to(self.device)
        place = self.imposed_place(lengths)  # (n,)

        # All tokens go up to the first critical layer.
        every = torch.arange(tokens.shape[1], device=self.device)  # (T,)
        x = model.run_blocks(model.embed(tokens), every < lengths[:, None], last=self.first)

        # Those before the imposed one go on, and fill a cache.
        cache = Cache()
        S = int(place.max())
        past = every[:S] < place[:, None]  # (n, S)
        if S > 0:
            model.run_blocks(x[:, :S], past, cache, first=self.first, only_cache=True)

        # The others stop there.
        P = int((lengths - place).max())
        after = place[:, None] + every[:P]  # (n, P) their places
        valid = after < lengths[:, None]
        row = torch.arange(len(x), device=self.device)
        x = x[row[:, None], after.clamp(max=len(every) - 1)]  # (n, T, D) -> (n, P, D)
        keys = self.stacked(cache.keys, x)
        values = self.stacked(cache.values, x)
        return Prefix(x, valid, keys, values, past)

    def imposed_place(self, lengths):
        """Where in each prompt the pathway is imposed first, (n,)."""
        if self.token == "last":
            return lengths - 1
        if self.token == "middle":
            return lengths // 2
        return torch.zeros_like(lengths)

    def stacked(self, layers: dict, x):
        """What a cache has of the layers above: L tensors (n, G, S, C) -> (n, S, L, G, C)."""
        config = self.model.config
        nothing = x.new_zeros(len(x), config.n_kv_heads, 0, config.head_dim)  # where S is 0
        above = range(self.first, len(self.model.blocks))
        tensors = [layers.get(layer, nothing) for layer in above]
        return torch.stack(tensors, 1).movedim(3, 1)

    @annotated
    def __call__(self, prefix: Prefix, pathway=None, routing=None):
        """Logits (n, V) that follow the prompts, along a pathway (n, R, E), or the model's own.

        prefix: what `cut` gives.
        routing: a list that collects a Routing from every router on the way.
        """
        keys = prefix.keys.movedim(1, 3).unbind(1)  # (n, S, L, G, C) -> L times (n, G, S, C)
        values = prefix.values.movedim(1, 3).unbind(1)
        cache = Cache(
            dict(enumerate(keys, self.first)),
            dict(enumerate(values, self.first)),
            prefix.past,
        )
        x = self.model.run_blocks(
            prefix.x,
            prefix.valid,
            cache,
            first=self.first,
            imposed=self.imposed(prefix, pathway),
            write=False,
            routing=routing,
        )
        row = torch.arange(len(x), device=x.device)
        last = prefix.valid.sum(1) - 1  # (n,)
        return self.model.head(x[row, last])  # (n, P, D) -> (n, D) -> (n, V)

    def imposed(self, prefix: Prefix, pathway):
        """A pathway (n, R, E) as run_blocks takes it."""
        if pathway is None:
            return None
        n, P = prefix.valid.shape if self.token == "all" else (len(prefix.x), 1)
        shape = (n, P * len(self.routers), self.model.config.n_experts)
        require_shape("the pathway", pathway, shape)
        rows = pathway.unflatten(1, (-1, len(self.routers)))  # (n, 1 or P, routers, E)
        if self.token == "all":
            by_router = rows.unbind(2)  # (n, P, E) for each router
            at = prefix.valid
        else:
            by_router = rows[:, 0].unbind(1)  # (n, E) for each router
            at = torch.zeros_like(prefix.valid)
            at[:, 0] = True
        return Imposed(dict(zip(self.routers, by_router, strict=True)), at)

    def own(self, prefix: Prefix):
        """The model's own pathway (n, R, E) and logits (n, V)."""
        routing = []
        logits = self(prefix, routing=routing)
        rows = []
        for router in self.routers:
            probs = routing[self.routers_above.index(router)].probs  # (n*P, E)
            rows.append(probs.unflatten(0, prefix.valid.shape))  # (n, P, E)
        pathway = torch.stack(rows, 2)  # (n, P, routers, E)
        if self.token != "all":
            pathway = pathway[:, :1]
        return pathway.flatten(1, 2), logits  # (n, R, E), (n, V)

    def read(self, tokens, lengths):
        """The same pathway and logits, `own(cut(tokens, lengths))`, in one pass that keeps nothing.

        Prompts (n, T), of lengths (n,) -> (n, R, E), (n, V).
        """
        require_prompts("", tokens, lengths, self.model.config.vocab_size)
        tokens, lengths = tokens.to(self.device), lengths.to(self.device).long()
        every = torch.arange(tokens.shape[1], device=self.device)  # (T,)
        valid = every < lengths[:, None]
        routing = []  # of all routers
        x = self.model.run_blocks(self.model.embed(tokens), valid, routing=routing)
        row = torch.arange(len(x), device=self.device)
        probs = torch.stack([routing[router].probs for router in self.routers], 1)  # (n*T, R, E)
        probs = probs.unflatten(0, valid.shape)  # (n, T, R, E)
        if self.token != "all":
            probs = probs[row, self.imposed_place(lengths)][:, None]  # (n, 1, R, E)
        return probs.flatten(1, 2), self.model.head(x[row, lengths - 1])

    def pathways(self, references) -> torch.Tensor:
        """The pathways of m references in the critical layers, (m, R, E)."""
        rows = references.pathways[:, :, self.routers]  # (m, 1 or P, routers, E)
        return rows.flatten(1, 2)


@annotated
def critical_layers(model, spec: str) -> list[int]:
    """The blocks whose routers are re-mixed (section 3.5), counted among those that have routers.

    spec: "all", "last:2", "first:1", "middle:2", or numbers such as "0,3". ValueError for a spec
    that names no such layers, and for a model without routers.

    >>> from moe import MoEConfig, MoETransformer
    >>> model = MoETransformer(MoEConfig(n_layers=6, dense_layers=(0, 2, 4)))  # MoE: 1, 3, 5
    >>> critical_layers(model, "last:2")
    [3, 5]
    """
    blocks = [i for i, block in enumerate(unwrapped(model).blocks) if routers_of(block)]
    require_layers(spec, len(blocks))
    if spec == "all":
        return blocks
    kind, _, count = spec.partition(":")
    if not count:  # numbers
        chosen = {int(number) for number in spec.split(",")}
        return [blocks[i] for i in sorted(chosen)]
    size = int(count)
    start = {"first": 0, "middle": (len(blocks) - size) // 2, "last": len(blocks) - size}[kind]
    return blocks[start : start + size]


def routers_of(module) -> list[int]:
    """The indices of the routers in a block, or in several."""
    return [each.index for each in module.modules() if isinstance(each, Router)]


@contextmanager
def frozen(model):
    """Evaluation, and no gradients of the weights: only pathways have any. All is undone later."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in learned:
        weight.requires_grad_(False)
    try:
        with evaluation(model):
            yield
    finally:
        for weight in learned:
            weight.requires_grad_(True)
