"""Evaluate a model with MTEB, on BEIR folders of your own or on MTEB's tasks."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("eval_mteb")
