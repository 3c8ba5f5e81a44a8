"""The main job in one command: a frozen encoder gets measurably better at retrieval."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("demo")
