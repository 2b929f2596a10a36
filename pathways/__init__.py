"""What remix.py stands on: models along a pathway, references, similarity of prompts, padding.

tail.py         run a model along a pathway, one token at a time, from the first changed layer up
references.py   labelled prompts with the pathways that the model takes for them, and their file
similarity.py   which prompts are alike: tf-idf and other embeddings
neighbours.py   the references nearest to a prompt, and how much each counts
prompts.py      padding and portions of prompts
explain.py      what became of a prompt, in words
checks.py       the checks of what a user gives
"""

from pathways.neighbours import Neighbours, find_neighbours, kernel, nearest
from pathways.prompts import best_token, cross_entropy, padded, portions
from pathways.references import Prefixes, ReferenceSet, fingerprint
from pathways.similarity import near_copies, similarity
from pathways.tail import Prefix, Tail, critical_layers, frozen

__all__ = [
    "Neighbours",
    "Prefix",
    "Prefixes",
    "ReferenceSet",
    "Tail",
    "best_token",
    "critical_layers",
    "cross_entropy",
    "find_neighbours",
    "fingerprint",
    "frozen",
    "kernel",
    "near_copies",
    "nearest",
    "padded",
    "portions",
    "similarity",
]
