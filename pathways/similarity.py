"""Which prompts are alike? Every prompt becomes a unit vector, and a cosine compares two of them.

    tfidf           tokens, those that are rare counting more
    tfidf-places    tokens at their distance from the end of the prompt
    tfidf-bigrams   tokens and pairs of tokens
    hidden:LAYER    the state of the last token as it enters a layer
    pathway         the pathway itself
    own             vectors of your own, such as a language model's

Letters in the shape comments:  n prompts    m references    T tokens    X width of a vector
"""

import torch
import torch.nn.functional as F

from lab.tools.checks import annotated, require_finite, torch_defaults
from lab.tools.configs import EMBEDDINGS, TFIDF
from lab.tools.kinds import one_of
from pathways.checks import require_layer, require_own
from pathways.prompts import portions
from pathways.tail import Tail

VOCABULARY = 2**20  # tokens and terms: larger than any vocabulary
COPY = 0.95  # above this cosine two prompts are the same in other words


@annotated
@torch_defaults()
@torch.no_grad()
def similarity(name: str, tail: Tail | None, references, tokens, lengths, own=None):
    """The cosines (n, m) of prompts (n, T) and references, float64, by one of the embeddings.

    own: vectors (n, X) that go with references.embeddings. ValueError: no such embedding.
    """
    kind, _, layer = name.partition(":")
    kind = one_of("embedding", kind, EMBEDDINGS)
    if kind in TFIDF:
        corpus = (references.tokens, references.lengths)
        if references.corpus is not None:
            corpus = (references.corpus, references.corpus_lengths)
        return tfidf_cosine(kind, references, tokens, lengths, corpus)  # always finite
    if kind == "own":
        prompts = require_own(own, references.embeddings, len(tokens))
        others = references.embeddings
    elif kind == "hidden":
        require_layer(name, layer, len(tail.model.blocks))
        prompts = hidden(tail.model, int(layer), tokens, lengths)
        others = hidden(tail.model, int(layer), references.tokens, references.lengths)
    else:
        prompts = own_pathways(tail, tokens, lengths).flatten(1)  # (n, R, E) -> (n, R*E)
        others = tail.pathways(references).flatten(1)
    require_finite(f"{name} of prompts", prompts, "nothing is near it")
    require_finite(f"{name} of references", others, "nothing is near it")
    a = F.normalize(prompts.double().cpu(), dim=1)
    b = F.normalize(others.double().cpu(), dim=1)
    return (a @ b.T).clamp(-1, 1)


@torch_defaults()
def near_copies(references, tokens, lengths):
    """Which references (n, m) are a prompt (n, T) in nearly the same words: a cosine above 0.95."""
    corpus = (references.tokens, references.lengths)
    return tfidf_cosine("tfidf-bigrams", references, tokens, lengths, corpus) > COPY


def hidden(model, layer: int, tokens, lengths):
    """The state (n, D) of the last token of each prompt as it enters a layer."""
    below = Tail(model, [layer])
    states = [below.cut(*portion).x[:, 0] for portion in portions(tokens, lengths)]
    return torch.cat(states)


def own_pathways(tail: Tail, tokens, lengths):
    """The pathways (n, R, E) that the model takes for prompts."""
    pathways = [tail.read(*portion)[0] for portion in portions(tokens, lengths)]
    return torch.cat(pathways)


# ------------------------------------------------------------------------------------------- tf-idf


def tfidf_cosine(kind: str, references, tokens, lengths, corpus):
    """The cosines (n, m) of prompts and references by term frequency times inverse frequency.

    corpus: tokens (c, T) and lengths (c,) of prompts that say how rare a term is.
    """
    # The terms of each set: (prompt, term) pairs.
    samples = terms(kind, tokens, lengths)
    known = terms(kind, references.tokens, references.lengths)
    common = terms(kind, *corpus)

    # Number the terms 0..X-1, and count them: sparse (n, X), (m, X), (c, X).
    names, numbers = torch.unique(
        torch.cat([samples[1], known[1], common[1]]),
        return_inverse=True,
    )
    sizes = [len(samples[1]), len(known[1]), len(common[1])]
    columns = numbers.split(sizes)
    X = len(names)
    n, m, c = len(tokens), len(references.tokens), len(corpus[0])
    samples = counted(samples[0], columns[0], (n, X))
    known = counted(known[0], columns[1], (m, X))
    common = counted(common[0], columns[2], (c, X))

    # A term that few prompts of the corpus have says more.
    in_prompts = common.indices()[1].bincount(minlength=X)  # (X,) how many prompts have a term
    idf = 1 + torch.log((1 + c) / (1 + in_prompts.double()))
    samples = weighted(samples, idf)
    known = weighted(known, idf)

    # A few prompts at a time: as dense vectors they are wide.
    step = max(1, 2**24 // max(X, 1))
    cosines = []
    for start in range(0, n, step):
        rows = torch.arange(start, min(start + step, n))
        dense = samples.index_select(0, rows).to_dense()  # (step, X)
        cosines.append(torch.sparse.mm(known, dense.T).T)  # (step, m)
    return torch.cat(cosines).clamp(-1, 1)


def terms(kind: str, tokens, lengths):
    """The terms of prompts tokens (n, T) -> which prompt each stands in, and its name, int64."""
    T = tokens.shape[1]
    to_come = lengths[:, None] - torch.arange(T)  # (n, T) tokens from here to the end; 0: padding
    inside = to_come > 0
    names = tokens
    if kind == "tfidf-places":
        names = tokens + VOCABULARY * to_come
    if kind == "tfidf-bigrams":
        pairs = (tokens[:, :-1] + 1) * VOCABULARY + tokens[:, 1:]
        names = torch.cat([names, pairs], 1)
        inside = torch.cat([inside, inside[:, 1:]], 1)
    return inside.nonzero()[:, 0], names[inside]


def counted(rows, columns, shape):
    """How often each term stands in each prompt: a sparse matrix."""
    ones = torch.ones(len(rows), dtype=torch.float64)
    return sparse(torch.stack([rows, columns]), ones, shape)


def sparse(indices, values, shape):
    """A sparse matrix; values at one place are added up."""
    matrix = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)
    return matrix.coalesce()


def weighted(counts, idf):
    """Counts times idf, as unit vectors: a sparse matrix."""
    rows, columns = counts.indices()
    values = counts.values() * idf[columns]
    squares = torch.zeros(counts.shape[0], dtype=torch.float64)
    squares.index_add_(0, rows, values.square())
    values = values * squares[rows] ** -0.5
    return sparse(counts.indices(), values, counts.shape)
