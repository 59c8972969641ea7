"""From runs to diffusers folders and back, and from the original DiT."""
