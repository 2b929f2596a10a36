"""Open a trained model up. Each command takes a run folder, or else the newest one in out/:

python eval.py perplexity     how well it predicts held-out text
python eval.py routing        which expert does what
python eval.py sample         let it tell a story
python eval.py cloze          choose the last word of stories
python eval.py remix          C3PO: re-mix its experts for each prompt, beside all rivals
python eval.py robustness     what it loses where its routing goes wrong
python eval.py playground     a page in which you move its experts, and see the answer change
python eval.py sharing        which experts a Cartesian model composes, and how alike they are
python eval.py choice         benchmarks, on a checkpoint of the hub: --model PATH_OR_REPO

python eval.py COMMAND --help lists the flags of a command.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.eval_flags, __doc__)  # before torch is imported, which takes seconds

import codecs
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import Task, load_task
from lab.checkpoints import choice
from lab.composing.figures import robustness_figure, sharing_figure
from lab.composing.robustness import measure_robustness, robustness_table
from lab.composing.sharing import measure_sharing, sharing_table
from lab.playground.page import assemble, page_data
from lab.remixing.arena import arena_of
from lab.remixing.contest import run_contest
from lab.remixing.figures import contest_figures, sweeps_figure
from lab.remixing.sweeps import run_sweeps
from lab.remixing.tables import contest_report, sweep_table
from lab.scores.cloze import answer_questions, most_frequent, share_right
from lab.scores.evaluation import router_names
from lab.scores.specialisation import specialisation
from lab.tools import figures, processes, runs
from lab.tools.checks import progress, undisturbed
from lab.tools.files import as_json, write
from lab.tools.report import label
from lab.tools.statistics import scipy_stats, share_interval
from moe import MoETransformer, require


@undisturbed()
def main(argv=None) -> int:
    """Run a command -> the exit code."""
    command, values = flags.eval_flags(argv, __doc__)
    return COMMANDS[command](values)


# --------------------------------------------------------------------------------- opening a run


class Run(NamedTuple):
    """A trained model, the task that it has learnt, and the split to look at."""

    folder: Path
    model: MoETransformer
    task: Task
    split: str | None


def open_run(values: dict) -> Run:
    """Open the run that the flags name."""
    torch.set_num_threads(values["threads"])
    folder = values["run"] or runs.newest()
    model, train = runs.load_run(folder, chosen_router(values))
    task = load_task(train, model.config.context)
    sizes = f"{task.vocab_size} tokens, the model {model.config.vocab_size}"
    same = task.vocab_size == model.config.vocab_size
    require(same, f"{folder}: the tokenizer has {sizes}")
    print(f"{folder}: {train['data']}, {model.n_params():,} parameters\n")
    return Run(folder, model, task, values.get("split"))


def chosen_router(values: dict):
    """The class that --router names, or None. This runs the file that it is in."""
    return runs.router_class(values["router"]) if values["router"] else None


def save_scores(folder: Path, name: str, scores: dict | list) -> int:
    """Write scores as JSON beside the checkpoint -> 0."""
    path = folder / f"{name}.json"
    write(path, as_json(scores, indent=2).encode())
    print(f"wrote {path}")
    return 0


# -------------------------------------------------------------------------------------- commands


def perplexity_command(values: dict) -> int:
    """How well a model predicts a held-out split, all of it: nats, perplexity, bits per byte."""
    folder, model, task, split = open_run(values)
    scores = task.score(model, split, most=None)
    rows = [(label(name), f"{value:.4f}") for name, value in scores.items()]
    print(cli.table(rows, header=[split, ""]), end="\n\n")
    return save_scores(folder, f"perplexity-{split}", scores)


def routing_command(values: dict) -> int:
    """Which expert does what on a held-out split: load, entropy, the tokens that each takes."""
    folder, model, task, split = open_run(values)
    fault = f"{folder} is a dense model, or routes by hash: it has no router to look into"
    require(len(model.routers()) > 0, fault)
    special = specialisation(model, task, split, n_kinds=100)
    names = router_names(model)

    # How evenly does each router use its experts?
    rows = []
    for i, name in enumerate(names):
        load = special.load[i]
        even = load.mean()
        numbers = (special.entropy[i], special.top[i], load.min() / even, load.max() / even)
        cells = [f"{number:.2f}" for number in numbers]
        idle = int((load < even / 10).sum())
        rows.append([name, *cells, idle or "-", cli.bar_line(load)])
    header = ["", "entropy", "top-1", "least", "most", "idle", "load of each expert"]
    print(cli.table(rows, header=header))
    print("entropy: of a token's probabilities, 1 = uniform; top-1: that of its first choice;")
    even = f"{special.load.mean():.1%}"
    print(f"least, most: load of an expert, 1 = an even share, which is {even} of the tokens;")
    print("idle: experts with less than a tenth of that\n")

    # Who is most specialised? Of equals, the first one; its most frequent kind comes first.
    print("The most specialised experts, by how much a kind of token is ahead of all tokens:\n")
    rows = []
    for i, name in enumerate(names):
        shares, load = special.shares[i].round(2), special.load[i]  # (R, E), (E,)
        ahead = (shares - load).max(0)
        for expert in np.argsort(-ahead, kind="stable")[:5]:
            best = np.argsort(-shares[:, expert], kind="stable")[:4]
            taken = [f"{figures.readable(special.kinds[r])} {shares[r, expert]:.0%}" for r in best]
            rows.append([name, expert, ",  ".join(taken), f"{load[expert]:.0%}"])
            name = ""
    header = ["", "expert", "share of a kind that visits it", "load"]
    print(cli.table(rows, header=header, left=3), end="\n\n")

    # Draw the most frequent kinds.
    path = folder / "routing.png"
    title = f"Which expert does what: {folder}, {split}"
    figures.routing_figure(special.shares[:, :12], special.kinds[:12], names, title, path)
    print(f"wrote {path}")

    numbers = {"places": names, "kinds": special.kinds}
    for name in ("load", "shares", "entropy", "top"):
        numbers[name] = getattr(special, name).round(4).tolist()
    return save_scores(folder, f"routing-{split}", numbers)


def sample_command(values: dict) -> int:
    """Continue a prompt, token by token as they come."""
    folder, model, task, _ = open_run(values)
    encoding, context = task.encoding, model.config.context
    fault = f"{folder} has learnt the {task.name} task, and knows no text"
    require(encoding is not None, fault)

    end = encoding.eot_token
    prompt = [end, *encoding.encode_ordinary(values["prompt"])]
    room = context - len(prompt)
    fault = f"the prompt has {len(prompt)} tokens"
    require(room > 0, f"{fault}; it must be shorter than the context, {context}")

    n_tokens = values["tokens"] or room
    if n_tokens > room:
        cli.note(f"the context of {context} tokens has room for {room}: no more are added")
        n_tokens = room

    # A character may take several tokens: the decoder waits until it is complete.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(token):
        if int(token) != end:
            text = encoding.decode_single_token_bytes(int(token))
            print(decoder.decode(text), end="", flush=True)

    print(values["prompt"], end="")
    model.generate(
        torch.tensor([prompt]),
        n_tokens,
        values["temperature"],
        stop=end,
        generator=torch.Generator().manual_seed(values["seed"]),
        show=show,
    )
    print(decoder.decode(b"", final=True))
    return 0


def cloze_command(values: dict) -> int:
    """Choose the last word of held-out stories among four, beside the most frequent last word."""
    folder, model, task, split = open_run(values)
    questions = task.problems(split)
    fault = f"{folder} has learnt the {task.name} task, and knows no stories"
    require(questions.options is not None, fault)
    n = len(questions.labels)
    fault = f"only {n} stories of {split} end with a word of one token"
    require(n >= 20, f"{fault}; a cloze task needs 20 or more")

    answers = {
        "the model": answer_questions(model, questions),
        "most frequent": most_frequent(questions),
    }
    rows, scores = [], {"questions": n}
    for name, answer in answers.items():
        share = share_right(answer, questions)
        low, high = share_interval(round(share * n), n)
        scores[name] = {"accuracy": share, "interval": [low, high]}
        rows.append((name, f"{share:.1%}", f"{low:.1%} to {high:.1%}"))
    rows.append(("chance", "25.0%", ""))
    header = [f"{n} stories of {split}", "right", "95 % interval"]
    print(cli.table(rows, header=header), end="\n\n")
    return save_scores(folder, f"cloze-{split}", scores)


def remix_command(values: dict) -> int:
    """C3PO: re-mix the experts of a frozen model for each prompt, beside all rivals."""
    # Check what can be checked before anything takes time.
    settings = flags.remix_settings(values)
    folders, beside = values["run"] or [runs.newest()], values["beside"]
    split, most, strict = values["split"], values["most"], values["strict"]
    if len(folders) > 2:
        scipy_stats()  # for the tests at the end: better missed now than then
    router, source = chosen_router(values), values["references"]
    torch.set_num_threads(values["threads"])
    processes.join()

    # Open the runs.
    arenas = []
    for folder in progress(folders, "opening"):
        arenas.append(arena_of(folder, split, most, settings, strict, router, source))
    n = len(arenas[0].labels)
    references = arenas[0].references
    right = np.mean([int(arena.references.correct.sum()) for arena in arenas])
    n_runs = "1 run" if len(folders) == 1 else f"{len(folders)} runs"
    text = f"{n_runs}, {n:,} prompts of {split} each; "
    text += f"{len(references.labels):,} references, {right:,.0f} answered right"
    name, title = f"remix-{split}", f"{n_runs}, {split}"
    if strict:
        text += ", of which none shares an operand with its prompt"
        name += "-strict"
        title += ", no neighbour shares an operand"
    if source != "reference":
        text += f", from the split {source}"
        name += f"-{source}"
        title += f", references of {source}"
    print(text, end="\n\n")

    # Vary NGD, or let all methods compete. Of several processes the first one writes.
    out = values["out"] or folders[0]
    out.mkdir(parents=True, exist_ok=True)
    if values["ablate"]:
        result = run_sweeps(arenas)
        if processes.rank() > 0:
            return 0
        print(sweep_table(result))
        paths = [out / f"{name}-ablation.png"]
        title = f"NGD with one setting varied at a time ({title})"
        sweeps_figure(result, title, paths[0])
        name += "-ablation"
    else:
        result = run_contest(folders, arenas, values["methods"], settings, beside, title)
        if processes.rank() > 0:
            return 0
        print(contest_report(result))
        if "missing" in result:
            return tell_missing(result, out, name)
        paths = contest_figures(result, str(out / name))
    print("\nwrote", ", ".join(map(str, paths)), "(look at them)")
    return save_scores(out, name, result)


def tell_missing(result: dict, folder: Path, name: str) -> int:
    """Write an interrupted contest, and say what is missing, and how to go on -> the exit code."""
    print()
    save_scores(folder, f"{name}-interrupted", result)
    missing = ",".join(result["missing"])
    more = cli.command("python", *sys.argv, "--methods", missing, "--out", folder / "rest")
    print(f"interrupted: {len(result['missing'])} methods are missing; for them:\n    {more}")
    return 130


def robustness_command(values: dict) -> int:
    """What a model loses where its routing goes wrong: disabled first choices, and noise."""
    folder, model, task, split = open_run(values)
    rows = measure_robustness(model, task, split)
    print(robustness_table(rows))
    print(
        "\ntop-1: each token's first choice is disabled; rescaled: the others' weights then sum to"
    )
    print("1; a quarter: of the experts that a token visits, the best; layer 0: top-1 there only;")
    print("not 0: but there; q: top-1 with this probability; noise: on the logits")
    path = folder / f"robustness-{split}.png"
    robustness_figure({folder.name: rows}, path)
    print(f"\nwrote {path}")
    return save_scores(folder, f"robustness-{split}", rows)


def sharing_command(values: dict) -> int:
    """Which experts of A and B a Cartesian model composes, and how alike they are."""
    folder, model, task, split = open_run(values)
    rows = measure_sharing(model, task, split)
    print(sharing_table([rows]))
    print("\ninformation: what a token's choice in A tells of that in B, in nats; shuffled: what")
    print("that would be by chance; cosines of the outputs of composed experts: of those that a")
    print("token visits / of all")
    path = folder / f"sharing-{split}.png"
    sharing_figure(rows, f"Composed experts: {folder}, {split}", path)
    print(f"\nwrote {path}")
    return save_scores(folder, f"sharing-{split}", rows)


def playground_command(values: dict) -> int:
    """A page that runs the model, to move its experts by hand: one file, no network."""
    folder, model, task, _ = open_run(values)
    page = assemble(page_data(model, task, folder.name))
    path = folder / "playground.html"
    write(path, page.encode())
    print(f"wrote {path} ({len(page) / 1e6:.1f} MB): open it in a browser")
    return 0


COMMANDS = {
    "perplexity": perplexity_command,
    "routing": routing_command,
    "sample": sample_command,
    "cloze": cloze_command,
    "remix": remix_command,
    "robustness": robustness_command,
    "playground": playground_command,
    "sharing": sharing_command,
    "choice": choice.answer_benchmark,
}


if __name__ == "__main__":
    cli.program(main)
