"""Open a trained model up. Each sub-command takes a run folder, or else the newest one in out/:

python eval.py perplexity     how well it predicts held-out text
python eval.py routing        which expert does what
python eval.py sample         let it tell a story
python eval.py cloze          choose the last word of stories
python eval.py remix          C3PO: re-mix its experts for each prompt, beside all that it is compared with
python eval.py robustness     what it loses where its routing goes wrong
python eval.py sharing        which experts a Cartesian model composes, and how alike they are
python eval.py choice         benchmarks, on a checkpoint of the hub: --model PATH_OR_REPO
"""

import codecs
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SkillsTask
from lab import checkpoint, choice, cli, plots
from lab.baselines import METHODS, arena_of
from lab.contest import contest, figures, report, sweep_table, sweeps
from lab.robust import robustness, robustness_table
from lab.sharing import sharing, sharing_table
from lab.stats import share_interval
from lab.tasks import accuracy, choose, cloze, evaluate, load_data, most_frequent, places, specialisation
from moe import require
from remix import RemixConfig


def main(argv=None) -> int:
    """Run a sub-command -> the exit code."""
    commands = {
        "perplexity": perplexity,
        "routing": routing,
        "sample": sample,
        "cloze": cloze_task,
        "remix": remix_task,
        "robustness": robustness_task,
        "sharing": sharing_task,
    }
    argv = list(argv or [])
    if argv[:1] == ["choice"]:
        return choice.main(argv[1:])
    if not argv or argv[0] not in (*commands, "-h", "--help"):
        near = cli.nearest(argv[0], commands) if argv else ""
        raise cli.Usage(f"expected a command: {', '.join(commands)}{near} (--help tells what each does)")
    if argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    parser = cli.Parser(f"eval.py {argv[0]}", usage="%(prog)s [run] [flags]", description=commands[argv[0]].__doc__)
    several = "*" if argv[0] == "remix" else "?"
    parser.add_argument("run", nargs=several, type=Path, help="the run's folder (none: the newest in out/)")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="held-out part [dev]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    if argv[0] == "sample":
        parser.add_argument("--prompt", default="Once upon a time", help="how the text begins [Once upon a time]")
        parser.add_argument("--tokens", type=int, help="how many to add at most (none: up to the context)")
        parser.add_argument("--temperature", type=float, default=0.6, help="0: always the most probable token [0.6]")
        parser.add_argument("--seed", type=int, default=0, help="draws the text [0]")
    if argv[0] == "remix":
        parser.add_argument("--methods", help="rows of the table, such as NGD,oracle (none: all)")
        parser.add_argument("--most", type=int, help="prompts of a run (none: all)")
        parser.add_argument("--strict", action="store_true", help="no neighbour shares an operand with the prompt")
        parser.add_argument("--ablate", action="store_true", help="vary one setting of NGD after the other, instead")
        parser.add_argument("--beside", nargs="*", type=Path, default=[], help="runs of a larger model, not re-mixed")
        parser.add_argument("--out", type=Path, help="folder for JSON and figures (none: the first run's)")
        cli.add_flags(parser, RemixConfig, skip=("method",))
    args = parser.parse(argv[1:])
    torch.set_num_threads(max(1, args.pop("threads")))
    if argv[0] == "remix":
        return remix_task(args.pop("run") or [checkpoint.newest()], **args)
    folder = args.pop("run") or checkpoint.newest()
    model, train = checkpoint.load(folder)
    data = load_data(train, model.config.context)
    found = f"{data.vocab_size} tokens, the model {model.config.vocab_size}"
    require(data.vocab_size == model.config.vocab_size, f"{folder}: the tokenizer has {found}")
    print(f"{folder}: {train['data']}, {model.n_params():,} parameters\n")
    return commands[argv[0]](folder, model, data, **args)


def perplexity(folder, model, data, split) -> int:
    """How well a model predicts a held-out split, all of it: nats and perplexity per token, bits per byte."""
    scores = evaluate(model, data, split, most=None)
    names = {"loss": "nats per token", "perplexity": "perplexity per token", "bits_per_byte": "bits per byte"}
    rows = [(names.get(name, name.replace("_", " ")), f"{value:.4f}") for name, value in scores.items()]
    print(cli.table(rows, header=[split, ""]))
    return save(folder, f"perplexity-{split}", scores)


def routing(folder, model, data, split) -> int:
    """Which expert does what on a held-out split: load, entropy, first choices, the tokens that each takes most."""
    require(len(model.routers()) > 0, f"{folder} is a dense model, or routes by hash: it has no router to look into")
    special, names, rows = specialisation(model, data, split, n_kinds=100), places(model), []
    for name, load, entropy, top in zip(names, special.load, special.entropy, special.top, strict=True):
        cells = (entropy, top, load.min() / load.mean(), load.max() / load.mean())
        rows.append((name, *(f"{cell:.2f}" for cell in cells), cli.bar_line(load)))
    share = f"{special.load.mean():.0%}"
    print(cli.table(rows, header=["", "entropy", "top-1", "least", "most", "load of each expert"]))
    print("entropy: of a token's probabilities, 1 = uniform; top-1: the probability of its first choice;")
    print(f"least, most: load of an expert, 1 = an even share, which is {share} of the tokens\n")
    for name, shares in zip(names, special.shares.round(2), strict=True):  # (R, E)
        # The kinds of which an expert takes the largest share; of equals, the most frequent first.
        best = np.argsort(-shares, axis=0, kind="stable")[:6].T  # (R, E) -> (E, 6)
        text = ["  ".join(f"{special.kinds[r]} {shares[r, e]:.0%}" for r in row) for e, row in enumerate(best)]
        print(cli.table(list(enumerate(text)), header=[name, "takes most of"], left=2), end="\n\n")
    title, figures = f"{folder}, {split}", (folder / "routing.png", folder / "together.png")
    common = special._replace(shares=special.shares[:, :12], kinds=special.kinds[:12])
    does, together = f"Which expert does what: {title}", f"Experts that work together: {title}"
    plots.routing_figure(common.shares, common.load, common.kinds, names, does, figures[0])
    plots.together_figure(common.together, common.shares, names, together, figures[1])
    numbers = {name: value.round(4).tolist() for name, value in special._asdict().items() if name != "kinds"}
    print(f"wrote {figures[0]} and {figures[1]}", end="")
    return save(folder, f"routing-{split}", {"places": names, "kinds": special.kinds, **numbers})


def sample(folder, model, data, split, prompt, tokens, temperature, seed) -> int:
    """Continue a prompt, token by token as they come."""
    require(not isinstance(data, SkillsTask), f"{folder} has learnt the skills task, and knows no text")
    start = [data.encoding.eot_token, *data.encoding.encode_ordinary(prompt)]
    room = model.config.context - len(start)
    require(
        room > 0, f"the prompt has {len(start)} tokens; it must be shorter than the context, {model.config.context}"
    )
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may take several tokens
    generator = torch.Generator().manual_seed(seed)
    print(prompt, end="")
    stop, most = data.encoding.eot_token, min(tokens or room, room)
    for token in model.stream(torch.tensor([start]), most, temperature, stop, generator=generator):
        if int(token) != stop:
            print(text.decode(data.encoding.decode_single_token_bytes(int(token))), end="", flush=True)
    print(text.decode(b"", final=True))
    return 0


def cloze_task(folder, model, data, split) -> int:
    """Choose the true last word of held-out stories among four; beside it, choosing the most frequent last word."""
    require(not isinstance(data, SkillsTask), f"{folder} has learnt the skills task, and knows no stories")
    questions = cloze(data, split)
    n = len(questions)
    require(n >= 20, f"only {n} stories of {split} end with a word of one token; a cloze task needs 20 or more")
    rows, scores = [], {"questions": n}
    for name, picked in (("the model", choose(model, questions)), ("most frequent", most_frequent(data, questions))):
        share = accuracy(picked, questions)
        low, high = share_interval(round(share * n), n)
        scores[name] = {"accuracy": share, "interval": [low, high]}
        rows.append((name, f"{share:.1%}", f"{low:.1%} to {high:.1%}"))
    rows.append(("chance", "25.0%", ""))
    print(cli.table(rows, header=[f"{n} stories of {split}", "right", "95 % interval"]))
    return save(folder, f"cloze-{split}", scores)


def remix_task(folders, split, methods, most, strict, ablate, beside, out, **given) -> int:
    """C3PO: re-mix the experts of a frozen model for each prompt, beside all that it is compared with."""
    names = [name.strip() for name in methods.split(",")] if methods else list(METHODS)
    for name in names:
        if name not in METHODS:
            raise cli.Usage(f"unknown method {name!r}{cli.nearest(name, METHODS)} (there are: {', '.join(METHODS)})")
    if most is not None and most < 1:
        raise cli.Usage(f"--most is {most}; expected at least 1 prompt")
    if beside and len(beside) != len(folders):
        raise cli.Usage(f"--beside names {len(beside)} runs for {len(folders)}; expected one for each, of its seed")
    cli.build(RemixConfig, given)
    arenas = [arena_of(folder, split, most, given, strict) for folder in tqdm(folders, leave=False, disable=None)]
    out, n, m = out or folders[0], len(arenas[0].labels), len(arenas[0].references.labels)
    out.mkdir(parents=True, exist_ok=True)
    right = np.mean([int(arena.references.correct.sum()) for arena in arenas])
    arm = ", of which none shares an operand with its prompt" if strict else ""
    print(f"{len(folders)} runs, {n:,} prompts of {split} each; {m:,} references, {right:,.0f} answered right{arm}\n")
    name = f"remix-{split}{'-strict' if strict else ''}"
    title = f"{len(folders)} seeds, {split}{', no neighbour shares an operand' if strict else ''}"
    if ablate:
        found = sweeps(arenas)
        print(sweep_table(found))
        plots.sweeps_figure(found, f"NGD with one setting varied at a time ({title})", out / f"{name}-ablation.png")
        print(f"\nwrote {out / name}-ablation.png", end="")
        return save(out, f"{name}-ablation", found)
    found = contest(folders, arenas, names, given, beside, title)
    print(report(found))
    paths = figures(found, str(out / name))
    print("\nwrote", ", ".join(map(str, paths)), end="")
    return save(out, name, found)


def robustness_task(folder, model, data, split) -> int:
    """What a model loses where its routing goes wrong: first choices that are disabled, in many ways, and noise."""
    rows, path = robustness(model, data, split), folder / f"robustness-{split}.png"
    print(robustness_table(rows))
    plots.robustness_figure({folder.name: {p: [row["mass"], row["perplexity"]] for p, row in rows.items()}}, path)
    print(f"\nwrote {path}", end="")
    return save(folder, f"robustness-{split}", rows)


def sharing_task(folder, model, data, split) -> int:
    """Which experts of A and B a Cartesian model composes, and how alike those are that share one of them."""
    rows, path = sharing(model, data, split), folder / f"sharing-{split}.png"
    print(sharing_table([rows]))
    print(
        "\ninformation: what a token's choice in A tells of that in B, in nats; shuffled: what that would be by chance;"
    )
    print("cosines of the outputs of composed experts: of those that a token visits / of all")
    plots.sharing_figure(rows, f"Composed experts: {folder}, {split}", path)
    print(f"\nwrote {path}", end="")
    return save(folder, f"sharing-{split}", rows)


def save(folder: Path, name: str, scores: dict | list) -> int:
    """Scores as JSON beside the checkpoint -> 0."""
    path = folder / f"{name}.json"
    checkpoint.write(path, json.dumps(scores, indent=2).encode())
    print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
