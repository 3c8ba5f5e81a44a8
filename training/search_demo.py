"""Serve a page that searches a corpus with a trained model and with its frozen base, side by side."""

from search_page.app import main

from ragcun_hf.command_line import run_script

if __name__ == "__main__":
    run_script(main)
