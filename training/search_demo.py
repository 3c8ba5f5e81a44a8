"""Serve a page that searches a corpus with a trained model and with its frozen base, side by side."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("search_demo")
