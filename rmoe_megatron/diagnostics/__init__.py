"""What a trained model does inside, as numbers and pictures."""
