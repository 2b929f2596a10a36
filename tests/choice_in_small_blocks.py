"""eval.py choice in small blocks: test_choice.py starts it in one process and in two."""

from lab.checkpoints import choice, remixed
from lab.tools import cli
from pathways import prompts

if __name__ == "__main__":
    remixed.BLOCK, prompts.MOST_TOKENS, choice.MOST_TOKENS = 4, 150, 150
    cli.program(choice.main)
