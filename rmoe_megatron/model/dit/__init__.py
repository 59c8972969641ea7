"""DiT: the class-conditional diffusion transformer (Peebles and Xie, 2022)."""
