"""Checks of what a user gives: each raises ValueError, in one line that says what to do.

Letters in the shape comments:  n prompts    m references    T tokens    O options
"""

import torch

from lab.tools.checks import (
    INTEGERS,
    as_tensor,
    require,
    require_finite,
    require_in_vocabulary,
    require_integers,
    require_mask,
    require_shape,
)
from lab.tools.kinds import one_of

TOKENS = ("last", "middle", "first", "all")


def require_core(pathway, n_core: int):
    """A pathway (n, R, E), of whose rows n_core entries may change."""
    require_shape("the pathway", pathway, (None, None, None))
    require(pathway.is_floating_point(), f"the pathway is of {pathway.dtype}; expected floats")
    require_finite("the pathway", pathway, "it is none")
    E = pathway.shape[-1]
    require(1 <= n_core <= E, f"core is {n_core}, but there are {E} experts")


def require_moved(w, start, config):
    """A pathway that a surrogate gave instead of the model's own, start (n, R, E)."""
    name = getattr(config.method, "__name__", config.method)
    require_shape(f"what {name} gave", w, tuple(start.shape))
    require_finite(f"what {name} gave", w, "it is no pathway")


def require_layers(spec: str, n: int):
    """Critical layers that exist, of n blocks with routers."""
    require_routers(n)
    kind, _, count = spec.partition(":")
    if spec == "all":
        return
    if kind in ("first", "middle", "last") and count.isdecimal():
        known = 1 <= int(count) <= n
    else:
        known = all(number.isdecimal() and int(number) < n for number in spec.split(","))
    require(
        known,
        f"unknown critical layers {spec!r}; expected all, last:{min(2, n)}, first:1, middle:1, "
        f"or numbers from 0 to {n - 1}, such as 0,{n - 1}",
    )


def require_blocks(layers: list[int], n: int):
    """Some of n blocks."""
    known = len(layers) > 0 and all(layer in range(n) for layer in layers)
    require(known, f"layers are {layers}; expected some of the blocks 0 to {n - 1}")


def require_routers(n: int):
    """A model that has routers, n of them or of blocks that have some."""
    fault = "this model has no routers (it is dense, or routes by hash)"
    require(n > 0, f"{fault}: there is nothing to re-mix")


def require_gradient(model):
    """A model for whose pathways NGD has a gradient."""
    sizes = model.config
    fault = "ngd: with top_k 1 and norm_topk the one weight is always 1, and the gradient zero"
    fine = sizes.top_k > 1 or not sizes.norm_topk
    require(fine, f"{fault}; take kernel_regression or mode_finding")


# ---------------------------------------------------------------------------- prompts, references


def require_prompts(whose: str, tokens, lengths, vocab_size: int):
    """Prompts (n, T) of the vocabulary, and their lengths (n,), from 1 to T."""
    require_shape(f"{whose}tokens", tokens, (None, None))
    require(tokens.numel() > 0, f"{whose}tokens are none: the shape is {tuple(tokens.shape)}")
    require_in_vocabulary(f"{whose}tokens", tokens, vocab_size)
    n, T = tokens.shape
    require_shape(f"{whose}lengths", lengths, (n,))
    require_integers(f"{whose}lengths", lengths)
    low, high = int(lengths.min()), int(lengths.max())
    require(1 <= low <= high <= T, f"{whose}lengths go from {low} to {high}; expected 1 to {T}")


def require_answers(logits, options, *labels):
    """Logits (n, V), options (n, O) or None, and perhaps labels (n,).

    Only kinds are looked at: in a step of NGD, a look at numbers would make a GPU wait.
    """
    require_shape("logits", logits, (None, None))
    require(logits.is_floating_point(), f"logits are {logits.dtype}; expected floats")
    if options is not None:
        require_integers("options", options)
        require_shape("options", options, (len(logits), None))
    for each in labels:
        require_integers("labels", each)
        require_shape("labels", each, (len(logits),))


def require_one_length(token: str, lengths, expected: int):
    """Prompts of one length, where every token's pathway is re-mixed."""
    fault = f"token all needs prompts of one length, here {expected} tokens"
    found = f"these have {int(lengths.min())} to {int(lengths.max())}"
    require(token != "all" or bool((lengths == expected).all()), f"{fault}; {found}")


def as_floats(what: str, values):
    """Numbers, in lists or in a tensor -> a tensor of floats. ValueError for anything else."""
    values = as_tensor(what, values)
    real = values.is_floating_point() or values.dtype in INTEGERS
    require(real, f"{what} are {values.dtype}; expected numbers")
    require_finite(what, values, "nothing is near it")
    return values if values.is_floating_point() else values.float()


def require_labels(labels, options, n: int, vocab_size: int):
    """A label (n,) of the vocabulary for each of n references; options (n, O) that hold it."""
    require_in_vocabulary("labels", labels, vocab_size)
    require(labels.shape == (n,), f"{n} references have {labels.numel()} labels; expected one each")
    if options is not None:
        require_shape("options", options, (n, None))
        require_in_vocabulary("options", options, vocab_size)
        listed = (options == labels[:, None]).any(1)
        require(bool(listed.all()), "the label of a reference is not among its options")


def require_references(references, model, source: str):
    """A reference set whose tensors fit together, and their model."""
    one_of("token", references.token, TOKENS)
    tokens, lengths, vocab_size = references.tokens, references.lengths, model.config.vocab_size
    require_prompts(f"{source}: ", tokens, lengths, vocab_size)
    if references.corpus is not None:
        corpus = references.corpus, references.corpus_lengths
        require_prompts(f"{source}: corpus ", *corpus, vocab_size)
    m, T = tokens.shape
    require_labels(references.labels, references.options, m, vocab_size)
    require_one_length(references.token, lengths, int(lengths[0]))
    require_mask(f"{source}: correct", references.correct, (m,))

    # Pathways, and embeddings of the user's own.
    P = T if references.token == "all" else 1
    shape = (m, P, len(model.routers()), model.config.n_experts)
    vectors = {"pathways": (references.pathways, shape)}
    if references.embeddings is not None:
        vectors["embeddings"] = (references.embeddings, (m, None))
    for name, (tensor, expected) in vectors.items():
        require_shape(f"{source}: {name}", tensor, expected)
        require(tensor.is_floating_point(), f"{source}: {name} are {tensor.dtype}, no floats")
        require_finite(f"{source}: {name}", tensor, "build it anew")


def require_remixable(model, references, tokens, lengths, loss: str):
    """Model, references and prompts (n, T) that fit together."""
    references.require_model(model)
    require_shape("the references' pathways", references.pathways, (None,) * 4)
    require_shape("the lengths of references", references.lengths, (None,))
    require_one_length(references.token, lengths, references.pathways.shape[1])
    require_references(references, model, "the reference set")
    hint = "ReferenceSet.build(..., options=(m, O))"
    complete = loss != "options" or references.options is not None
    require(complete, f"loss options needs the options of the references: {hint}")

    # A prompt that is a reference: its label would be known.
    known = set(as_tuples(references.tokens, references.lengths))
    asked = as_tuples(tokens, lengths)
    repeated = [i for i, prompt in enumerate(asked) if prompt in known]
    found = f"{len(repeated)} of {len(asked)} prompts are references too, such as {repeated[:1]}"
    require(not repeated, f"{found}: their labels would be known; take them out of one of the two")


def as_tuples(tokens, lengths) -> list[tuple]:
    """Prompts without their padding."""
    pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return [tuple(row[:length]) for row, length in pairs]


# -------------------------------------------------------------------------------------- neighbours


def require_enough(correct, allowed, n: int, k: int):
    """Enough references that may help n prompts: correct (m,), allowed (n, m) or None."""
    m = len(correct)
    require_mask("correct", correct, (m,))
    if allowed is not None:
        require_mask("allowed", allowed, (n, m))
    n_correct = int(correct.sum())
    fault = f"the model answers none of the {m} references right"
    require(n_correct > 0, f"{fault}: there is nothing to learn from")
    found = f"k is {k}, but there are {n_correct} usable references"
    require(k <= n_correct, f"{found}; take a smaller k")


def require_neighbours(near, tail, references, tokens, lengths):
    """Neighbours of these prompts, among these references, in the layers of this tail."""
    prompts = as_tuples(tokens, lengths)
    require(
        near.prompts in (None, prompts), "these neighbours are of other prompts: find them anew"
    )
    own = tail.pathways(references)
    n, m = len(prompts), len(own)
    require_integers("the neighbours' index", near.index)
    require_shape("the neighbours' index", near.index, (n, None))
    require_shape("the neighbours' weight", near.weight, tuple(near.index.shape))
    require_mask("the neighbours' usable", near.usable, (n, m))
    known = bool(((near.index >= 0) & (near.index < m)).all())
    require(known, f"the neighbours' index names others than the {m} references")
    require_finite("the neighbours' weight", near.weight, "find them anew")
    require(near.weight.is_floating_point(), f"the neighbours' weight is {near.weight.dtype}")
    require_shape("the neighbours' pathways", near.pathways, tuple(own.shape))
    same = near.pathways.dtype == own.dtype and torch.equal(near.pathways, own)
    require(same, "these neighbours are of other references or layers: find them anew")


def require_own(own, embeddings, n: int):
    """Vectors (n, X) of one width for prompts and references -> those of the prompts."""
    hint = "ReferenceSet.build(embeddings=...) and remix(embeddings=...)"
    given = own is not None and embeddings is not None
    require(given, f"embedding own needs arrays: {hint}")
    own = as_floats("own embeddings", own)
    require_shape("own embeddings", own, (n, embeddings.shape[1]))
    return own


def require_layer(name: str, layer: str, n_layers: int):
    """The layer of hidden:LAYER is one of the model's."""
    known = layer.isdecimal() and int(layer) < n_layers
    expected = f"hidden:0 to hidden:{n_layers - 1}"
    require(known, f"unknown embedding {name!r}; expected {expected}")
