"""Images from prompts with exported models."""
