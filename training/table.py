"""Make one table of many models from their results files: text, Markdown, LaTeX or CSV."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("table")
