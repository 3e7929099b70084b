"""Pretrain an encoder without labels.

Stage 1 trains a variational autoencoder; stage 2 trains diffusion in its latent space together with the encoder. Writes
encoder.safetensors for finetuning, and prints what the model learned, measured on the validation split.
"""

import sys

from crysldnet import CommandModule
from crysldnet.pretrain.command import make_data, run
from crysldnet.pretrain.module import PretrainModule
from crysldnet.pretrain.settings import PretrainConfig, build_model

__all__ = ["PretrainConfig", "PretrainModule", "build_model", "make_data", "run"]

sys.modules[__name__].__class__ = CommandModule
