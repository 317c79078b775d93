"""Text from an EcoHybrid checkpoint: sample_diffusion.py takes every kind, this is its other name."""

from sample_diffusion import main, run_main

if __name__ == "__main__":
    run_main(main)
