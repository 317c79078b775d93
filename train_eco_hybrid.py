"""Train an EcoHybrid denoiser: the loop, the flags and the defaults of train_diffusion.py.

    python train_eco_hybrid.py --preset tiny --data_dir data/processed --output_dir checkpoints/eco_hybrid_hi

Its own flags are --memory_slots, --conv_kernel and --attn_every; the same other flags give as many parameters as there.
"""

from config import run_main
from train_diffusion import main as train


def main():
    train("eco_hybrid", __doc__, output_dir="checkpoints/eco_hybrid_hi")


if __name__ == "__main__":
    run_main(main)
