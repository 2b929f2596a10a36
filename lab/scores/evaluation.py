"""The scores at the end of a run, and where its routers stand."""

from string import ascii_uppercase

from lab.scores.cloze import answer_questions, most_frequent, share_right
from moe import Router


def final_scores(model, task) -> dict[str, dict]:
    """The scores on dev and test. On stories also those of the cloze questions, and their baseline.

    Of a large text it takes 4,096 windows and 2,000 questions at most, so that a run ends in
    minutes; eval.py takes all.
    """
    scores = {}
    for split in ("dev", "test"):
        scores[split] = task.score(model, split, most=4096)
        problems = task.problems(split)
        if problems is None or problems.options is None:
            continue  # no multiple choice
        if len(problems.labels) >= 20:  # else it is a text of another kind
            answers = answer_questions(model, problems, most=2000)
            baseline = most_frequent(problems)[: len(answers)]
            scores[split]["cloze"] = share_right(answers, problems)
            scores[split]["frequent"] = share_right(baseline, problems)
    return scores


def routers_by_layer(model) -> dict[int, list[Router]]:
    """The routers of each block that has some."""
    layers = {}
    for layer, block in enumerate(model.blocks):
        routers = [module for module in block.modules() if isinstance(module, Router)]
        if routers:
            layers[layer] = routers
    return layers


def router_names(model) -> list[str]:
    """Where each router stands: "layer 2", or "layer 2 A" and "layer 2 B" where a block has two."""
    names = []
    for layer, routers in routers_by_layer(model).items():
        if len(routers) == 1:
            names.append(f"layer {layer}")
        else:
            names += [f"layer {layer} {ascii_uppercase[i]}" for i in range(len(routers))]
    return names
