"""Evaluate a model on BEIR data sets, with the frozen base beside it."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("eval_beir")
