"""Folders of diffusers and transformers: what their files may say, checked before anything of them is loaded."""
