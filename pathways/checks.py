"""Checks of what a user gives: each raises ValueError, in one line that says what to do.

Letters in the shape comments:  n prompts    m references    T tokens    O options
"""

import torch

from lab.tools.checks import (
    require,
    require_finite,
    require_in_vocabulary,
    require_shape,
)

TOKENS = ("last", "middle", "first", "all")


def require_moved(w, start, config):
    """A pathway that a surrogate gave instead of the model's own, start (n, R, E)."""
    name = getattr(config.method, "__name__", config.method)
    require(torch.is_tensor(w), f"{name} gave {type(w).__name__}; expected a pathway, a tensor")
    require_shape(f"what {name} gave", w, tuple(start.shape))
    require_finite(f"what {name} gave", w, "it is no pathway")


def require_layers(spec: str, n: int):
    """Critical layers that exist, of n blocks with routers."""
    require_routers(n)
    kind, _, count = spec.partition(":")
    if spec == "all":
        return
    if kind in ("first", "middle", "last") and count.isdigit():
        fits = 1 <= int(count) <= n
    else:
        fits = all(number.isdigit() and int(number) < n for number in spec.split(","))
    require(
        fits,
        f"unknown critical layers {spec!r}; expected all, last:{min(2, n)}, first:1, middle:1, "
        f"or numbers from 0 to {n - 1}, such as 0,{n - 1}",
    )


def require_enough(correct, allowed, n: int, k: int):
    """Enough references that may help n prompts: correct (m,), allowed (n, m) or None."""
    m, n_correct = len(correct), int(correct.sum())
    if allowed is not None:
        shape, expected = tuple(allowed.shape), (n, m)
        require(shape == expected, f"allowed has shape {shape}; expected {expected}")
    require(
        n_correct > 0,
        f"the model answers none of the {m} references right: there is nothing to learn from",
    )
    require(
        k <= n_correct,
        f"k is {k}, but there are {n_correct} usable references; take a smaller k",
    )


def require_gradient(model):
    """A model for whose pathways NGD has a gradient."""
    sizes = model.config
    require(
        sizes.top_k > 1 or not sizes.norm_topk,
        "ngd: with top_k 1 and norm_topk the one weight is always 1, and the gradient zero; "
        "take kernel_regression or mode_finding",
    )


def require_remixable(model, references, tokens, lengths, loss: str):
    """Model, references and prompts (n, T) that fit together."""
    require(
        references is not None,
        "re-mixing needs references: ReferenceSet.build makes them",
    )
    references.require_model(model)
    require_one_length(references.token, lengths, references.pathways.shape[1])
    require(
        loss != "options" or references.options is not None,
        "loss options needs the options of the references: ReferenceSet.build(..., options=(m, O))",
    )
    require_new(tokens, lengths, references)


def require_options(whose: str, options, labels, vocab_size: int):
    """ValueError unless options are (n, O), of the vocabulary, and hold the labels (n,)."""
    shape, n = tuple(options.shape), len(labels)
    fits = options.dim() == 2 and shape[0] == n
    require(fits, f"options have shape {shape}; expected ({n}, O)")
    require_in_vocabulary("options", options, vocab_size)
    listed = (options == labels[:, None]).any(1)
    require(bool(listed.all()), f"the label {whose} is not among its options")


def require_new(tokens, lengths, references):
    """ValueError for prompts that are references: their labels would be known."""
    known = set(as_tuples(references.tokens, references.lengths))
    asked = as_tuples(tokens, lengths)
    repeated = [i for i, prompt in enumerate(asked) if prompt in known]
    require(
        not repeated,
        f"{len(repeated)} of {len(asked)} prompts are references too, such as prompt "
        f"{repeated[:1]}: the labels would be known; take them out of one of the two",
    )


def as_tuples(tokens, lengths) -> list[tuple]:
    """Prompts without their padding."""
    pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return [tuple(row[:length]) for row, length in pairs]


def require_references(references, model, path):
    """References that were read from a file: tensors of the right kinds and shapes."""
    require(references.token in TOKENS, f"{path}: token is {references.token!r:.60}")
    vocab_size, routers = model.config.vocab_size, model.routers()
    m, T = references.tokens.shape if references.tokens.dim() == 2 else (0, 0)
    require(m * T > 0, f"{path}: tokens have shape {tuple(references.tokens.shape)}")
    corpus = references.corpus if references.corpus is not None else references.tokens
    n_positions = T if references.token == "all" else None
    shapes = {  # None: any
        "lengths": (m,),
        "labels": (m,),
        "correct": (m,),
        "pathways": (m, n_positions, len(routers), model.config.n_experts),
        "options": (m, None),
        "corpus": (None, None),
        "corpus_lengths": (len(corpus),),
        "embeddings": (m, None),
    }
    for name, expected in shapes.items():
        tensor = getattr(references, name)
        if tensor is not None:
            shape = tuple(tensor.shape)
            pairs = list(zip(shape, expected, strict=False))
            fits = len(shape) == len(expected) and all(b in (a, None) for a, b in pairs)
            require(fits, f"{path}: {name} have shape {shape}; expected {expected}")
    require(references.correct.dtype == torch.bool, f"{path}: correct is not of bools")
    for name in ("pathways", "embeddings"):
        tensor = getattr(references, name)
        fits = tensor is None or tensor.is_floating_point()
        require(fits, f"{path}: {name} are not of numbers with fractions")
    for lengths, tokens in (
        (references.lengths, references.tokens),
        (references.corpus_lengths, references.corpus),
    ):
        if tokens is not None:
            require_in_vocabulary(f"{path}: tokens", tokens, vocab_size)
            require_in_vocabulary(f"{path}: lengths", lengths - 1, tokens.shape[1])
    labels, options = references.labels, references.options
    require_labels(
        references.tokens, references.lengths, labels, options, vocab_size, references.token
    )


def require_one_length(token: str, lengths, expected: int):
    """ValueError for prompts of several lengths, where every token's pathway is re-mixed."""
    alike = token != "all" or bool((lengths == expected).all())
    require(
        alike,
        f"token all needs prompts of one length, here {expected} tokens; "
        f"these have {int(lengths.min())} to {int(lengths.max())}",
    )


def require_labels(tokens, lengths, labels, options, vocab_size: int, token: str):
    """ValueError unless there is a label for every reference, of the vocabulary and the options."""
    require(
        len(labels) == len(tokens),
        f"{len(tokens)} references have {len(labels)} labels; expected one each",
    )
    require_in_vocabulary("labels", labels, vocab_size)
    if options is not None:
        require_options("of a reference", options, labels, vocab_size)
    require_one_length(token, lengths, int(lengths[0]))


def require_routers(n: int):
    """A model that has routers, n of them or of blocks that have some."""
    require(
        n > 0,
        "this model has no routers (it is dense, or routes by hash): there is nothing to re-mix",
    )


def require_own(own, embeddings, n: int):
    """ValueError unless prompts and references have vectors of one width."""
    require(
        own is not None and embeddings is not None,
        "embedding own needs arrays: ReferenceSet.build(embeddings=...) and remix(embeddings=...)",
    )
    shape, width = tuple(torch.as_tensor(own).shape), embeddings.shape[1]
    require(shape == (n, width), f"own embeddings are {shape}; expected {(n, width)}")


def require_layer(name: str, layer: str, n_layers: int):
    """ValueError unless the layer of hidden:LAYER is one of the model's."""
    require(
        layer.isdigit() and int(layer) < n_layers,
        f"unknown embedding {name!r}; expected hidden:0 to hidden:{n_layers - 1}",
    )
