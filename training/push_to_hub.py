"""Send a trained model to the Hub: weights, code, tokenizer, card, results and plots, in one commit."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("push_to_hub")
