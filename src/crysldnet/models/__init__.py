"""Plain modules with their losses: the latent space, reconstruction objectives, latent diffusion, property heads."""
