"""Train the causal twin, to compare with: the loop, the flags and the sizes of train_diffusion.py.

    python train_autoregressive.py --preset tiny --data_dir data/processed --output_dir checkpoints/autoregressive_hi

The same blocks and as many parameters, made causal; the loss is next-token cross-entropy, the validation exact. The
flags of MaskConfig are accepted, so that one command line serves all trainers, and change nothing: nothing is hidden.
"""

from config import run_main
from train_diffusion import main as train

OWN = dict(dropout=0.1, weight_decay=0.1)  # tuned for it (docs/experiments.md), not inherited


def main():
    train("autoregressive", __doc__, output_dir="checkpoints/autoregressive_hi", **OWN)


if __name__ == "__main__":
    run_main(main)
