"""How much people would like pictures of a folder for their prompts, by models that were trained on people's choices."""
