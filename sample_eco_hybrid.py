"""Text from an EcoHybrid checkpoint: sample_diffusion.py takes every kind, this is its other name.

    python sample_eco_hybrid.py --ckpt checkpoints/eco_hybrid_hi --prompt "पार्वती ने कहा"

It has all flags of sample_diffusion.py, and no others.
"""

from sample_diffusion import main, run_main

if __name__ == "__main__":
    run_main(main)
