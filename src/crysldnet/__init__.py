"""CrysLDNet: latent diffusion pretraining and finetuning of crystal graph encoders."""

__version__ = "0.1.0"
