"""What a trained model becomes to run elsewhere, without this package."""
