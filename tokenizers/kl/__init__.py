"""KL autoencoders."""
