"""Render the model card of a trained model from its results files."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("render_card")
