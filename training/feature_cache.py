"""List and prune the features that the frozen encoders left on disk."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("feature_cache")
