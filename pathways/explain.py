"""What became of a re-mixed prompt, in words."""

from lab.tools.checks import require

BAR = 20  # letters of a bar of 100 %
MOST = 3  # answers shown, before and after


def numbers(tokens) -> str:
    """Tokens as they are, for want of words."""
    return " ".join(map(str, tokens))


def explained(result, i: int, words=numbers) -> str:
    """Prompt i of a RemixResult: its answers before and after, and the neighbours that it follows.

    words: a function from a list of tokens to text, such as a task's `words`. IndexError where
    there is no prompt i; ValueError where the result is not one of `remix`.
    """
    require(result.references is not None, "only a result of `remix` knows its prompts")
    lines = [words(result.prompts[i]), "", f"{'':14}{'before':26}after"]

    # The most probable answers of either, as bars.
    before, after = (logits[i].softmax(-1) for logits in (result.logits_before, result.logits))
    shown = {*before.topk(MOST).indices.tolist(), *after.topk(MOST).indices.tolist()}
    for token in sorted(shown, key=lambda token: -float(before[token])):
        line = f"{words([token]):>12}  {bar(before[token]):26}{bar(after[token])}"
        lines.append(line.rstrip())

    # The neighbours, whose answers are known.
    references, near = result.references, result.neighbours
    lines += ["", "neighbours"]
    for index, weight in zip(near.index[i].tolist(), near.weight[i].tolist(), strict=True):
        if weight > 0:
            prompt = references.tokens[index, : references.lengths[index]].tolist()
            answer = words([int(references.labels[index])])
            lines.append(f"  {words(prompt)}: {answer} (weight {weight:.2f})")
    losses = result.losses[i]
    if len(losses) > 0:
        lines.append(f"their loss: {losses[0]:.2f} nats, at best {losses.min():.2f}")
    return "\n".join(lines)


def bar(share) -> str:
    """A share as a bar and in percent."""
    return f"{'█' * round(BAR * float(share))} {share:.0%}"
